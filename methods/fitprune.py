"""FitPrune: *Fit and Prune: Fast and Training-free Visual Token Pruning for Multi-modal LLMs* (arXiv 2409.10197).

Authors' code: ywh187/FitPrune, commit d28e418. In each decoder layer l whose schedule entry is not 0:

    A       = the layer's attention map, the largest weight over heads
    self_j  = sum over visual queries of A to visual token j
    cross_j = sum over the text queries behind the image of A to visual token j
    behind the attention of layer l: delete the scheduled number of visual tokens of lowest self_j · cross_j

Layer l itself still caches what it deletes; positions stay. The numbers come from a search on a calibration set, made
once for each model and target: those shipped for LLaVA-1.5 are here by their nominal reduction in per cent (``ratio``).
They are numbers of tokens, out of 576, and act so on prompts with any number of visual tokens, as in the code;
``out_of=576`` makes them shares instead. Where layers are scaled together, their deletions add up.
"""

from __future__ import annotations

from collections import Counter
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..engine.contract import Knob
from .base import REFERENCE_DEPTH, Layered, Ranked
from .pieces import interpolated, share
from .registry import register

if TYPE_CHECKING:
    from ..engine.contract import AttentionView, Geometry, TokenLayout

# Visual tokens deleted in layers 0, 1, 2, …
SCHEDULES: dict[int, tuple[int, ...]] = {
    50: (3, 7, 49, 24, 29, 17, 59, 41, 26, 8, 10, 6, 2, 5, 7, 2, 30, 3, 13, 27, 5, 23, 2, 1, 0, 0, 1, 1, 2),
    60: (14, 33, 89, 36, 36, 20, 55, 21, 18, 4, 7, 5, 2, 5, 7, 4, 26, 5, 11, 24, 4, 18, 2, 1, 0, 0, 1, 0, 1),
    70: (48, 79, 118, 41, 33, 17, 36, 9, 9, 2, 3, 2, 1, 3, 4, 8, 18, 7, 8, 20, 4, 13, 2, 1, 0, 0, 1, 0, 1),
    80: (128, 127, 118, 35, 26, 8, 13, 3, 2, 1, 0, 0, 0, 2, 1, 8, 7, 8, 5, 11, 2, 6, 1, 1, 0, 0, 0, 1),
    90: (262, 153, 80, 19, 13, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 1, 2, 0, 1, 0, 0, 0, 0, 0, 1),
}
PATCHES = 576  # out of which they are


def between(ratio: float) -> dict[str, Any]:
    """Options for any ``ratio`` in [0, 100]: what is gone behind each layer, between the shipped schedules.

    0 deletes nothing, 100 all in layer 0.
    """
    gone = {r: list(accumulate(s + (0,) * (REFERENCE_DEPTH - len(s)))) for r, s in SCHEDULES.items()}
    ends = {0: [0] * REFERENCE_DEPTH, 100: [PATCHES] * REFERENCE_DEPTH}
    behind = interpolated(gone | ends, ratio)
    deletions = [now - before for before, now in zip([0, *behind], behind, strict=False)]
    used = max((layer for layer, number in enumerate(deletions) if number), default=0) + 1
    return {"deletions": tuple(deletions[:used]), "out_of": PATCHES}


@register("fitprune", "FitPrune", paper="2409.10197", source="ywh187/FitPrune@d28e418")
class FitPrune(Layered, Ranked):
    """Delete in each decoder layer a scheduled number of the visual tokens of lowest self- times cross-attention.

    ``ratio`` names a shipped schedule; ``deletions`` gives another, one number a layer from layer 0 on.
    """

    hook_points = ("attention", "decoder")
    examples = (
        "ratio=60,out_of=576,layers=scaled",
        "deletions=0+3+0+4+4+0+1+9,positions=renumber",
        "deletions=0+3+0+4+4+0+1+9,out_of=24",
    )
    everything = "deletions=0"
    knobs = (
        Knob(
            "deletions",
            lambda visual_tokens, geometry: [step / 10 for step in range(1001)],
            replaces=("ratio", "out_of"),
            options=lambda ratio, given: between(ratio),
        ),
    )

    ratio: int | None = None
    deletions: tuple[int, ...] = ()
    out_of: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        known = ", ".join(map(str, SCHEDULES))
        one = (self.ratio is None) != (not self.deletions)
        self.require(one, f"give exactly one of ratio=({known}) or deletions=NUMBERS")
        self.require(self.ratio is None or self.ratio in SCHEDULES, f"ratio must be one of {known}, not {self.ratio}")
        self.require(all(number >= 0 for number in self.deletions), "deletions must be >= 0")
        self.require(
            self.out_of is None or self.out_of >= sum(self.schedule), "out_of is less than all deletions together"
        )

    @property
    def schedule(self) -> tuple[int, ...]:
        """Visual tokens deleted in each decoder layer, from layer 0 on."""
        return self.deletions if self.ratio is None else SCHEDULES[self.ratio]

    def check(self, geometry: Geometry) -> None:
        last = max((layer for layer, number in enumerate(self.schedule) if number), default=0)
        self.check_layers("last deletion at layer", (last,), geometry)

    def left(self, layout: TokenLayout, geometry: Geometry) -> dict[int, Tensor]:
        number: Counter[int] = Counter()
        for layer, count in enumerate(self.schedule):
            number[self.at(layer, geometry)] += count
        layers = [layer for layer in range(geometry.layers - 1) if number[layer]]
        gone = torch.tensor([*accumulate(number[layer] for layer in layers)])[:, None]
        total = layout.visual.host_counts
        left = (total - share(gone, self.out_of, total)).clamp(min=0) if layers else gone
        return {layer + 1: counts for layer, counts in zip(layers, left, strict=True)}

    def score(self, view: AttentionView) -> Tensor:
        own, cross = view.received()
        return own * cross
