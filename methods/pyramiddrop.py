"""PyramidDrop: *Accelerating Your LVLMs via Pyramid Visual Redundancy Reduction* (arXiv 2410.17247).

Authors' code: Cooperx521/PyramidDrop, commit 6444f30. For each cut i, at the input of layer K_i:

    s_j = mean over heads of the weight with which the last prompt token would attend, in layer K_i, to visual token j
    keep the floor(ratio_i · V) tokens of highest s_j, in order; V counts the row's visual tokens in the prompt
    number the positions anew from 0

The paper scores with the attention of the last layer in front of the cut (``scorer="stage"``); the code projects all
tokens with the weights of the layer to come (``scorer="next"``), to queries, keys and values, and those that stay again
in the layer. Here the layer takes over the keys, and queries and values are projected where they are used.
The visual tokens of several images compete with each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..engine.contract import HookPoint, Knob
from .base import Layered, Ranked, floored
from .pieces import last_token_attention
from .registry import register

if TYPE_CHECKING:
    from ..engine.contract import Geometry, TokenLayout


CUTS = (8, 16, 24)


def by_factor(factor: float, cuts: int) -> tuple[float, ...]:
    """The paper's ratios for its λ: each cut keeps the share ``factor`` of what the one before it left."""
    return tuple(round(factor**cut, 6) for cut in range(1, cuts + 1))


@register("pyramiddrop", "PyramidDrop", paper="2410.17247", source="Cooperx521/PyramidDrop@6444f30")
class PyramidDrop(Layered, Ranked):
    """Keep ever fewer visual tokens: the share ``ratios[i]`` of the prompt's from the input of layer ``cuts[i]`` on."""

    hook_points = ("attention", "decoder")
    positions = "renumber"
    examples = ("layers=scaled", "layers=scaled,scorer=stage,positions=keep")
    everything = "ratios=1+1+1,layers=scaled"
    knobs = (
        Knob(
            "ratios",
            lambda visual_tokens, geometry: [step / 1000 for step in range(1001)],
            options=lambda factor, given: {"ratios": by_factor(factor, len(given.get("cuts", CUTS)))},
        ),
    )

    cuts: tuple[int, ...] = CUTS
    ratios: tuple[float, ...] = (0.5, 0.25, 0.125)
    scorer: Literal["next", "stage"] = "next"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            len(self.cuts) == len(self.ratios), f"{len(self.cuts)} cuts need as many ratios, not {len(self.ratios)}"
        )
        self.require(list(self.cuts) == sorted(self.cuts), "cuts must rise")
        falling = all(a >= b for a, b in zip((1, *self.ratios), (*self.ratios, 0), strict=True))
        self.require(falling, "ratios are shares of the prompt's visual tokens: they must fall from 1 to 0")
        self.require(self.scorer in ("next", "stage"), f"scorer must be 'next' or 'stage', not {self.scorer!r}")
        first = 0 if self.scorer == "next" else 1
        self.require(min(self.cuts, default=1) >= first, f"cuts must be >= {first} for scorer={self.scorer!r}")

    def check(self, geometry: Geometry) -> None:
        self.check_layers("cuts", self.cuts, geometry)

    def left(self, layout: TokenLayout, geometry: Geometry) -> dict[int, Tensor]:
        cuts = [self.at(layer, geometry) for layer in self.cuts]
        left = floored(layout.visual.host_counts, torch.tensor(self.ratios, dtype=torch.float64)[:, None])
        return dict(zip(cuts, left, strict=True))

    @property
    def scored_at(self) -> HookPoint:
        return "attention" if self.scorer == "stage" else "decoder"

    def score(self, view: Any) -> Tensor:
        return last_token_attention(view, view.weights() if self.scorer == "stage" else view.preview())
