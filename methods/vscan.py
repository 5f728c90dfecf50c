"""VScan: *Rethinking Visual Token Reduction for Efficient Large Vision-Language Models* (arXiv 2505.22654).

Authors' code: Tencent/SelfEvolvingAgent, folder VScan, commit a82450e. Of every image, from a budget of T tokens:

    local    of the floor(T / 2) of highest attention of CLS in an early vision block (``early``, of 24) at most
             floor(floor(T / 2) / windows) in each window of 6 × 6 patches
    global   of the others the T - floor(T / 2) of highest attention of CLS in the block whose output the model uses
    merge    behind the projector: every other token goes to the kept one of highest cosine, and each kept one becomes
             the mean of itself and those that went to it; in the order of the image, with new positions
    cut      at the input of decoder layer 16: of the row's visual tokens those stay to which its last token would
             attend most in that layer, mean over heads, again with new positions

An image of 24 × 24 patches has 16 windows: of T = 96 tokens 48 are local and 48 global; at layer 16 32 are left, which
is 64 over 32 layers. Where halves do not divide by the windows fewer are kept (98 of 100), as in the code; where they
are less than the windows, so that the code fails, one is taken in each of as many. With T = all nothing is chosen or
merged. ``counts`` are the tokens an image left by each of ``cuts``: by default a third of T, a ninth …, as in the
published settings.

Their code for Qwen2.5-VL says what happens to images of any shape: there are floor(rows / side) · floor(columns / side)
windows, the last ones with what is over; a window's share of the half is rounded up (``quota=ceil``), so that all of it
is used; patches count by the attention that they receive (``attention=received``), in the first block with full
attention and in the last one. It has ``window=4``, ``cuts=14`` of 28, a cut to 0.333 of the tokens, and keeps their
positions (``positions=keep``). What it leaves out is in here: the rotation of the queries and keys that decide about
the cut. Each tile of an image that the model cuts into tiles has the same budget, and ``counts`` are those of the whole
image; patches of padding count like others (``unpad=false``), and there are no newlines (``newlines=drop``).

The authors' cut looks for the last token behind one image and never touches a second one; here all visual tokens of the
row compete for counts times images.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..engine.contract import Forward, HookPoint, ImageShape, Merge
from .base import LATER, Budgeted, Layered, OnPatches, Ranked, RankedForward, Salient, top
from .clusters import pooled
from .pieces import columns, cosine, last_token_attention, per_image, pick, precise
from .registry import register

if TYPE_CHECKING:
    from ..engine.contract import Geometry, Grid, LayerView, TokenLayout, VisionGeometry, VisionView

Quota = Literal["floor", "ceil"]


@register("vscan", "VScan", paper="2505.22654", source="Tencent/SelfEvolvingAgent@a82450e")
class VScan(Salient, OnPatches, Layered, Ranked, Budgeted):
    """Keep what CLS attends to, in windows and globally, merge the rest into it, and cut again inside the decoder."""

    hook_points = ("projector", "decoder")
    by_unit = True
    positions = "renumber"
    newlines, unpad = "drop", False
    examples = (
        "keep=0.5,window=2,layers=scaled",
        "keep=0.8,window=2,cuts=8+24,counts=7+3,layers=scaled,positions=keep",
        "keep=0.6,window=4,cuts=,layers=scaled",
        "keep=0.7,window=3,quota=ceil,layers=scaled",
    )
    everything = "keep=1,window=2,cuts=,layers=scaled,newlines=keep,unpad=true"

    early: int = 5
    window: int = 6
    cuts: tuple[int, ...] = (16,)
    counts: tuple[int, ...] = ()
    quota: Quota = dataclasses.field(default="floor", metadata=LATER)

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
        self.require(self.quota in get_args(Quota), "quota must be 'floor' or 'ceil'")

    def check(self, geometry: Geometry) -> None:
        super().check(geometry)
        self.check_block("early", self.early, geometry)
        self.check_layers("cuts", self.cuts, geometry)
        if self.attention == "received":
            self.check_full_block("early", self.early, geometry)
        if geometry.vision is not None and geometry.vision.tokens:
            self.split(geometry.vision.shape)

    def split(self, grid: Grid) -> tuple[int, int, int]:
        """Of a unit at most so many in a window, so many of all windows, and so many of the others."""
        budget = per_image(self, prod(grid))
        self.require(budget >= 1, "the budget must be at least 1 token of each image")
        sizes, half = windows(grid, self.window), budget // 2
        quota = max((half if self.quota == "floor" else half + len(sizes) - 1) // len(sizes), 1)
        return quota, min(sum(min(quota, size) for size in sizes), half), budget - half

    def unit_left(self, grid: Grid) -> int:
        if per_image(self, prod(grid)) == prod(grid):
            return prod(grid)
        return sum(self.split(grid)[1:])

    def image_counts(self, image: ImageShape) -> list[int]:
        """Tokens of an image that enter the decoder, and those that each cut leaves of it."""
        budget = sum(per_image(self, prod(grid)) for grid in self.shown(image))
        left = [self.image_left(image)]
        for count in self.counts or [budget // 3**cut for cut in range(1, 1 + len(self.cuts))]:
            left.append(min(count, left[-1]))
        return left

    def left(self, layout: TokenLayout, geometry: Geometry) -> dict[int, Tensor] | None:
        images = self.images(layout, geometry)
        if images is None:
            return None
        rows = [[self.image_counts(image) for image in row] for row in images]
        layers = 0, *(self.at(cut, geometry) for cut in self.cuts)
        return {
            layer: torch.tensor([sum(image[at] for image in row) for row in rows]) for at, layer in enumerate(layers)
        }

    def blocks_read(self, vision: VisionGeometry) -> tuple[int, ...]:
        return (self.block_at(self.early, vision), -1) if self.attention == "cls" else ()

    def blocks_received(self, vision: VisionGeometry) -> tuple[int, ...]:
        return (self.block_at(self.early, vision), vision.last_full) if self.attention == "received" else ()

    @property
    def scored_at(self) -> HookPoint:
        return "decoder"

    def score(self, view: LayerView) -> Tensor:
        return last_token_attention(view, view.preview())

    def begin(self, layout: TokenLayout, geometry: Geometry) -> Forward:
        left = self.left(layout, geometry) or {}
        return VScanForward(self, {layer: count for layer, count in left.items() if layer > 0})


class VScanForward(RankedForward):
    """One prefill."""

    method: VScan

    def projected(self, view: VisionView) -> Merge | None:
        method, vision = self.method, view.vision
        units, patches, size = view.projected.shape
        if per_image(method, patches) == patches:
            return None
        quota, local, spread = method.split(view.grid)
        blocks = method.blocks_read(vision) or method.blocks_received(vision)
        early, late = (method.salience(view, block) for block in blocks)
        numbers = (torch.full((units,), count, device=late.device) for count in (local, spread))
        mask = top(early, next(numbers), in_windows(early, view.grid, method.window, quota))
        mask = mask | top(late, next(numbers), ~mask)
        kept = columns(mask, local + spread)
        view.scored(2 * kept.shape[1] * patches * size)
        merged = absorbed(precise(view.projected), kept).to(view.projected.dtype)
        replaced = view.projected.scatter(1, kept[..., None].expand_as(merged), merged)
        return Merge(mask, replaced=replaced, counts=(local + spread,) * units)


def windows(grid: Grid, side: int) -> list[int]:
    """How many tokens of a ``grid`` lie in each of the windows of ``side``; the last ones have what is over."""
    frames, *sides = grid
    tall, wide = ([side] * (length // side - 1) + [length - max(length // side - 1, 0) * side] for length in sides)
    return [rows * across for rows in tall for across in wide] * frames


@lru_cache(maxsize=64)
def _places(grid: Grid, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Int (P,): the window of each token; and for tokens sorted by window their numbers in it, from 0 on."""
    frames, *sides = (np.arange(length) for length in grid)
    row, column = (np.minimum(places // side, max(len(places) // side - 1, 0)) for places in sides)
    window = (frames[:, None, None] * len(row) + row[:, None]) * len(column) + column
    place = np.concatenate([np.arange(size) for size in windows(grid, side)])
    with torch.inference_mode(mode=False):
        return torch.from_numpy(window.flatten()).to(device), torch.from_numpy(place).to(device)


def in_windows(scores: Tensor, grid: Grid, side: int, count: int) -> Tensor:
    """Bool (N, P): the ``count`` highest ``scores`` (N, P), on a ``grid``, in each of the windows of ``side``."""
    window, place = _places(grid, side, scores.device)
    by_score = scores.argsort(dim=1, descending=True, stable=True)
    by_window = by_score.gather(1, window[by_score].argsort(dim=1, stable=True))
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, by_window, (place < count).expand(scores.shape))


def absorbed(tokens: Tensor, kept: Tensor) -> Tensor:
    """(N, n, D): means of the ``kept`` tokens, int (N, n), with all others of (N, P, D) that are most like them."""
    nearest = cosine(tokens, pick(tokens, kept)).argmax(2)
    place = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    return pooled(tokens, nearest.scatter(1, kept, place), kept.shape[1], mean=True)
