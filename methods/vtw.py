"""VTW, visual tokens withdrawal: *Boosting Multimodal LLMs with Visual Tokens Withdrawal* (arXiv 2405.05803).

Authors' code: lzhxmu/VTW, commit a3d8cfc.

    at the input of layer K:  drop all visual tokens; the text keeps its positions

The authors choose K as the first layer from 5 on whose withdrawal changes the next-token distribution of 20 samples by
a mean KL divergence of at most 0.003 (7B) or 0.0005 (13B). Their function drops at K = 15 unless told otherwise, their
command line at 16; the default here is the function's. ``analysis.fit.vtw_layer`` is the search.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..engine.contract import Knob
from .base import REFERENCE_DEPTH, Layered, Ranked
from .registry import register

if TYPE_CHECKING:
    from ..engine.contract import Geometry, LayerView, TokenLayout


@register("vtw", "VTW", paper="2405.05803", source="lzhxmu/VTW@a3d8cfc")
class VTW(Layered, Ranked):
    """Drop all visual tokens at the input of layer K (option ``layer``)."""

    hook_points = ("decoder",)
    examples = ("layers=scaled", "layer=0,positions=renumber")
    knobs = (Knob("layer", lambda visual_tokens, geometry: range(max(geometry.layers, REFERENCE_DEPTH))),)

    layer: int = 15

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.layer >= 0, "layer must be >= 0")

    def check(self, geometry: Geometry) -> None:
        self.check_layers("layer", (self.layer,), geometry)

    def left(self, layout: TokenLayout, geometry: Geometry) -> dict[int, Tensor]:
        return {self.at(self.layer, geometry): torch.zeros_like(layout.visual.host_counts)}

    def score(self, view: LayerView) -> Tensor:
        return torch.zeros_like(view.present, dtype=torch.float32)  # all alike, since none stays
