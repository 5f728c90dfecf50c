"""PruMerge and PruMerge+: *LLaVA-PruMerge: Adaptive Token Reduction for Efficient LMMs* (arXiv 2403.15388).

Authors' code: 42Shawn/LLaVA-PruMerge, commit 097c041. Queries and keys are those of the vision block *after* the one
whose output the model uses; CLS attends with one head of the full width.

    a_j     = attention of CLS to patch j
    kept:     adaptively as many patches as have a_j above the upper outlier bound Q3 + 1.5 (Q3 - Q1); those of
              highest a_j
    plus:     also every stride-th patch, stride = floor(floor(P / kept) / 3)
    merge:    each kept patch adds the features of its 32 nearest others (cosine of keys), each times its a_j
    extra:    one more token, the sum of the dropped features, each times its a_j
    in front of the projector:  kept patches by falling a_j, then the other patches of plus in order, then the extra one

``keep`` or ``tokens`` fixes the number of tokens instead, the extra one included. PruMerge+ then spends a quarter of
the others by a_j and spreads the rest evenly over the patches that are left, which is not in the authors' code.

The paper averages the neighbours with normalised weights; the code, followed here, adds them with raw ones:
``weights="normalised"`` divides by the sum of a_j over the neighbours and the token itself. ``order="spatial"`` keeps
the image's order. The authors' code fails where more than a third of the patches are outliers: here the stride is 1.

Where a model takes its features from the last block there is none behind it: ``read_block="features"`` reads that one,
or the last up to it in which patches attend to the whole image. Towers without CLS need ``attention="received"``: a_j
is what a patch gets, mean over heads and queries, and not what CLS gives it. Neither is in the authors' code.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from ..engine.contract import Merge
from .base import LATER, Budgeted, OnPatches, Salient
from .pieces import added_need_renumbering, cosine, per_image, pick, precise
from .registry import register

if TYPE_CHECKING:
    from ..engine.contract import Geometry, TokenLayout, VisionGeometry, VisionView

Block = Literal["after", "features"]
Order = Literal["attention", "spatial"]
Weights = Literal["raw", "normalised"]


@register("prumerge", "PruMerge", paper="2403.15388", source="42Shawn/LLaVA-PruMerge@097c041")
class PruMerge(Salient, OnPatches, Budgeted):
    """Keep the patches that stand out in CLS attention, and add to each what is like it."""

    hook_points = ("vision",)
    positions = "renumber"
    adaptive = True
    vision_blocks = (0,)
    examples = ("", "tokens=6,order=spatial,weights=normalised,neighbours=3")
    everything = None

    neighbours: int = 32
    order: Order = "attention"
    weights: Weights = "raw"
    read_block: Block = dataclasses.field(default="after", kw_only=True, metadata=LATER)

    def __post_init__(self) -> None:
        super().__post_init__()
        added_need_renumbering(self)
        self.require(self.neighbours >= 0, "neighbours must be >= 0")
        self.require(self.order in get_args(Order), "order must be 'attention' or 'spatial'")
        self.require(self.weights in get_args(Weights), "weights must be 'raw' or 'normalised'")
        self.require(self.read_block in get_args(Block), "read_block must be 'after' or 'features'")

    def check(self, geometry: Geometry) -> None:
        super().check(geometry)
        if geometry.vision is not None:
            if geometry.vision.tokens:
                self.check_budget(geometry.vision.tokens)
            self.require(
                self.read_block == "features" or geometry.vision.feature_block + 1 < geometry.vision.layers,
                "reads the vision block after the feature block, and this model takes its features from the last one: "
                "use read_block='features', or a method that reads the feature block, such as visionzip or fastervlm",
            )

    def check_budget(self, patches: int) -> None:
        """Raise :class:`OptionError` unless there is room for the extra token of an image of so many ``patches``."""
        self.require(
            not self.fixed or per_image(self, patches) >= 1,
            "the extra token is always there: the budget must be at least 1 token an image",
        )

    def block_at(self, vision: VisionGeometry) -> int:
        """The block whose queries and keys are read, counted back as in views."""
        return 0 if self.read_block == "after" else vision.last_full

    def blocks_read(self, vision: VisionGeometry) -> tuple[int, ...]:
        return (self.block_at(vision),)

    def blocks_received(self, vision: VisionGeometry) -> tuple[int, ...]:
        return (self.block_at(vision),) if self.attention == "received" else ()

    @property
    def fixed(self) -> bool:
        """Whether a budget, and not attention, says how many tokens stay."""
        return self.keep is not None or self.tokens is not None

    def left(self, layout: TokenLayout, geometry: Geometry) -> dict[int, Tensor] | None:
        return super().left(layout, geometry) if self.fixed else None

    def vision(self, view: VisionView) -> Merge:
        self.check_budget(view.features.shape[1])
        block = self.block_at(view.vision)
        cls = self.attention == "cls"
        attention = view.cls_weights(block, single_head=True).squeeze(1) if cls else view.received(block)
        keys = view.keys(block).transpose(1, 2).flatten(2)
        rank = self.ranked(attention)
        kept = rank.isfinite()
        patches, size = view.features.shape[1:]
        view.scored(patches * patches * keys.shape[2] + (patches + 1) * patches * size)
        merged = merge(view.features, keys, attention, kept, self.neighbours, normalise=self.weights == "normalised")
        contents = merged[:, :-1]
        if self.order == "attention":
            # The places stay those of the kept patches, and are filled by rank.
            place = (kept.cumsum(1) - 1).clamp(min=0)
            contents = pick(contents, rank.argsort(dim=1, stable=True).gather(1, place))
        return Merge(kept, replaced=contents, added=merged[:, -1:])

    def ranked(self, attention: Tensor) -> Tensor:
        """(N, P): the place in the output of each patch that stays, infinite for the others."""
        count = self.count(attention)
        falling = attention.argsort(dim=1, descending=True, stable=True).argsort(dim=1).to(attention.dtype)
        return falling.masked_fill(falling >= count[:, None], torch.inf)

    def count(self, attention: Tensor) -> Tensor:
        """Int (N,): patches that stay by their attention."""
        images, patches = attention.shape
        if not self.fixed:
            return outliers(attention)
        budget = self.budget(torch.full((images,), patches, device=attention.device))
        return (budget - 1).clamp(min=0)


@register("prumerge_plus", "PruMerge+")
class PruMergePlus(PruMerge):
    """PruMerge with evenly spaced patches besides."""

    examples = ("", "tokens=9")

    def ranked(self, attention: Tensor) -> Tensor:
        patches = attention.shape[1]
        place = torch.arange(patches, device=attention.device).to(attention.dtype)
        first = super().ranked(attention)
        if not self.fixed:
            # As the authors compute it, in floating point.
            inverse = 1 / (self.count(attention).double() / patches)
            stride = (inverse.floor() / 3).floor().clamp(min=1)[:, None]
            spread = (place % stride == 0) & (place < patches - 1)
        else:
            chosen = first.isfinite()
            spread = evenly(~chosen, super().count(attention) - chosen.sum(1))
        return torch.where(first.isfinite() | ~spread, first, patches + place)

    def count(self, attention: Tensor) -> Tensor:
        count = super().count(attention)
        return count // 4 if self.fixed else count


def outliers(scores: Tensor) -> Tensor:
    """Int (N,): how many of the scores (N, P) lie above the upper outlier bound, Q3 + 1.5 (Q3 - Q1)."""
    low, high = torch.quantile(scores, scores.new_tensor([0.25, 0.75]), dim=1)
    return (scores > (high + 1.5 * (high - low))[:, None]).sum(1)


def evenly(mask: Tensor, count: Tensor) -> Tensor:
    """Bool (N, P): ``count`` int (N,) of the places where ``mask`` is true, evenly spaced among them."""
    number = mask.cumsum(1)
    share = (number * count[:, None]) // number[:, -1:].clamp(min=1)
    before = ((number - 1) * count[:, None]) // number[:, -1:].clamp(min=1)
    return mask & (share > before)


def merge(
    features: Tensor, keys: Tensor, attention: Tensor, kept: Tensor, neighbours: int, *, normalise: bool = False
) -> Tensor:
    """(N, P + 1, D): each patch with its neighbours added, and the sum of the dropped ones at the end.

    ``features``: (N, P, D), ``keys``: (N, P, d), ``attention``: (N, P), ``kept``: bool (N, P).
    """
    patches = features.shape[1]
    itself = torch.eye(patches, dtype=torch.bool, device=features.device)
    nearest = cosine(keys).masked_fill(itself, -torch.inf).topk(min(neighbours, patches - 1), dim=2).indices
    weight = torch.zeros_like(itself).expand(len(keys), -1, -1).scatter(2, nearest, 1) * attention[:, None]
    if normalise:
        weight = weight + itself * attention[:, None]
        weight = weight / weight.sum(2, keepdim=True)
    else:
        weight = weight + itself
    extra = (attention * ~kept)[:, None]
    return (torch.cat([weight, extra], dim=1) @ precise(features)).to(features.dtype)
