"""V2Drop: *Variation-aware Vision Token Dropping for Faster Large Vision-Language Models* (arXiv 2509.01552).

Authors' code: xuyang-liu16/V2Drop, commit 219e03e. For each cut i, at the input of layer K_i:

    s_j = L2 norm of (state of visual token j at this input - its state at the input of the layer before)
    keep the max(1, floor(ratio_i · n)) tokens of highest s_j of the n that are there, in order, with their positions

Of an image of 576 tokens 288 are left from layer 3 on, 144 from 17 and 1 from 22: T = 202.8 over 32 layers. A token
that a layer changes little is thought to matter little. Nothing is multiplied to find out.

The authors look for the image at a fixed place, so that of two images the second is never cut, and in a batch the
scores of the first row decide for all; here the visual tokens of a row, of however many images, compete with each
other. Their file needs a larger rotary table than its pinned transformers makes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..engine.contract import Forward, Keep, Knob, Ranking
from .base import Layered, Ranked, RankedForward, floored
from .pieces import columns, pick, precise
from .registry import register

if TYPE_CHECKING:
    from ..engine.contract import Geometry, LayerView, TokenLayout

CUTS = (3, 17, 22)


def by_share(share: float, cuts: int) -> tuple[float, ...]:
    """Ratios on a way through the authors': ``share`` at every cut but the last, up to 1, and what is above 1 there."""
    return (min(share, 1.0),) * (cuts - 1) + (round(max(share - 1, 0.0), 6),)


@register("v2drop", "V2Drop", paper="2509.01552", source="xuyang-liu16/V2Drop@219e03e")
class V2Drop(Layered, Ranked):
    """Drop, at three depths, the visual tokens that the layer before has changed least."""

    hook_points = ("decoder",)
    examples = ("layers=scaled", "cuts=7+10+24,ratios=0.7+0.6+0.3,layers=scaled,positions=renumber")
    everything = "ratios=1+1+1,layers=scaled"
    knobs = (
        Knob(
            "ratios",
            lambda visual_tokens, geometry: [step / 1000 for step in range(2001)],
            options=lambda share, given: {"ratios": by_share(share, len(given.get("cuts", CUTS)))},
        ),
    )

    cuts: tuple[int, ...] = CUTS
    ratios: tuple[float, ...] = (0.5, 0.5, 0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        cuts, ratios = len(self.cuts), len(self.ratios)
        self.require(cuts == ratios, f"{cuts} cuts need as many ratios, not {ratios}")
        self.require(list(self.cuts) == sorted(self.cuts), "cuts must rise")
        self.require(min(self.cuts, default=1) >= 1, "cuts must be >= 1: what the layer before has changed is scored")
        shares = all(0 <= ratio <= 1 for ratio in self.ratios)
        self.require(shares, "ratios are shares of the tokens that the cut finds: they must lie in [0, 1]")

    def check(self, geometry: Geometry) -> None:
        self.check_layers("cuts", self.cuts, geometry)

    def left(self, layout: TokenLayout, geometry: Geometry) -> dict[int, Tensor]:
        left, now = {}, layout.visual.host_counts
        for cut, ratio in zip(self.cuts, self.ratios, strict=True):
            now = floored(now, ratio).clamp(min=1).minimum(now)
            left[self.at(cut, geometry)] = now
        return left

    def begin(self, layout: TokenLayout, geometry: Geometry) -> Forward:
        return V2DropForward(self, self.left(layout, geometry))


class V2DropForward(RankedForward):
    """State of one prefill: also the visual tokens (B, V, D) at the input before, and which of them stayed, (B, V)."""

    before: tuple[Tensor, Tensor]

    def layer_input(self, layer: int, view: LayerView) -> Keep | Ranking | None:
        decision = super().layer_input(layer, view)
        if layer + 1 in self.left:
            self.before = view.hidden, view.present if decision is None else decision.mask
        return decision

    def scored(self, layer: int, view: LayerView) -> Tensor:
        states, stayed = self.before
        before = pick(states, columns(stayed, view.hidden.shape[1]))
        return (precise(view.hidden) - precise(before)).norm(dim=2)
