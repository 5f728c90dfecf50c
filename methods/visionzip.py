"""VisionZip: *Longer is Better but Not Necessary in Vision Language Models* (arXiv 2412.04467).

Authors' code: dvlab-research/VisionZip, commit 3151f6d. Block: the vision block whose output the model uses.

    s_j        = attention of CLS to patch j in the block, all heads together
    dominant:    the CLS token itself, and the patches of highest s_j, in their order
    of the rest: every step-th patch is a target, as many as there are contextual tokens, step = rest // contextual;
                 each other patch goes to the target of highest cosine (keys of the block, mean over heads)
    contextual:  target + mean of the patches that went to it

    in front of the projector:  CLS, dominant patches, contextual tokens

An image that the model cuts into tiles has the same budget in each; the whole image comes first, as above, then the
dominant patches of all tiles, in their order in the image, then the CLS of each tile, then all contextual tokens.
Patches of padding count like others (``unpad=false``), and there are no newlines (``newlines=drop``).

``tokens`` counts all of them. The authors' splits are 162+30, 108+20 and 54+10, so by default 10/64 of the budget
(floored) is contextual; ``contextual`` sets another number. The paper calls the contextual tokens averages, but the
code adds the target to the mean of the others: ``merge="mean"`` averages target and others alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from ..engine.contract import Merge
from .base import Budgeted, OnPatches, Salient, top
from .pieces import added_need_renumbering, columns, cosine, per_image, pick, precise
from .registry import register

if TYPE_CHECKING:
    from ..engine.contract import Geometry, VisionGeometry, VisionView

ContextualMerge = Literal["sum", "mean"]


@register("visionzip", "VisionZip", paper="2412.04467", source="dvlab-research/VisionZip@3151f6d")
class VisionZip(Salient, OnPatches, Budgeted):
    """Keep CLS and the patches it attends to most, and merge the others into a few contextual tokens."""

    hook_points = ("vision",)
    positions = "renumber"
    newlines, unpad = "drop", False
    vision_cls = True
    examples = ("keep=0.5", "tokens=7,contextual=3,merge=mean")
    everything = None

    contextual: int | None = None
    merge: ContextualMerge = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        added_need_renumbering(self)
        self.require(self.contextual is None or self.contextual >= 0, "contextual must be >= 0")
        self.require(self.merge in get_args(ContextualMerge), "merge must be 'sum' or 'mean'")

    def check(self, geometry: Geometry) -> None:
        super().check(geometry)
        if geometry.vision is not None and geometry.vision.tokens:
            self.split(geometry.vision.tokens)

    def blocks_read(self, vision: VisionGeometry) -> tuple[int, ...]:
        return self.vision_blocks  # its keys, whatever attention is read

    def split(self, patches: int) -> tuple[int, int]:
        """Dominant (with CLS) and contextual tokens of an image."""
        budget = per_image(self, patches)
        contextual = budget * 10 // 64 if self.contextual is None else self.contextual
        self.require(
            budget - contextual >= 1,
            f"{budget} tokens an image, {contextual} of them contextual, leave none for CLS: "
            "raise tokens or keep, or lower contextual",
        )
        return budget - contextual, contextual

    def vision(self, view: VisionView) -> Merge:
        images, patches, _ = view.features.shape
        dominant, contextual = self.split(patches)
        chosen = dominant - view.cls.shape[1]
        count = torch.full((images,), chosen, device=view.features.device)
        kept = top(self.salience(view), count, view.present)
        rest = columns(~kept, patches - chosen)
        keys = pick(view.keys().mean(1), rest)
        merged = contextualise(pick(view.features, rest), keys, contextual, mean=self.merge == "mean")
        others = rest.shape[1] - contextual
        view.scored(contextual * others * (keys.shape[2] + merged.shape[2]))
        added = torch.cat([view.cls, merged], dim=1)
        return Merge(kept, added=added, anchors=places(view, added), counts=(chosen,) * images)


def places(view: VisionView, added: Tensor) -> Tensor:
    """Int (N, K): CLS in front of all patches, contextual tokens behind them; those of tiles behind the whole image."""
    first, patches = view.cls.shape[1], view.features.shape[1]
    whole = torch.tensor([part == 0 for _, part in view.parts], device=added.device)[:, None]
    is_cls = torch.arange(added.shape[1], device=added.device) < first
    return torch.where(whole, torch.where(is_cls, -1, patches - 1), torch.where(is_cls, patches, patches + 1))


def contextualise(features: Tensor, keys: Tensor, count: int, *, mean: bool) -> Tensor:
    """Merge all tokens, ``features`` (N, R, D) with ``keys`` (N, R, d), into ``count`` of them: (N, count, D)."""
    if count == 0:
        return features[:, :0]
    tokens = features.shape[1]
    step = max(1, tokens // count)
    target = list(range(0, count * step, step))
    other = sorted({*range(tokens)} - {*target})
    nearest = cosine(keys[:, other], keys[:, target]).argmax(2)
    centre = precise(features[:, target])
    share = (nearest[:, None] == torch.arange(count, device=keys.device)[:, None]).to(centre.dtype)
    total, number = share @ precise(features[:, other]), share.sum(2, keepdim=True)
    merged = (centre + total) / (number + 1) if mean else centre + total / number.clamp(min=1)
    return merged.to(features.dtype)
