"""FlowCut: *Rethinking Redundancy via Information Flow for Efficient Vision-Language Models* (arXiv 2505.19536).

Authors' code: TungChintao/FlowCut, commit a2ecd24. Inside the vision tower, behind the MLP of each block up to the one
before the features', F, while an image has more than its budget of T patches:

    c_j  = attention of CLS to patch j in the block, mean over heads, as a share of that on all patches there
    s_j  = softmax of (v_CLS · v_j) over all tokens, mean over heads, v the block's values; again as a share
    e_j  = (c_j + s_j) · L1 norm of the mean over heads of v_j
    score_j = half the score of the block before and half of e_j; in the first block e_j
    cut  every other block, F among them: of the N patches there round((N - T) / √(F - block) · (1 - (H / ln N)²)) of
         lowest score leave, but T at least stay; H: the entropy of c. In block F all but T leave.

So attention that is spread over all patches slows the cuts down. The features of the T patches that are left enter the
projector in their order in the image, with new positions: T of every image, from decoder layer 0 on.

The authors drop from all images of a batch as many as from the one that loses most, so that an image's patches depend
on those beside it; here each image keeps its own pace. One number of each image is read back at every cut.

Where a model makes each token of a square of patches behind the tower, the budget is T times as many patches. What is
left is single patches, square by square, and those that follow one another make a token, with a new position.

``query="mean"``, for towers without CLS, is the authors' program for Qwen2-VL (commit 9df269f): c is the mean over
heads of what the mean of all patches' queries pays to each patch, e_j is c_j times that norm, with no part by values;
c is taken plus 1e-7 in the logarithm of H, and F is the features' block itself, in front of the projector. Patches of
padding within a tile ask nothing and get nothing, so that they leave first.

That program goes on in the decoder, at layer 2; here with ``cut=K``, in towers with CLS and without alike. The
tower then leaves ``tower_factor`` · T tokens, there twice the T by which they print results, and

    at decoder layer K - 1, for the prompt's last token with query q and value v, heads repeated for grouped keys
               r_j = softmax of (q · k_j) over the visual tokens alone, scaled as in the layer, mean over heads
               s_j = the same of (v · v_j)
    at the input of layer K:  keep the T tokens of highest (r_j + s_j) · L1 norm of the mean over heads of v_j, in order

The authors have one image; here all visual tokens of a row compete for as many places as its images have in their
budgets together, and newlines that stay add theirs. ``positions=keep`` is how they count: text keeps its positions, and
where squares of patches make a token the n that are left of an image get those of its first n. So their setting on
Qwen2-VL is ``query=mean,cut=2,positions=keep``.
"""

from __future__ import annotations

import dataclasses
import math
from math import prod
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from ..engine.contract import BlockCut, Forward, Ranking
from .base import LATER, Budgeted, OnImages
from .grids import AT_LEAST
from .pieces import added_need_renumbering, per_image, precise
from .registry import register

if TYPE_CHECKING:
    from ..engine.contract import BlockView, Geometry, Grid, LayerView, TokenLayout, VisionGeometry


Query = Literal["cls", "mean"]


@register("flowcut", "FlowCut", paper="2505.19536", source="TungChintao/FlowCut@a2ecd24")
class FlowCut(OnImages, Budgeted):
    """Drop patches block by block inside the vision tower, by what CLS reads of them, faster where it is sure."""

    hook_points = ("tower", "decoder")
    block_part = "mlp"
    positions = "renumber"
    unpad = False
    vision_blocks = ()
    examples = (
        "keep=0.5",
        "tokens=3,positions=keep",
        "tokens=5,query=mean",
        "tokens=5,cut=2,positions=keep",
        "keep=0.2,query=mean,cut=1,tower_factor=3.5",
    )

    query: Query = dataclasses.field(default="cls", kw_only=True, metadata=LATER)
    cut: int | None = dataclasses.field(default=None, kw_only=True, metadata=LATER)
    tower_factor: float = dataclasses.field(default=2.0, kw_only=True, metadata=LATER)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.query in get_args(Query), "query must be 'cls' or 'mean'")
        self.require(self.cut is None or self.cut >= 1, "cut must be >= 1: the layer before it is read")
        self.require(self.tower_factor >= 1, "tower_factor, how often the budget the tower leaves, must be >= 1")
        counts = self.cut is not None or self.tower_factor == type(self).tower_factor
        self.require(counts, "tower_factor is for a later cut in the decoder: give cut=LAYER, or another budget")

    def check(self, geometry: Geometry) -> None:
        super().check(geometry)
        vision = geometry.vision
        if vision is None:
            return
        self.require(
            vision.has_cls or self.query == "mean",
            "scores patches by the attention of the CLS token, and this model's vision tower has none: "
            "use query='mean', or a method without it, such as divprune or pooling",
        )
        if self.cut is not None:
            self.check_layers("cut", (self.cut,), geometry)
        if vision.tiled:
            added_need_renumbering(self)  # patches of padding may stay
        self.require(vision.tokens > 0 or 0 not in (self.tokens, self.keep), AT_LEAST)
        last = "the features are those of the first vision block, and patches leave before it"
        self.require(self.last_cut(vision) >= 0, last)

    def last_cut(self, vision: VisionGeometry) -> int:
        """The block behind which all but the budget leave."""
        return vision.feature_block - (self.query == "cls")

    def unit_left(self, grid: Grid) -> int:
        budget, tokens = per_image(self, prod(grid)), prod(grid)
        return budget if self.cut is None else min(int(self.tower_factor * budget + 1e-9), tokens)

    def left(self, layout: TokenLayout, geometry: Geometry) -> dict[int, Tensor] | None:
        entered = super().left(layout, geometry)
        if entered is None or self.cut is None:
            return entered
        uncut = dataclasses.replace(self, cut=None, tower_factor=type(self).tower_factor)
        return entered | {self.cut: (uncut.left(layout, geometry) or entered)[0]}

    def begin(self, layout: TokenLayout, geometry: Geometry) -> Forward:
        left = None if self.cut is None else self.left(layout, geometry)
        return Forward() if left is None else FlowCutForward(*left.popitem())

    def block(self, view: BlockView) -> BlockCut | None:
        vision = view.vision
        budget, to_go = self.unit_left(view.grid) * vision.merged, self.last_cut(vision) - view.block
        if to_go < 0 or max(view.counts) <= budget:
            return None
        attention, score = by_cls(view) if self.query == "cls" else by_mean(view)
        score = view.memory = score if view.memory is None else view.memory.lerp(score, 0.5)
        if to_go % 2:
            return None
        entropies = view.read(self.entropy(attention)) if to_go else [0.0] * len(score)
        counts = (left(*one, budget, to_go) for one in zip(view.counts, entropies, strict=True))
        return BlockCut(score, tuple(counts))

    def entropy(self, attention: Tensor) -> Tensor:
        """(N,), of ``attention`` (N, P), as the authors' programs have it."""
        if self.query == "cls":
            return torch.special.entr(attention).sum(1)
        return -(attention * (attention + 1e-7).log()).sum(1)


class FlowCutForward(Forward):
    """One prefill with a cut at the input of layer ``cut``, which leaves as many of each row as ``left``, int (B,)."""

    def __init__(self, cut: int, left: Tensor) -> None:
        self.cut, self.left = cut, left
        self.scores: Tensor | None = None

    def layer_input(self, layer: int, view: LayerView) -> Ranking | None:
        if layer == self.cut - 1:
            self.scores = by_last_token(view)
        if layer != self.cut or self.scores is None:
            return None
        return Ranking.of(self.scores, self.left.tolist(), view.layout.visual)


def by_last_token(view: LayerView) -> Tensor:
    """Scores (B, V) of the visual tokens by what the layer's query and value of the last token have in common."""
    visual, last = view.layout.visual, view.layout.last
    query, key, value, scaling = view.attending()
    heads, groups = query.shape[1], query.shape[1] // key.shape[1]
    values = visual.pick(value, 2)
    view.scored(2 * heads * query.shape[3] * visual.host_counts)

    def share(asks: Tensor, asked: Tensor) -> Tensor:
        logits = precise(asks @ asked.repeat_interleave(groups, dim=1).transpose(2, 3)) * scaling
        return logits.masked_fill(~view.present[:, None, None], torch.finfo(logits.dtype).min).softmax(3).mean((1, 2))

    relation = share(last.pick(query, 2), visual.pick(key, 2))
    semantic = share(last.pick(value, 2).repeat_interleave(groups, dim=1), values)
    return (relation + semantic) * strength(values)


def by_cls(view: BlockView) -> tuple[Tensor, Tensor]:
    """Shares (N, P) of the patches in the attention of CLS, and their scores (N, P) in this block."""
    logits = torch.cat([view.cls_logits(), view.cls_logits("values")], dim=1)
    mass = logits.softmax(2).unflatten(1, (2, -1)).mean(2)[:, :, 1:]
    shares = mass / mass.sum(2, keepdim=True)
    return shares[:, 0], shares.sum(1) * strength(view.values[:, :, 1:])


def by_mean(view: BlockView) -> tuple[Tensor, Tensor]:
    """Attention (N, P) of the mean query to the patches, and their scores (N, P) in this block."""
    attention = view.mean_logits().softmax(2).mean(1)
    return attention, attention * strength(view.values[:, :, int(view.vision.has_cls) :])


def strength(values: Tensor) -> Tensor:
    """(N, P): L1 norm of the mean over heads of ``values`` (N, heads, P, d)."""
    return precise(values).mean(1).norm(p=1, dim=2)


def left(count: int, entropy: float, budget: int, to_go: int) -> int:
    """How many of ``count`` patches stay, ``to_go`` blocks before the last cut, where all but the ``budget`` leave."""
    if to_go == 0 or count <= max(budget, 1):
        return min(count, budget)
    pace = 1 - (entropy / math.log(count)) ** 2
    return max(budget, count - round((count - budget) / math.sqrt(to_go) * pace))
