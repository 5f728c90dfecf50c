"""ToMe: *Token Merging: Your ViT But Faster* (arXiv 2210.09461).

Authors' code: facebookresearch/ToMe, commit af95e4b; theirs is for vision transformers alone. In every block of the
vision tower up to the one whose output the model uses, between attention and MLP:

    A, B        tokens at even and at odd places; CLS, the first, is in A and never merges
    edges       each token of A to the one of B of highest cosine (keys of the block, mean over heads)
    merge       the r best edges: averages weighted by size, the number of patches that a token already stands for
    go on with  the tokens of A that are left, then those of B
    attention   in the blocks that follow, log(size) is added to the logits of each key (proportional attention)

Where the model uses the outputs of several blocks side by side, those of earlier ones are averaged alike, by the edges
and sizes of each block behind them.

r follows from the budget: as even as possible over the blocks, the larger ones first, and never more than half of the
patches that a block is given. The merged features get new positions, in the order of the last block. Without a CLS
token the authors leave the rest of A in order of falling similarity, and so does this.

Where a model makes each token of a square of patches behind the tower, squares merge (ours: the authors have no such
tower). The key of a square is the mean over its patches, too; edges are between squares at even and at odd places, row
by row; patches merge with those at their places in the partner's square, by size; log(size) goes on the keys of all
patches. The squares that are left, in their order, become the tokens. r and halving count squares.

``proportional=False`` leaves out the last line, as the authors do for towers not trained with it.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..engine.contract import BlockMerge
from .base import Budgeted, OnImages
from .grids import AT_LEAST
from .pieces import added_need_renumbering, cosine, per_image
from .registry import register

if TYPE_CHECKING:
    from ..engine.contract import BlockView, Geometry, VisionGeometry


@register("tome", "ToMe", paper="2210.09461", source="facebookresearch/ToMe@af95e4b")
class ToMe(OnImages, Budgeted):
    """Merge the most similar tokens in every block of the vision tower."""

    hook_points = ("tower",)
    positions = "renumber"
    vision_blocks = ()
    examples = ("keep=0.5", "tokens=7,proportional=false")

    proportional: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        added_need_renumbering(self)

    def check(self, geometry: Geometry) -> None:
        super().check(geometry)
        if geometry.vision is not None:
            self.merges(geometry.vision)
            self.require(0 not in (self.tokens, self.keep), AT_LEAST)  # where images have sizes of their own

    def block(self, view: BlockView) -> BlockMerge | None:
        merges = self.merges(view.vision)[view.block]
        if merges == 0:
            return None
        keys = view.token_keys
        width = keys.shape[1]
        view.scored((width + 1) // 2 * (width // 2) * keys.shape[2])
        group, left = matched(keys, merges, first_stays=view.vision.has_cls), width - merges
        return BlockMerge(group, left, self.proportional, partial(stood, group, left))

    def tower_tokens(self, vision: VisionGeometry) -> list[tuple[int, int]]:
        left, patches = vision.patches + vision.has_cls, vision.merged
        return [(left, left := left - merges * patches) for merges in self.merges(vision)]

    def merges(self, vision: VisionGeometry) -> tuple[int, ...]:
        """r of every block, in tokens; none behind the block whose output the model uses.

        Raises :class:`OptionError` where that many cannot merge.
        """
        tokens, budget, blocks = vision.tokens, per_image(self, vision.tokens), vision.feature_block + 1
        self.require(
            budget >= (least := fewest(tokens, blocks)),
            f"each of {blocks} vision blocks can at most halve the {tokens} tokens: "
            f"the budget must be at least {least} tokens an image",
        )
        return schedule(tokens, budget, blocks) + (0,) * (vision.layers - blocks)


def fewest(tokens: int, blocks: int) -> int:
    """Tokens that are left where each block merges as many as it can."""
    for _ in range(blocks):
        tokens -= tokens // 2
    return tokens


def schedule(tokens: int, target: int, blocks: int) -> tuple[int, ...]:
    """Merges in each block, largest first, so that ``target`` are left: even shares unless halving forbids."""
    merges = []
    for left in range(blocks, 0, -1):
        share = -(-(tokens - target) // left)
        while fewest(tokens - share, left - 1) > target:
            share += 1
        merges.append(share)
        tokens -= share
    return tuple(sorted(merges, reverse=True))


def matched(metric: Tensor, merges: int, *, first_stays: bool) -> Tensor:
    """Int (N, t): for each token the place of the one it becomes, of t - ``merges``.

    ``metric``: (N, t, d). At most every second token merges; with ``first_stays`` the first never does, and what is
    left at even places keeps its order.
    """
    even, odd = metric[:, ::2], metric[:, 1::2]
    scores = cosine(even, odd)
    if first_stays:
        first = torch.arange(even.shape[1], device=metric.device) == 0
        scores = scores.masked_fill(first[:, None], -torch.inf)
    best, partner = scores.max(2)
    order = best.argsort(dim=1, descending=True, stable=True)
    merges = min(merges, (metric.shape[1] - int(first_stays)) // 2)
    leaving, staying = order[:, :merges], order[:, merges:]
    if first_stays:
        staying = staying.sort(dim=1).values
    behind = staying.shape[1]
    places = torch.arange(behind + odd.shape[1], device=metric.device).expand(len(metric), -1)
    group = torch.empty(metric.shape[:2], dtype=torch.int64, device=metric.device)
    group[:, 1::2] = places[:, behind:]
    even_group = torch.empty_like(order).scatter(1, staying, places[:, :behind])
    group[:, ::2] = even_group.scatter(1, leaving, behind + partner.gather(1, leaving))
    return group


def stood(group: Tensor, count: int) -> Tensor:
    """Int (N, count): where each of ``count`` tokens stood before; those of B that others merged into keep their place.

    ``group``: int (N, t), which of them each token became.
    """
    place = torch.arange(group.shape[1], device=group.device).expand_as(group)
    places = group.new_zeros(len(group), count).scatter(1, group[:, ::2], place[:, ::2])
    return places.scatter(1, group[:, 1::2], place[:, 1::2])
