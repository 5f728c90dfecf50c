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
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..engine.contract import BlockCut
from .base import Budgeted, OnImages
from .pieces import added_need_renumbering, needs_cls, per_image, precise
from .registry import register

if TYPE_CHECKING:
    from ..engine.contract import BlockView, Geometry


@register("flowcut", "FlowCut", paper="2505.19536", source="TungChintao/FlowCut@a2ecd24")
class FlowCut(OnImages, Budgeted):
    """Drop patches block by block inside the vision tower, by what CLS reads of them, faster where it is sure."""

    hook_points = ("tower",)
    block_part = "mlp"
    positions = "renumber"
    unpad = False
    vision_blocks = ()
    examples = ("keep=0.5", "tokens=3,positions=keep")

    def check(self, geometry: Geometry) -> None:
        super().check(geometry)
        needs_cls(self, geometry)
        if geometry.vision is not None and geometry.vision.tiled:
            added_need_renumbering(self)  # patches of padding may stay
        last = geometry.vision is None or geometry.vision.feature_block >= 1
        self.require(last, "the features are those of the first vision block, and patches leave before it")

    def block(self, view: BlockView) -> BlockCut | None:
        budget, to_go = per_image(self, view.vision.tokens), view.vision.feature_block - 1 - view.block
        if to_go < 0 or max(view.counts) <= budget:
            return None
        attention, score = emergent(view)
        score = view.memory = score if view.memory is None else view.memory.lerp(score, 0.5)
        if to_go % 2:
            return None
        entropies = view.read(torch.special.entr(attention).sum(1)) if to_go else [0.0] * len(score)
        counts = (left(*one, budget, to_go) for one in zip(view.counts, entropies, strict=True))
        return BlockCut(score, tuple(counts))


def emergent(view: BlockView) -> tuple[Tensor, Tensor]:
    """Shares (N, P) of the patches in the attention of CLS, and their scores (N, P) in this block."""
    logits = torch.cat([view.cls_logits(), view.cls_logits("values")], dim=1)
    mass = logits.softmax(2).unflatten(1, (2, -1)).mean(2)[:, :, 1:]
    shares = mass / mass.sum(2, keepdim=True)
    strength = precise(view.values[:, :, 1:]).mean(1).norm(p=1, dim=2)
    return shares[:, 0], shares.sum(1) * strength


def left(count: int, entropy: float, budget: int, to_go: int) -> int:
    """How many of ``count`` patches stay, ``to_go`` blocks before the last cut, where all but the ``budget`` leave."""
    if to_go == 0 or count <= max(budget, 1):
        return min(count, budget)
    pace = 1 - (entropy / math.log(count)) ** 2
    return max(budget, count - round((count - budget) / math.sqrt(to_go) * pace))
