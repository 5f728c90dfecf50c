"""Pieces that several methods share. N counts images, P patches, D features; everything stays on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

if TYPE_CHECKING:
    from ..engine.contract import AttentionView, LayerView, Method, TokenLayout


def precise(values: Tensor) -> Tensor:
    """The same numbers in fp32, or in fp64 if they are."""
    return values if values.dtype == torch.float64 else values.float()


def cosine(left: Tensor, right: Tensor | None = None) -> Tensor:
    """Cosine of every token of ``left`` (N, P, D) with every one of ``right`` (N, Q, D; default: left): (N, P, Q)."""
    left = normalize(precise(left), dim=-1)
    right = left if right is None else normalize(precise(right), dim=-1)
    return torch.bmm(left, right.transpose(1, 2))


def last_token_attention(view: AttentionView | LayerView, weights: Tensor) -> Tensor:
    """(B, V): the mean over heads of the last token's ``weights`` (B, H, 1, L) on each visual token."""
    return view.layout.visual.pick(weights, 3).mean((1, 2))


def text_attention(view: LayerView) -> Tensor:
    """(B, V): weight of each visual token in the text behind the image, mean over heads and text."""
    text = view.layout.text
    parts = [(weights.mean(1) * there[..., None]).sum(1) for weights, there in view.scan(text)]
    total = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
    return view.layout.visual.pick(total / text.device_counts[:, None], 1)


def up_to_visual(layout: TokenLayout) -> Tensor:
    """Bool (B, L): tokens up to the last visual one of the row."""
    return layout.valid & (layout.visual.mask.flip(1).cumsum(1).flip(1) > 0)


def mean_query_attention(query: Tensor, key: Tensor, scaling: float, among: Tensor) -> Tensor:
    """(B, L): share of each key in the softmax of the mean query over ``among``, bool (B, L); mean over heads."""
    weight = among.to(query.dtype) / among.sum(1, keepdim=True).clamp(min=1)
    mean = (precise(query) * weight[:, None, :, None]).sum(2, keepdim=True)
    keys = precise(key.repeat_interleave(query.shape[1] // key.shape[1], dim=1))
    logits = (mean @ keys.transpose(2, 3)).squeeze(2) * scaling
    return logits.masked_fill(~among[:, None], torch.finfo(logits.dtype).min).softmax(2).mean(1)


def by_place(picked: Tensor, width: int) -> Tensor:
    """Scores (N, width) of a ranking: they fall along the columns ``picked``, int (N, n), and are lowest elsewhere."""
    place = torch.arange(picked.shape[1], dtype=torch.float32, device=picked.device)
    lowest = torch.full((picked.shape[0], width), -torch.inf, device=picked.device)
    return lowest.scatter(1, picked, -place.expand(picked.shape))


def marked(index: Tensor, width: int) -> Tensor:
    """Bool (N, width): true at the columns ``index``, int (N, n)."""
    return torch.zeros(index.shape[0], width, dtype=torch.bool, device=index.device).scatter_(1, index, 1)


def columns(mask: Tensor, count: int) -> Tensor:
    """Int (N, count): the columns where ``mask`` (N, P) is true, ascending; each row must have ``count`` of them."""
    return mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :count]


def pick(tokens: Tensor, index: Tensor) -> Tensor:
    """(N, n, D): the tokens (N, P, D) at the columns ``index``, int (N, n)."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))


@lru_cache(maxsize=256)
def per_image(method: Any, patches: int) -> int:
    """The budget of one image, on the host, of a ``method`` that has one (:class:`~.base.Budgeted`)."""
    return int(method.budget(torch.tensor([patches])))


def added_need_renumbering(method: Method, remedy: str = "use positions='renumber'") -> None:
    """Raise :class:`OptionError` under ``positions="keep"``: tokens that a method makes have no old position."""
    method.require(method.positions == "renumber", f"its new tokens have no old position to keep: {remedy}")


def share(number: Any, out_of: int | None, total: Any) -> Any:
    """``number``, or, ``out_of`` so many, the same share of ``total`` (ints, or ints in tensors), floored."""
    return number if out_of is None else total * number // out_of


def interpolated(known: Mapping[int, Sequence[int]], at: float) -> list[int]:
    """The list for ``at``, entry by entry on straight lines between lists of equal length that are ``known``."""
    places = sorted(known)
    return [round(float(np.interp(at, places, column))) for column in zip(*(known[p] for p in places), strict=True)]


def matrix_rank(matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Int (N,): ranks of matrices (N, P, Q) of which ``rows`` and ``columns``, int (N,), count; the rest must be 0."""
    singular = torch.linalg.svdvals(matrix.float())
    tolerance = singular.amax(1) * torch.maximum(rows, columns) * torch.finfo(singular.dtype).eps
    return (singular > tolerance[:, None]).sum(1)
