"""HiPrune: *Hierarchical Attention for Efficient Token Pruning in Vision-Language Models* (arXiv 2508.00553).

Authors' code: Danielement321/HiPrune, commit 6e83a12. Of every image, from a budget of T tokens:

    m_j, d_j  = attention that patch j receives in a middle block (``middle``, of 24) and in the deep one, whose output
                the model uses: mean over heads and over all queries, CLS among them
    anchors     the round(alpha · T / 5) patches of highest m_j
    buffers     the patches left and right of each anchor, above and below it
    registers   of the others those of highest d_j, until T patches are chosen
    in front of the projector:  keep all three kinds, in their order in the image, with new positions

T patches of every image so enter decoder layer 0. Towers without CLS serve as well. As in the code, the left neighbour
of the first patch of a row is the last of the row above, and anchors in the first or last row take the first or last
patch of all for a neighbour that they do not have.

The authors divide their budget by the number of images in the batch, so that two prompts side by side get half of it
each; here every image has all of it. Where anchors and buffers are more than T their code fails; here those of highest
m_j stay. Their block counts from 1: 9 is 8 here, and 16, which they name for Qwen2.5-VL, is ``middle=15``. Each tile of
an image that the model cuts into tiles has the same budget; patches of padding count like others (``unpad=false``), and
there are no newlines (``newlines=drop``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .base import Layered, OnPatches, Scored
from .pieces import marked, per_image
from .registry import register

if TYPE_CHECKING:
    from ..engine.contract import Geometry, VisionGeometry, VisionView


@register("hiprune", "HiPrune", paper="2508.00553", source="Danielement321/HiPrune@6e83a12")
class HiPrune(OnPatches, Scored, Layered):
    """Keep patches that get much attention in a middle vision block, with their neighbours, or in a deep one."""

    hook_points = ("vision",)
    positions = "renumber"
    newlines, unpad = "drop", False
    vision_blocks = ()
    examples = (
        "keep=0.5,alpha=0.5,layers=scaled",
        "tokens=11,alpha=1,middle=16,layers=scaled",
        "tokens=5,layers=scaled,positions=keep",
    )
    everything = "keep=1,layers=scaled,newlines=keep,unpad=true"

    alpha: float = 0.1
    middle: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.alpha <= 1, f"alpha must lie in [0, 1], not {self.alpha}")
        self.require(self.middle >= 0, "middle, a vision block, must be >= 0")

    def check(self, geometry: Geometry) -> None:
        super().check(geometry)
        self.check_block("middle", self.middle, geometry)
        if self.alpha:
            self.check_full_block("middle", self.middle, geometry, ", or alpha=0")

    def anchors(self, patches: int) -> int:
        """How many anchors an image gets."""
        return round(per_image(self, patches) * self.alpha / 5)

    def blocks_received(self, vision: VisionGeometry) -> tuple[int, ...]:
        anchors = self.alpha if vision.tokens == 0 else self.anchors(vision.tokens)
        return (self.block_at(self.middle, vision), vision.last_full) if anchors else (vision.last_full,)

    def score(self, view: VisionView) -> Tensor:
        registers, anchors = view.received(), self.anchors(view.vision.tokens)
        if anchors == 0:
            return registers
        middle = view.received(self.block_at(self.middle, view.vision))
        # Both lie in [0, 1]: anchors and buffers come first.
        return torch.where(around(middle, anchors, view.grid[2]), 2 + middle, registers)


def around(scores: Tensor, count: int, width: int) -> Tensor:
    """Bool (N, P): the ``count`` patches of highest ``scores`` (N, P), and their neighbours in rows of ``width``."""
    anchors = scores.argsort(dim=1, descending=True, stable=True)[:, :count, None]
    steps = torch.tensor([0, -1, 1, -width, width], device=scores.device)
    return marked((anchors + steps).flatten(1).clamp(0, scores.shape[1] - 1), scores.shape[1])
