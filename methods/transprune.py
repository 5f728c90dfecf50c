"""TransPrune: *Token Transition Pruning for Efficient Large Vision-Language Model* (arXiv 2507.20630).

Authors' code: liaolea/TransPrune, commit c9e8284. In each layer of ``accumulate``, of its attention and of its MLP:

    x_j, y_j  = what goes in for token j, behind the norm, and what comes out, before the residual is added
    t_j       = |y_j| / |x_j| · softmax over all tokens, text too, of (1 - cos(x_j, y_j))
    w_j       = sum of t_j over these layers so far, attention and MLP

For each cut i, at the input of layer K_i, over the visual tokens that are there:

    a_j  = weight with which the text behind the image would attend to token j in layer K_i, mean over heads and text
    keep the floor(ratio_i · V) tokens of highest w_j / (Σw + 1e-8) + a_j / (Σa + 1e-8), in order; V counts the row's
         visual tokens in the prompt
    number the positions anew from 0

Of an image of 576 tokens 504 are left from layer 7 on, 360 from 9 and 72 from 12: T = 236.25 over 32 layers. Layers are
counted from 0 here, in ``accumulate`` of the authors' scripts from 1.

The authors cut the first image alone, and take the first tokens of a second one for its text; here the visual tokens of
a row, of however many images, compete with each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..engine.contract import Forward, Keep, Knob, Ranking
from .base import MAGNITUDES, Layered, Ranked, RankedForward, floored
from .pieces import columns, precise, text_attention
from .registry import register

if TYPE_CHECKING:
    from ..engine.contract import Geometry, LayerView, SublayerView, TokenLayout, TokenSet

CUTS = (7, 9, 12)
RATIOS = (0.875, 0.625, 0.125)


def by_power(power: float, cuts: int) -> tuple[float, ...]:
    """The authors' ratios, on straight lines between them for another number of cuts, to a ``power``."""
    known = [cut / len(RATIOS) for cut in range(len(RATIOS) + 1)]
    ratios = (float(np.interp(cut / cuts, known, (1, *RATIOS))) for cut in range(1, cuts + 1))
    return tuple(round(ratio**power, 6) for ratio in ratios)


@register("transprune", "TransPrune", paper="2507.20630", source="liaolea/TransPrune@c9e8284")
class TransPrune(Layered, Ranked):
    """Keep the visual tokens that attention and MLPs change most, and that text attends to, at three depths."""

    hook_points = ("decoder", "sublayers")
    positions = "renumber"
    examples = (
        "accumulate=1+2+3,cuts=2+4+6",
        "accumulate=6+16,cuts=8+24,ratios=0.6+0.3,layers=scaled,positions=keep",
    )
    everything = "accumulate=2,cuts=3,ratios=1"
    knobs = (
        Knob(
            "ratios",
            lambda visual_tokens, geometry: MAGNITUDES,
            options=lambda power, given: {"ratios": by_power(power, len(given.get("cuts", CUTS)))},
        ),
    )

    accumulate: tuple[int, ...] = (6, 7, 8, 9, 10, 11)
    cuts: tuple[int, ...] = CUTS
    ratios: tuple[float, ...] = RATIOS

    def __post_init__(self) -> None:
        super().__post_init__()
        cuts, ratios = len(self.cuts), len(self.ratios)
        self.require(cuts == ratios, f"{cuts} cuts need as many ratios, not {ratios}")
        self.require(list(self.cuts) == sorted(self.cuts), "cuts must rise")
        falling = all(a >= b for a, b in zip((1, *self.ratios), (*self.ratios, 0), strict=True))
        self.require(falling, "ratios are shares of the prompt's visual tokens: they must fall from 1 to 0")
        self.require(min(self.accumulate, default=0) >= 0, "accumulate names layers, which are >= 0")

    def check(self, geometry: Geometry) -> None:
        self.check_layers("cuts", self.cuts, geometry)
        first, read = (min((self.at(k, geometry) for k in part), default=-1) for part in (self.cuts, self.accumulate))
        self.require(
            not self.cuts or 0 <= read < first,
            f"the first cut, at layer {first}, needs a layer before it in accumulate: choose other layers",
        )

    def left(self, layout: TokenLayout, geometry: Geometry) -> dict[int, Tensor]:
        cuts, total = [self.at(layer, geometry) for layer in self.cuts], layout.visual.host_counts
        return {cut: floored(total, ratio) for cut, ratio in zip(cuts, self.ratios, strict=True)}

    def score(self, view: LayerView) -> Tensor:
        return text_attention(view)

    def begin(self, layout: TokenLayout, geometry: Geometry) -> Forward:
        return TransPruneForward(self, self.left(layout, geometry), {self.at(k, geometry) for k in self.accumulate})


class TransPruneForward(RankedForward):
    """One prefill: layers to ``read``, and what was ``seen`` there since the last cut: |x|, |y| and x · y, (B, L) each.

    ``weight``: (B, V), the transitions before that of the tokens that the last cut found, some of which ``stayed``.
    """

    def __init__(self, method: TransPrune, left: dict[int, Tensor], read: set[int]) -> None:
        super().__init__(method, left)
        self.read = {layer for layer in read if layer < max(left, default=0)}
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []
        self.weight: Tensor | None = None
        self.stayed: Tensor | None = None

    def sublayer(self, layer: int, view: SublayerView) -> None:
        if layer in self.read:
            x, y = precise(view.inputs), precise(view.outputs)
            self.seen.append((x.norm(dim=2), y.norm(dim=2), (x * y).sum(2)))

    def layer_input(self, layer: int, view: LayerView) -> Keep | Ranking | None:
        decision = super().layer_input(layer, view)
        self.stayed = self.stayed if decision is None else decision.mask
        return decision

    def scored(self, layer: int, view: LayerView) -> Tensor:
        visual = view.layout.visual
        weight = visual.pick(transitions(self.seen, view.layout), 1) if self.seen else 0
        if self.weight is not None and self.stayed is not None:
            weight = weight + self.weight.gather(1, columns(self.stayed, visual.index.shape[1]))
        self.seen, self.weight = [], torch.as_tensor(weight)
        return share(self.weight, visual) + share(super().scored(layer, view), visual)


def transitions(seen: list[tuple[Tensor, Tensor, Tensor]], layout: TokenLayout) -> Tensor:
    """Transition weights (B, L), fp32, of all tokens in what was seen; of padding something or other."""
    before, behind, dot = (torch.stack(part) for part in zip(*seen, strict=True))
    cosine = dot / (before * behind).clamp(min=1e-8)
    if not layout.is_full:
        cosine = cosine.masked_fill(~layout.valid, torch.inf)
    return (behind / before * (1 - cosine).softmax(2)).sum(0)


def share(mass: Tensor, there: TokenSet) -> Tensor:
    """``mass`` (B, V) as shares of its sum over those that are there."""
    if min(there.counts) < max(there.counts):
        mass = mass.masked_fill(~there.present, 0)
    return mass / (mass.sum(1, keepdim=True) + 1e-8)
