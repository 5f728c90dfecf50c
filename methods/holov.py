"""HoloV: *Don't Just Chase "Highlighted Tokens" in MLLMs: Revisiting Visual Holistic Context Retention* (2510.02912).

Authors' code: obananas/HoloV, commit 1d2e65e. Behind the projector, of every image:

    a_j   = 1000 · mean over heads of the attention of CLS to patch j, in the block whose output the model uses
    runs:   the tokens in raster order, cut into ``runs`` pieces of equal length (the first ones one longer, if need be)
    v_j   = variance of the cosines of token j with the others of its run (its own counts as 0)
    s_j   = a_j + 0.09 · v_j · mean a / mean v, the means over the run
    run r gets floor(w_r · T) of T tokens, w_r its mean s over the sum of all runs'; the missing ones go one each to the
    runs of largest w_r, and each run keeps its tokens of largest a_j

They enter run by run, inside a run by falling attention (a run that stays whole as it was), with new positions. The
budget is spent on every image in front of decoder layer 0; the variance decides how much a run gets, not which tokens.

A run may get more than it has. The authors fill up with zero vectors, which the decoder takes for tokens of the image
(``shortfall="zeros"``); by default the tokens of largest attention among the rest take their places, and enter with
their runs. ``runs`` is 16 in the authors' file for LLaVA; that for Qwen takes max(1, floor(1024/576 · P / T)) of P
tokens. Of an image that the model cuts into tiles the runs go through the whole and then through the tiles, row by row,
without newlines (``newlines=drop``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..engine.contract import Forward, Keep, Merge
from .base import Budgeted, OnImages, Salient, top
from .pieces import added_need_renumbering, cosine, per_image, precise
from .registry import register

if TYPE_CHECKING:
    from ..engine.contract import Geometry, ImageView, TokenLayout

Shortfall = Literal["attention", "zeros"]


@register("holov", "HoloV", paper="2510.02912", source="obananas/HoloV@1d2e65e")
class HoloV(Salient, OnImages, Budgeted):
    """Share the budget out among runs of tokens, and keep in each those to which the CLS token attends most."""

    hook_points = ("projector",)
    positions = "renumber"
    newlines = "drop"
    everything = "keep=1,newlines=keep"
    reorders = True
    examples = ("keep=0.5,runs=4", "tokens=11,runs=3,positions=keep", "tokens=13,runs=5,shortfall=zeros")

    runs: int = 16
    shortfall: Shortfall = "attention"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.runs >= 1, f"runs must be >= 1, not {self.runs}")
        self.require(self.shortfall in get_args(Shortfall), "shortfall must be 'attention' or 'zeros'")
        if self.shortfall == "zeros":
            added_need_renumbering(self, "use positions='renumber' or shortfall='attention'")

    def check(self, geometry: Geometry) -> None:
        super().check(geometry)
        patches = self.runs if geometry.vision is None else geometry.vision.tokens or self.runs
        self.require(self.runs <= patches, f"{self.runs} runs of an image of {patches} tokens: lower runs")

    def begin(self, layout: TokenLayout, geometry: Geometry) -> Forward:
        return HoloVForward(self)


class HoloVForward(Forward):
    """One prefill."""

    def __init__(self, method: HoloV) -> None:
        self.method = method

    def projected(self, view: ImageView) -> Keep | Merge:
        tokens, attention, fill = view.projected, self.method.salience(view), self.method.shortfall == "attention"
        images, patches, size = tokens.shape
        budget, index = (
            per_image(self.method, patches),
            runs_of(patches, min(self.method.runs, patches)).to(tokens.device),
        )
        view.scored(index.numel() * index.shape[1] * size)
        quota = allocated(run_scores(tokens, attention, index), budget)
        keep, order = taken(attention, quota, index, budget if fill else None)
        if fill:
            return Keep(keep, order)
        missing = torch.arange(budget, device=keep.device) < budget - keep.sum(1, keepdim=True)
        return Merge(keep, added=tokens.new_zeros(images, budget, size), added_present=missing, order=order)


def runs_of(patches: int, runs: int) -> Tensor:
    """Int (R, n): the patches of each run in raster order, -1 behind those of the shorter ones."""
    return pad_sequence(list(torch.arange(patches).tensor_split(runs)), batch_first=True, padding_value=-1)


def run_scores(tokens: Tensor, attention: Tensor, index: Tensor) -> Tensor:
    """(N, R): mean score of the tokens of each run. ``tokens``: (N, P, D), ``attention``: (N, P), ``index``: (R, n)."""
    there, places, length = index >= 0, index.clamp(min=0), (index >= 0).sum(1)
    mean = lambda values: (values * there).sum(-1, keepdim=True) / length[:, None]  # noqa: E731
    others = there[:, None] & there[:, :, None] & ~torch.eye(index.shape[1], dtype=torch.bool, device=index.device)
    likeness = cosine(tokens[:, places].flatten(0, 1)).unflatten(0, (len(tokens), -1)) * others
    number = (length - 1).clamp(min=1)[:, None]
    apart = (likeness - (likeness.sum(-1) / number)[..., None]) * there[:, None]
    variance = apart.square().sum(-1) / number
    salient = 1000 * precise(attention)[:, places]
    score = salient + 0.09 * variance * mean(salient) / (mean(variance) + 1e-6)
    # The authors leave the only token of a run as it is.
    return mean(torch.where(length[:, None] > 1, score, salient / 1000)).squeeze(-1)


def allocated(scores: Tensor, budget: int) -> Tensor:
    """Int (N, R): tokens asked of each run, ``budget`` together, by the ``scores`` (N, R); may be more than it has."""
    weight = scores / (scores.sum(1, keepdim=True) + 1e-6)
    share = (weight * budget).floor().long()
    return share + top(weight, budget - share.sum(1), torch.ones_like(weight, dtype=torch.bool))


def taken(attention: Tensor, quota: Tensor, index: Tensor, budget: int | None) -> tuple[Tensor, Tensor]:
    """Bool (N, P), the tokens that stay, ``quota`` (N, R) of each run as far as it has them; and int (N, P), the order.

    Up to a ``budget``, tokens of largest attention take the places of those that runs do not have.
    """
    there = index >= 0
    part = attention[:, index.clamp(min=0)].masked_fill(~there, -torch.inf)
    rank = part.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    keep = (rank < quota[..., None]) & there
    if budget is not None:
        spare = top(part.flatten(1), budget - keep.sum((1, 2)), (there & ~keep).flatten(1))
        keep = keep | spare.view_as(keep)
    run, place = (torch.arange(count, device=index.device) for count in index.shape)
    whole = (keep == there).all(-1, keepdim=True)
    order = torch.where(whole, place, rank) + run[:, None] * index.shape[1]
    patches = attention.shape[1]
    back = index.masked_fill(~there, patches).flatten().expand(len(attention), -1)
    full = lambda values: values.new_zeros(len(values), patches + 1).scatter(1, back, values.flatten(1))[:, :patches]  # noqa: E731
    return full(keep), full(order)
