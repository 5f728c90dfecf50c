"""Pieces that several methods share. N counts images, P patches, D features; everything stays on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

if TYPE_CHECKING:
    from ..engine.views import VisionView
    from ..models.adapters import Geometry
    from .base import Budgeted, Method


def precise(values: Tensor) -> Tensor:
    """The same numbers in fp32, or in fp64 if they are."""
    return values if values.dtype == torch.float64 else values.float()


def cosine(left: Tensor, right: Tensor | None = None) -> Tensor:
    """Cosine of every token of ``left`` (N, P, D) with every one of ``right`` (N, Q, D; default: left): (N, P, Q)."""
    left = normalize(precise(left), dim=-1)
    right = left if right is None else normalize(precise(right), dim=-1)
    return left @ right.transpose(1, 2)


def cls_attention(view: VisionView) -> Tensor:
    """(N, P): attention of CLS to the patches in the feature block, mean over heads."""
    return view.cls_weights().mean(1)


def marked(index: Tensor, width: int) -> Tensor:
    """Bool (N, width): true at the columns ``index``, int (N, n)."""
    return torch.zeros(index.shape[0], width, dtype=torch.bool, device=index.device).scatter_(1, index, 1)


def columns(mask: Tensor, count: int) -> Tensor:
    """Int (N, count): the columns where ``mask`` (N, P) is true, ascending; each row must have ``count`` of them."""
    return mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :count]


def pick(tokens: Tensor, index: Tensor) -> Tensor:
    """(N, n, D): the tokens (N, P, D) at the columns ``index``, int (N, n)."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))


def per_image(method: Budgeted, patches: int) -> int:
    """The budget of one image, on the host."""
    return int(method.budget(torch.tensor([patches])))


def needs_cls(method: Method, geometry: Geometry) -> None:
    """Raise :class:`OptionError` if the vision tower keeps no CLS token apart from the patches."""
    method.require(
        geometry.vision is None or geometry.vision.has_cls,
        "scores patches by the attention of the CLS token, and this model's vision tower has none: "
        "use a method without it, such as divprune or pooling",
    )


def added_need_renumbering(method: Method) -> None:
    """Raise :class:`OptionError` under ``positions="keep"``: tokens made on the vision side have no old position."""
    method.require(
        method.positions == "renumber", "its new tokens have no old position to keep: use positions='renumber'"
    )
