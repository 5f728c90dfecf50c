"""FasterVLM: *[CLS] Attention is All You Need for Training-Free Visual Token Pruning* (arXiv 2412.01818).

Authors' code: Theia-4869/FasterVLM, commit f5d5f12.

    in the vision block whose output the model uses:  s_j = mean over heads of the attention of CLS to patch j
    in front of the projector:                        keep the patches of highest s_j, in their order

The tokens that stay get new positions. Paper and code agree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .base import OnPatches, Salient, Scored
from .registry import register

if TYPE_CHECKING:
    from ..engine.contract import VisionView


@register("fastervlm", "FasterVLM", paper="2412.01818", source="Theia-4869/FasterVLM@f5d5f12")
class FasterVLM(Salient, OnPatches, Scored):
    """Keep the patches of each image to which the CLS token attends most."""

    hook_points = ("vision",)
    positions = "renumber"

    def score(self, view: VisionView) -> Tensor:
        return self.salience(view)
