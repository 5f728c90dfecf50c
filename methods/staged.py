"""Staged: a decoder whose layers follow the stages; an architecture at inference, no rule for dropping tokens.

    at the input of layer 0:      hold visual tokens aside, all but the sink
    at the input of layer enter:  they join, as they came from the projector, with their positions
    at the input of layer exit:   drop all visual tokens, the sink included

The *sink* is what text finds of an image before ``enter``: its first visual token (``visual``), or nothing, which
leaves text with its own first token (``bos``). An image is a run of visual tokens: images with no text between them
count as one. ``training/staged.py`` says the same for training, and trains such decoders.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..engine.contract import Forward, Join, Keep, Knob, Method
from ..engine.layout import VISUAL
from .registry import register

if TYPE_CHECKING:
    from ..engine.contract import Geometry, LayerView, TokenLayout

Sink = Literal["visual", "bos"]


@register("staged", "Staged (late entry, early exit)")
class Staged(Method):
    """Visual tokens are in layers ``enter`` to ``exit`` - 1 alone; before, text keeps the ``sink``.

    Without ``enter`` they are there from the first layer on, without ``exit`` to the last.
    """

    hook_points = ("decoder",)
    holds_aside = True
    examples = (
        "enter=3,exit=7",
        "enter=2,exit=3,sink=bos",
        "enter=4",
        "exit=6",
        "enter=2,exit=8,sink=bos,positions=renumber",
    )
    everything = "enter=0"
    knobs = (Knob("exit", lambda visual_tokens, geometry: range(1, geometry.layers)),)

    enter: int | None = None
    exit: int | None = None
    sink: Sink = "visual"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.sink in get_args(Sink), f"sink must be 'visual' or 'bos', not {self.sink!r}")
        self.require((self.enter, self.exit) != (None, None), "give enter=LAYER, exit=LAYER or both")
        self.require((self.enter or 0) >= 0, f"enter must be >= 0, not {self.enter}")
        shows = self.exit is None or self.exit > (self.enter or 0)
        self.require(shows, f"exit={self.exit} must be greater than enter={self.enter or 0}: no layer has the image")

    def check(self, geometry: Geometry) -> None:
        self.check_layers("enter", (self.enter or 0,), geometry)
        fits = self.exit is None or self.exit <= geometry.layers
        self.require(fits, f"exit={self.exit}, but the model has {geometry.layers} layers: choose at most as many")

    def left(self, layout: TokenLayout, geometry: Geometry) -> dict[int, Tensor]:
        left = {0: self.sinks(layout).sum(1).cpu()} if self.enter else {}
        left[self.enter or 0] = layout.visual.host_counts
        return left if self.exit is None else left | {self.exit: torch.zeros_like(layout.visual.host_counts)}

    def keeps_all(self, layout: TokenLayout, geometry: Geometry) -> bool:
        return not self.enter and self.exit in (None, geometry.layers)

    def sinks(self, layout: TokenLayout) -> Tensor:
        """Bool (B, L): the visual tokens that are there before ``enter``, of each image the first or none."""
        visual = layout.roles == VISUAL
        if self.sink == "bos":
            return torch.zeros_like(visual)
        return visual & ~pad(visual[:, :-1], (1, 0))

    def begin(self, layout: TokenLayout, geometry: Geometry) -> Forward:
        return StagedForward(self)


class StagedForward(Forward):
    """One prefill."""

    def __init__(self, method: Staged) -> None:
        self.method = method

    def layer_input(self, layer: int, view: LayerView) -> Keep | Join | None:
        if layer == self.method.exit:
            return Keep(torch.zeros_like(view.present))
        if not self.method.enter:
            return None
        if layer == 0:
            return Keep(view.layout.visual.pick(self.method.sinks(view.layout), 1), aside=True)
        return Join() if layer == self.method.enter else None
