"""SparseVLM: *Visual Token Sparsification for Efficient Vision-Language Model Inference* (arXiv 2410.04417).

Authors' code: Gumpest/SparseVLMs, commit 26a5f48, version 1 (v1.5 of the paper).

    raters, once, from the input embeddings: a text token behind the image is one if its share in
        softmax over text (H_visual · H_textᵀ), mean over visual tokens, is above the mean over text tokens
    in layers l of ``after`` (2, 6, 15): s_j = mean over heads and raters of their attention to visual token j
    on the output of layer l:
        keep the visual tokens of highest s_j, in order: a fixed number (at most all but one)
        recycle the best of the n dropped ones, floor(0.3 n) + 1 = m of them, in c = floor(m / 10) + 1 clusters
            (DPC-kNN, k = c), and append the mean of each cluster behind the visual tokens, as one of them from then on
        number the positions anew from 0

``tokens`` names a fixed list by the authors' nominal budget, which is not the number that is left at the end;
``counts`` gives another list. Both are numbers of tokens whatever the prompt holds; ``out_of=576`` makes them shares.

The paper instead deletes λ · (V - rank(P)) tokens, P being the attention of raters to visual tokens, and sums clusters:
``rank="paper", scale=λ`` and ``merge="sum"``. The code's first release (91fb6d9) kept floor(13.5 · rank(P)), or all if
P has full rank, behind layers 2, 6, 15 and 19: ``rank="release"``. (The singular values make the host wait.)
The code adds unseeded noise of 1e-6 to densities; here its numbers depend on the row's inputs alone.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..engine.contract import Forward, Keep, Knob, Merge
from .base import MAGNITUDES, Layered, floored, top
from .clusters import density_peaks, pooled
from .pieces import added_need_renumbering, interpolated, matrix_rank, pick, precise, share
from .random import draw
from .registry import register

if TYPE_CHECKING:
    from ..engine.contract import AttentionView, Geometry, LayerView, TokenLayout

LISTS = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
PATCHES = 576  # out of which they are


def between(nominal: float) -> dict[str, Any]:
    """Options for any ``nominal`` budget out of 576: counts between those of the fixed lists."""
    ends = {0: (0,) * 3, PATCHES: (PATCHES,) * 3}
    return {"counts": tuple(interpolated(LISTS | ends, nominal)), "out_of": PATCHES}


@register("sparsevlm", "SparseVLM", paper="2410.04417", source="Gumpest/SparseVLMs@26a5f48")
class SparseVLM(Layered):
    """Keep the visual tokens that the most image-related text attends to, and merge some of the others, in stages."""

    hook_points = ("attention", "decoder")
    positions = "renumber"
    examples = (
        "tokens=192,out_of=576,layers=scaled",
        "counts=9+5+2,after=0+2+6",
        "counts=9+5,after=2+6,recycle=0,positions=keep",
        "tokens=192,out_of=576,layers=scaled,cluster_size=2,merge=sum",
        "rank=release,scale=1.5,after=1+4,cluster_size=1",
        "rank=paper,scale=0.8,layers=scaled",
    )
    everything = "rank=paper,scale=0,layers=scaled"
    knobs = (
        Knob(
            "counts",
            lambda visual_tokens, geometry: range(PATCHES + 1),
            replaces=("tokens", "rank", "out_of"),
            options=lambda nominal, given: between(nominal),
        ),
        Knob("scale", lambda visual_tokens, geometry: MAGNITUDES, replaces=("tokens", "counts", "out_of")),
    )

    tokens: int | None = None
    counts: tuple[int, ...] = ()
    rank: Literal["", "release", "paper"] = ""
    scale: float = 13.5
    bias: float = 0.0
    out_of: int | None = None
    after: tuple[int, ...] = (2, 6, 15)
    recycle: float = 0.3
    cluster_size: int = 10
    merge: Literal["mean", "sum"] = "mean"
    noise: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        known = ", ".join(map(str, LISTS))
        one = (self.tokens is not None) + bool(self.counts) + bool(self.rank) == 1
        self.require(one, f"give exactly one of tokens=({known}), counts=NUMBERS or rank='release' or 'paper'")
        self.require(self.tokens is None or self.tokens in LISTS, f"tokens must be one of {known}, not {self.tokens}")
        self.require(self.rank in ("", "release", "paper"), f"rank must be 'release' or 'paper', not {self.rank!r}")
        self.require(self.rank != "paper" or 0 <= self.scale <= 1, "rank='paper' needs a scale in [0, 1]")
        fits = bool(self.rank) or len(self.after) == len(self.schedule)
        self.require(fits, f"{len(self.after)} layers in after need as many counts, not {len(self.schedule)}")
        self.require([0, *self.after] == sorted((0, *self.after)), "after must rise, from 0 on")
        self.require(min(self.schedule, default=0) >= 0, "counts must be >= 0")
        self.require(self.out_of is None or self.out_of >= max(self.schedule, default=1), "out_of is less than a count")
        self.require(0 <= self.recycle <= 1, f"recycle must lie in [0, 1], not {self.recycle}")
        self.require(self.cluster_size >= 1, "cluster_size must be >= 1")
        self.require(self.merge in ("mean", "sum"), f"merge must be 'mean' or 'sum', not {self.merge!r}")
        if self.recycle:
            added_need_renumbering(self, "positions='keep' needs recycle=0")

    @property
    def schedule(self) -> tuple[int, ...]:
        """Visual tokens kept behind each layer of ``after``; empty under the rank rule."""
        return self.counts if self.tokens is None else LISTS[self.tokens]

    def check(self, geometry: Geometry) -> None:
        self.check_layers("after", self.after, geometry)

    def left(self, layout: TokenLayout, geometry: Geometry) -> dict[int, Tensor] | None:
        if self.rank:
            return None
        now, left = layout.visual.host_counts, {}
        for cut, layer in enumerate(self.after):
            kept = self.kept(cut, layout.visual.host_counts, now)
            now = kept + self.recycled(now - kept)[1] if self.recycle else kept
            left[self.at(layer, geometry) + 1] = now
        return left

    def keeps_all(self, layout: TokenLayout, geometry: Geometry) -> bool:
        return (self.rank == "paper" and self.scale == 0) or super().keeps_all(layout, geometry)

    def kept(self, cut: int, prompt: Tensor, now: Tensor) -> Tensor:
        """Int (B,): visual tokens to keep at a cut, of those there are ``now`` and were in the ``prompt``."""
        return (now - 1).clamp(max=share(self.schedule[cut], self.out_of, prompt)).clamp(min=0)

    def recycled(self, dropped: Tensor) -> tuple[Tensor, Tensor]:
        """Of the ``dropped`` tokens, int (B,): how many are recycled, and in how many clusters."""
        used = torch.where(dropped > 0, floored(dropped, self.recycle) + 1, 0).minimum(dropped)
        return used, (used // self.cluster_size + 1).minimum(used)

    def begin(self, layout: TokenLayout, geometry: Geometry) -> Forward:
        return SparseVLMForward(self, layout, [self.at(layer, geometry) for layer in self.after])


class SparseVLMForward(Forward):
    """State of one prefill: the raters, bool (B, T) over the text tokens, their latest attention (B, T, V), and how
    many ``rating`` there are, (B, 1), one at least."""

    raters: Tensor
    rating: Tensor
    relation: Tensor

    def __init__(self, method: SparseVLM, layout: TokenLayout, after: list[int]) -> None:
        self.method, self.prompt, self.after = method, layout.visual, after

    def attention(self, layer: int, view: AttentionView) -> None:
        if layer in self.after:
            visual, text = view.layout.visual, view.layout.text
            relation = torch.cat([visual.pick(weights.mean(1), 2) for weights, _ in view.scan(text)], dim=1)
            raters = self.raters[:, :, None]
            self.relation = relation * (raters if visual.is_even else raters & view.present[:, None])

    def layer_input(self, layer: int, view: LayerView) -> Keep | Merge | None:
        if layer == 0:
            self.raters = find_raters(view)
            self.rating = self.raters.sum(1, keepdim=True).clamp(min=1)
        if layer - 1 not in self.after:
            return None
        scores = self.relation.sum(1) / self.rating
        number, fewest = self.budget(self.after.index(layer - 1), view)
        keep = top(scores, number, view.present)
        return self.recycle(scores, keep, fewest, view) if self.method.recycle else Keep(keep)

    def budget(self, cut: int, view: LayerView) -> tuple[Tensor, list[int]]:
        """Visual tokens to keep, int (B,), and a number for each row, on the host, that this is not below."""
        method, visual = self.method, view.layout.visual
        if not method.rank:
            most = partial(share, method.schedule[cut], method.out_of)
            exact = [max(0, min(most(n), now - 1)) for n, now in zip(self.prompt.counts, visual.counts, strict=True)]
            return torch.tensor(exact).to(view.hidden.device, non_blocking=True), exact
        there = visual.device_counts
        rank = matrix_rank(self.relation, self.raters.sum(1), there)
        if method.rank == "paper":
            return there - floored(there - rank, method.scale), [0] * len(visual.counts)
        some = (rank.double() * method.scale + method.bias).long().clamp(min=0).minimum(there - 1)
        return torch.where(rank == there, rank, some), [0] * len(visual.counts)

    def recycle(self, scores: Tensor, keep: Tensor, fewest: list[int], view: LayerView) -> Merge:
        """Merge the best of the dropped tokens into new ones."""
        method, device = self.method, scores.device
        # Shapes come from the host: as many as the row could drop at most, which is what it drops but under a rank.
        room = [n - least for n, least in zip(view.layout.visual.counts, fewest, strict=True)]
        room = [min(n, int(method.recycle * n + 1e-9) + 1) for n in room]
        centres = [min(n, n // method.cluster_size + 1) for n in room]
        width, most = max(room), max(centres)
        if method.rank:
            used, clusters = method.recycled(view.layout.visual.device_counts - keep.sum(1))
        else:
            used, clusters = torch.tensor([room, centres]).to(device, non_blocking=True)
        view.scored(torch.tensor([n * (n + c) for n, c in zip(room, centres, strict=True)]) * view.hidden.shape[2])

        gone = keep if view.layout.visual.is_even else keep | ~view.present
        best = scores.masked_fill(gone, -torch.inf).argsort(dim=1, descending=True, stable=True)[:, :width]
        tokens, present = precise(pick(view.hidden, best)), torch.arange(width, device=device) < used[:, None]
        noise = draw(view.layout.fingerprint + view.layer, width) * method.noise
        _, cluster = density_peaks(tokens, present, clusters, most, noise.to(tokens.dtype))
        merged = pooled(tokens, cluster.masked_fill(~present, -1), most, mean=method.merge == "mean")
        return Merge(keep, added=merged, added_present=torch.arange(most, device=device) < clusters[:, None])


def find_raters(view: LayerView) -> Tensor:
    """Bool (B, T): the text tokens to which the visual ones are drawn more than to the average one; all if none is."""
    visual, text = view.layout.visual, view.layout.text
    likeness = precise(view.hidden) @ precise(text.pick(view.tokens, 1)).transpose(1, 2)
    view.scored(torch.tensor([v * t for v, t in zip(visual.counts, text.counts, strict=True)]) * view.hidden.shape[2])
    share = likeness.masked_fill(~text.present[:, None], -torch.inf).softmax(2) * view.present[:, :, None]
    share = (share.sum(1) / visual.device_counts.clamp(min=1)[:, None]).masked_fill(~text.present, 0)
    raters = (share > share.sum(1, keepdim=True) / text.device_counts.clamp(min=1)[:, None]) & text.present
    return torch.where(raters.any(1, keepdim=True), raters, text.present)
