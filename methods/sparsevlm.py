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
The code adds unseeded noise of 1e-6 to densities; here its numbers depend on the layer and the place alone.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..engine.contract import Forward, Knob, Ranking
from .base import MAGNITUDES, Layered, floored
from .clusters import density_peaks, pooled
from .pieces import added_need_renumbering, interpolated, matrix_rank, pick, precise, share
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
        now, left = [*layout.visual.counts], {}
        for cut, layer in enumerate(self.after):
            kept = [self.kept(cut, *row) for row in zip(layout.visual.counts, now, strict=True)]
            now = [k + self.recycled(n - k)[1] for k, n in zip(kept, now, strict=True)]
            left[self.at(layer, geometry) + 1] = torch.tensor(now)
        return left

    def keeps_all(self, layout: TokenLayout, geometry: Geometry) -> bool:
        return (self.rank == "paper" and self.scale == 0) or super().keeps_all(layout, geometry)

    def kept(self, cut: int, prompt: int, now: int) -> int:
        """Visual tokens to keep at a cut, of those there are ``now`` and were in the ``prompt``."""
        return max(0, min(share(self.schedule[cut], self.out_of, prompt), now - 1))

    def recycled(self, dropped: int) -> tuple[int, int]:
        """How many of the ``dropped`` tokens are recycled, and in how many clusters."""
        if not self.recycle:
            return 0, 0
        used = min(dropped, int(self.recycle * dropped + 1e-9) + 1)
        return used, min(used, used // self.cluster_size + 1)

    def begin(self, layout: TokenLayout, geometry: Geometry) -> Forward:
        return SparseVLMForward(self, layout, [self.at(layer, geometry) for layer in self.after])


class SparseVLMForward(Forward):
    """State of one prefill: the raters, bool (B, T) over the text tokens, how many there are, (B, 1), one at least,
    and their latest attention (B, T, V)."""

    raters: Tensor
    rating: Tensor
    relation: Tensor

    def __init__(self, method: SparseVLM, layout: TokenLayout, after: list[int]) -> None:
        self.method, self.prompt, self.after = method, layout.visual, after

    def attention(self, layer: int, view: AttentionView) -> None:
        if layer in self.after:
            visual, text = view.layout.visual, view.layout.text
            blocks = [visual.pick(weights.mean(1), 2) for weights, _ in view.scan(text)]
            raters = self.raters[:, :, None]
            raters = raters if visual.is_even else raters & view.present[:, None]
            self.relation = (blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)) * raters

    def layer_input(self, layer: int, view: LayerView) -> Ranking | None:
        if layer == 0:
            self.raters = find_raters(view)
            self.rating = self.raters.sum(1, keepdim=True).clamp(min=1)
        if layer - 1 not in self.after:
            return None
        scores = self.relation.sum(1) / self.rating
        best = Ranking.of(scores, self.left(self.after.index(layer - 1), view), view.layout.visual)
        gone = [n - kept for n, kept in zip(view.layout.visual.counts, best.counts, strict=True)]
        used = [self.method.recycled(n) for n in gone]
        return self.recycle(scores, best, used, view) if any(gone) and self.method.recycle else best

    def left(self, cut: int, view: LayerView) -> list[int]:
        """Visual tokens to keep in each row."""
        method, visual = self.method, view.layout.visual
        if not method.rank:
            counts = zip(self.prompt.counts, visual.counts, strict=True)
            return [method.kept(cut, prompt, now) for prompt, now in counts]
        there = visual.device_counts
        rank = matrix_rank(self.relation, self.raters.sum(1), there)
        if method.rank == "paper":
            return view.ask(there - floored(there - rank, method.scale))
        some = (rank.double() * method.scale + method.bias).long().clamp(min=0).minimum(there - 1)
        return view.ask(torch.where(rank == there, rank, some))

    def recycle(self, scores: Tensor, best: Ranking, used: list[tuple[int, int]], view: LayerView) -> Ranking:
        """Merge the ``best`` of the dropped tokens into new ones: in each row how many, into how many."""
        method, most = self.method, max(used)
        macs = [n * (n + clusters) * view.hidden.shape[2] for n, clusters in used]
        view.scored(macs, sum(macs))
        noise = draw(view.layer, most[0]).to(scores) * method.noise

        def merged(rows: slice, kept: int, tokens: int, clusters: int) -> Tensor:
            """(N, clusters, D), of rows that hold the same numbers."""
            recycled = precise(pick(view.hidden[rows], best.order[rows, kept : kept + tokens]))
            _, cluster = density_peaks(recycled, clusters, noise[:, :tokens])
            return pooled(recycled, cluster, clusters, mean=method.merge == "mean")

        if len({*zip(best.counts, used, strict=True)}) == 1:
            return best.adding(merged(slice(None), best.counts[0], *most))
        rows = [
            merged(slice(row, row + 1), kept, *n)[0] if any(n) else view.hidden[row, :0]
            for row, (kept, n) in enumerate(zip(best.counts, used, strict=True))
        ]
        return best.adding(pad_sequence(rows, batch_first=True), tuple(clusters for _, clusters in used))


def find_raters(view: LayerView) -> Tensor:
    """Bool (B, T): the text tokens to which the visual ones are drawn more than to the average one; all if none is."""
    visual, text = view.layout.visual, view.layout.text
    counts, size = zip(visual.counts, text.counts, strict=True), view.hidden.shape[2]
    view.scored([v * t * size for v, t in counts])
    likeness = torch.bmm(precise(view.hidden), precise(text.pick(view.tokens, 1)).transpose(1, 2))
    share = likeness.masked_fill(~text.present[:, None], -torch.inf).softmax(2) * view.present[:, :, None]
    share = (share.sum(1) / visual.device_counts.clamp(min=1)[:, None]).masked_fill(~text.present, 0)
    raters = (share > share.sum(1, keepdim=True) / text.device_counts.clamp(min=1)[:, None]) & text.present
    return torch.where(raters.any(1, keepdim=True), raters, text.present)


def draw(layer: int, count: int) -> Tensor:
    """Uniform numbers in [0, 1), fp64 (1, count), on the host: those of Python's generator, alike on all machines."""
    generator = Random(layer)
    return torch.tensor([[generator.random() for _ in range(count)]], dtype=torch.float64)
