"""VisiPruner by a forced plan, for timing where its thresholds find nothing, as with random weights.

With ``forced=True`` everything is measured as ever, but a plan decides:

    in each row the ``filter_tokens`` visual tokens of largest |c_j| stay from ``filter_layer`` on, none from
    ``exit_layer`` on

The plan's defaults are the averages that the paper reports on GQA: filtering around the 9th layer, 10.3 tokens, exit at
layer 23.9.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..engine.contract import Knob, Ranking
from .registry import register
from .visipruner import VisiPruner, VisiPrunerForward

if TYPE_CHECKING:
    from ..engine.contract import AttentionView, Contributions, Forward, Geometry, LayerView, TokenLayout

THRESHOLDS = ("layer_threshold", "token_threshold", "exit_threshold", "exit_layers", "consecutive_exit")
PLAN = ("filter_layer", "filter_tokens", "exit_layer")


@register
class ForcedVisiPruner(VisiPruner):
    """Shallow visual attention off, a value-aware choice in the middle, no visual tokens in the deep layers."""

    examples = (*VisiPruner.examples, "layers=scaled,forced=true,filter_layer=14")
    knobs = (
        VisiPruner.knobs[0],
        Knob("filter_tokens", lambda visual_tokens, geometry: range(visual_tokens + 1)),
        *VisiPruner.knobs[1:],
    )
    belongs = VisiPruner.belongs | {"forced": "middle", **dict.fromkeys(PLAN, "middle"), "exit_layer": "deep"}

    forced: bool = False
    filter_layer: int = 9
    filter_tokens: int = 10
    exit_layer: int = 24

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.filter_tokens >= 0, "filter_tokens must be >= 0")
        for option in THRESHOLDS if self.forced else PLAN:
            self.require(not self.changed(option), f"{option} has no effect with forced={self.forced}")

    def check(self, geometry: Geometry) -> None:
        super().check(geometry)
        if self.forced:
            shallow, (cut, leave) = self.at(self.shallow_layers, geometry), self.planned(geometry)
            scale = ", or give layers='scaled'" if self.layers == "given" else ""
            self.require(
                shallow + 2 <= cut < leave <= geometry.layers,
                f"the plan of {shallow} shallow layers, filtering at {cut} and exit at {leave} does not fit a model of "
                f"{geometry.layers}: keep shallow_layers + 2 <= filter_layer < exit_layer{scale}",
            )

    def planned(self, geometry: Geometry) -> tuple[int, int]:
        """The first layers with few and with no visual tokens.

        Scaled to few layers these would fall together: then each is as late as the one before it allows.
        """
        cut, scaled = self.at(self.filter_layer, geometry), self.layers == "scaled"
        cut = max(cut, self.at(self.shallow_layers, geometry) + 2) if scaled else cut
        leave = self.at(self.exit_layer, geometry) if "deep" in self.stages else geometry.layers
        return cut, max(leave, cut + 1) if scaled else leave

    def left(self, layout: TokenLayout, geometry: Geometry) -> dict[int, Tensor] | None:
        if not self.forced:
            return super().left(layout, geometry)
        total, (cut, leave) = layout.visual.host_counts, self.planned(geometry)
        return {cut: total.clamp(max=self.filter_tokens), leave: torch.zeros_like(total)}

    def begin(self, layout: TokenLayout, geometry: Geometry) -> Forward:
        return PlannedForward(self, layout, geometry) if self.forced else super().begin(layout, geometry)


class PlannedForward(VisiPrunerForward):
    """State of one prefill by the plan."""

    def __init__(self, method: ForcedVisiPruner, layout: TokenLayout, geometry: Geometry) -> None:
        super().__init__(method, layout, geometry)
        self.tokens, (self.filter_layer, self.exit_layer) = method.filter_tokens, method.planned(geometry)
        self.measured: Contributions | None = None

    def middle(self, layer: int, view: AttentionView) -> None:
        """Measure as ever."""
        self.measured = view.contributions()

    def layer_input(self, layer: int, view: LayerView) -> Ranking | None:
        """What stays from this layer on, None for everything."""
        left = self.tokens if layer == self.filter_layer else 0
        if self.measured is None or not (layer == self.filter_layer or layer >= self.exit_layer):
            return None
        _, norm, _ = self.measured.of_visual(self.measured.sums)
        return Ranking.of(norm, [left] * view.layout.rows, view.layout.visual)
