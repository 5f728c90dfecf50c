"""VScan: *Rethinking Visual Token Reduction for Efficient Large Vision-Language Models* (arXiv 2505.22654).

Authors' code: Tencent/SelfEvolvingAgent, folder VScan, commit a82450e. Of every image, from a budget of T tokens:

    local    in each window of 6 × 6 patches the floor(floor(T / 2) / windows) of highest attention of CLS in an early
             vision block (``early``, of 24)
    global   of the others the T - floor(T / 2) of highest attention of CLS in the block whose output the model uses
    merge    behind the projector: every other token goes to the kept one of highest cosine, and each kept one becomes
             the mean of itself and those that went to it; in the order of the image, with new positions
    cut      at the input of decoder layer 16: of the row's visual tokens those stay to which its last token would
             attend most in that layer, mean over heads, again with new positions

An image of 24 × 24 patches has 16 windows: of T = 96 tokens 48 are local and 48 global; at layer 16 32 are left, which
is 64 over 32 layers. Where halves do not divide by the windows fewer are kept (98 of 100), as in the code, and T below
one patch for each window and half, where it fails, is refused. With T = all nothing is chosen or merged. ``counts`` are
the tokens an image left by each of ``cuts``: by default a third of T, a ninth …, as in the published settings.

The authors' cut looks for the last token behind one image and never touches a second one; here all visual tokens of the
row compete for counts times images.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..engine.contract import Forward, HookPoint, Merge
from .base import Budgeted, Layered, OnPatches, Ranked, RankedForward, top
from .clusters import pooled
from .pieces import columns, cosine, last_token_attention, needs_cls, per_image, pick, precise
from .registry import register

if TYPE_CHECKING:
    from ..engine.contract import Geometry, LayerView, TokenLayout, VisionGeometry, VisionView


@register("vscan", "VScan", paper="2505.22654", source="Tencent/SelfEvolvingAgent@a82450e")
class VScan(OnPatches, Layered, Ranked, Budgeted):
    """Keep what CLS attends to, in windows and globally, merge the rest into it, and cut again inside the decoder."""

    hook_points = ("projector", "decoder")
    by_unit = True
    positions = "renumber"
    examples = (
        "keep=0.5,window=2,layers=scaled",
        "keep=0.8,window=2,cuts=8+24,counts=7+3,layers=scaled,positions=keep",
        "keep=0.6,window=4,cuts=,layers=scaled",
    )
    everything = "keep=1,window=2,cuts=,layers=scaled"

    early: int = 5
    window: int = 6
    cuts: tuple[int, ...] = (16,)
    counts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.early >= 0, "early, a vision block, must be >= 0")
        self.require(self.window >= 1, "window, the side of a window in patches, must be >= 1")
        self.require(
            list(self.cuts) == sorted(self.cuts) and min(self.cuts, default=1) >= 1, "cuts must rise from 1 on"
        )
        cuts, counts = len(self.cuts), len(self.counts)
        self.require(counts in (0, cuts), f"{cuts} cuts need as many counts, not {counts}")
        self.require(min(self.counts, default=0) >= 0, "counts must be >= 0")

    def check(self, geometry: Geometry) -> None:
        needs_cls(self, geometry)
        self.check_images(geometry)
        self.check_block("early", self.early, geometry)
        self.check_layers("cuts", self.cuts, geometry)
        if geometry.vision is None:
            return
        grid, patches = geometry.vision.grid, geometry.vision.tokens
        self.require(grid % self.window == 0, f"window={self.window} does not divide a grid of {grid} × {grid} patches")
        least, budget = 2 * (grid // self.window) ** 2, per_image(self, patches)
        self.require(
            budget >= least, f"{budget} tokens an image are too few for a choice in every window: give {least} or more"
        )

    def split(self, vision: VisionGeometry) -> tuple[int, int]:
        """Tokens of each window and global ones of an image."""
        half = per_image(self, vision.tokens) // 2
        return half // (vision.grid // self.window) ** 2, per_image(self, vision.tokens) - half

    def left(self, layout: TokenLayout, geometry: Geometry) -> dict[int, Tensor]:
        vision = geometry.vision
        assert vision is not None
        budget, (local, spread) = per_image(self, vision.tokens), self.split(vision)
        chosen = local * (vision.grid // self.window) ** 2 + spread if budget < vision.tokens else vision.tokens
        counts = self.counts or [budget // 3**cut for cut in range(1, 1 + len(self.cuts))]
        left = {0: chosen}
        for cut, count in zip(self.cuts, counts, strict=True):
            left[self.at(cut, geometry)] = min(count, *left.values())
        return {layer: layout.visual.host_counts // vision.tokens * count for layer, count in left.items()}

    def blocks_read(self, vision: VisionGeometry) -> tuple[int, ...]:
        return self.block_at(self.early, vision), -1

    @property
    def scored_at(self) -> HookPoint:
        return "decoder"

    def score(self, view: LayerView) -> Tensor:
        return last_token_attention(view, view.preview())

    def begin(self, layout: TokenLayout, geometry: Geometry) -> Forward:
        left = self.left(layout, geometry)
        return VScanForward(self, {layer: count for layer, count in left.items() if layer > 0})


class VScanForward(RankedForward):
    """One prefill."""

    method: VScan

    def projected(self, view: VisionView) -> Merge | None:
        images, patches, size = view.projected.shape
        if per_image(self.method, patches) == patches:
            return None
        local, spread = self.method.split(view.vision)
        across = view.grid[1] // self.method.window
        early, late = (view.cls_weights(block).mean(1) for block in self.method.blocks_read(view.vision))
        mask = in_windows(early, across, self.method.window, local)
        mask = mask | top(late, torch.full((images,), spread, device=late.device), ~mask)
        kept = columns(mask, across**2 * local + spread)
        view.scored(2 * kept.shape[1] * patches * size)
        merged = absorbed(precise(view.projected), kept).to(view.projected.dtype)
        return Merge(mask, replaced=view.projected.scatter(1, kept[..., None].expand_as(merged), merged))


def in_windows(scores: Tensor, across: int, side: int, count: int) -> Tensor:
    """Bool (N, P): the ``count`` highest ``scores`` (N, P) in each of ``across``² windows of ``side``² patches."""
    windows = scores.view(-1, across, side, across, side).transpose(2, 3).flatten(3).flatten(0, 2)
    every = torch.ones_like(windows, dtype=torch.bool)
    chosen = top(windows, torch.full((len(windows),), count, device=scores.device), every)
    return chosen.view(-1, across, across, side, side).transpose(2, 3).reshape_as(scores)


def absorbed(tokens: Tensor, kept: Tensor) -> Tensor:
    """(N, n, D): means of the ``kept`` tokens, int (N, n), with all others of (N, P, D) that are most like them."""
    nearest = cosine(tokens, pick(tokens, kept)).argmax(2)
    place = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    return pooled(tokens, nearest.scatter(1, kept, place), kept.shape[1], mean=True)
