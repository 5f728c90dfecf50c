"""FasterVLM: *[CLS] Attention is All You Need for Training-Free Visual Token Pruning* (arXiv 2412.01818).

Authors' code: Theia-4869/FasterVLM, commit f5d5f12.

    in the vision block whose output the model uses:  s_j = mean over heads of the attention of CLS to patch j
    in front of the projector:                        keep the patches of highest s_j, in their order

The tokens that stay get new positions. Paper and code agree.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..engine.contract import Forward, Keep, Positions
from .base import Budgeted, top
from .pieces import cls_attention, needs_cls
from .registry import register

if TYPE_CHECKING:
    from ..engine.contract import Geometry, TokenLayout, VisionView


@register
@dataclass(frozen=True)
class FasterVLM(Budgeted):
    """Keep the patches of each image to which the CLS token attends most."""

    name = "fastervlm"
    title = "FasterVLM"
    paper = "2412.01818"
    source = "Theia-4869/FasterVLM@f5d5f12"
    hook_points = ("vision",)

    positions: Positions = dataclasses.field(default="renumber", kw_only=True)

    def check(self, geometry: Geometry) -> None:
        needs_cls(self, geometry)

    def begin(self, layout: TokenLayout, geometry: Geometry) -> Forward:
        return Forward()

    def vision(self, view: VisionView) -> Keep:
        return Keep(top(cls_attention(view), self.budget(view.present.sum(1)), view.present))
