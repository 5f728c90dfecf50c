"""Readers: every text token behind the image is asked what it takes up. No paper's method, and off unless it is named.

VisiPruner's c_j is what one token reads, the last of the prompt. An answer that is spelled reads the image again with
each of its tokens, and what the first one does not need is gone by then. Here all text decides, once:

    c_ij, in layer ``layer`` - 1:     text token i's attention to visual token j times its value, heads side by side
    at the input of layer ``layer``:  keep { j : |c_ij| > threshold for any i }
    at the input of layer ``exit``:   drop all visual tokens

The text of a question names what the answer is about, so it has looked at all of that before the first token is said.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..engine.contract import Forward, Keep, Knob
from .base import MAGNITUDES, Layered
from .registry import register

if TYPE_CHECKING:
    from torch import Tensor

    from ..engine.contract import AttentionView, Geometry, LayerView, TokenLayout


@register("readers", "Readers (what any text token takes up)")
class Readers(Layered):
    """Keep the visual tokens that contribute more than ``threshold`` to some text token; drop all at ``exit``."""

    hook_points = ("attention", "decoder")
    adaptive = True
    examples = ("layers=scaled,threshold=2", "layer=2,threshold=1,exit=4,positions=renumber")
    everything = "layers=scaled,threshold=0"
    knobs = (Knob("threshold", lambda visual_tokens, geometry: MAGNITUDES),)

    layer: int = 13
    threshold: float = 0.2
    exit: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.layer >= 1, "layer must be >= 1: the attention of the layer before it is read")
        self.require(self.threshold >= 0, "threshold is a norm and must be >= 0")

    def check(self, geometry: Geometry) -> None:
        self.check_layers("layer", (self.layer,), geometry)
        if self.exit is not None:
            last, first = self.at(self.exit, geometry), self.at(self.layer, geometry)
            self.require(last > first, f"exit must lie behind layer: here they are layers {last} and {first}")
            self.require(last < geometry.layers, f"exit={self.exit}, but the model has {geometry.layers} layers")

    def keeps_all(self, layout: TokenLayout, geometry: Geometry) -> bool:
        return self.threshold == 0 and self.exit is None

    def begin(self, layout: TokenLayout, geometry: Geometry) -> Forward:
        return ReadersForward(self, geometry)


class ReadersForward(Forward):
    """State of one prefill: what each visual token contributes, until tokens leave."""

    def __init__(self, method: Readers, geometry: Geometry) -> None:
        self.method, self.layer = method, method.at(method.layer, geometry)
        self.exit = geometry.layers if method.exit is None else method.at(method.exit, geometry)
        self.taken: Tensor | None = None

    def attention(self, layer: int, view: AttentionView) -> None:
        if layer + 1 == self.layer:
            self.taken = taken_up(view)

    def layer_input(self, layer: int, view: LayerView) -> Keep | None:
        if layer == self.exit:
            return Keep(torch.zeros_like(view.present))
        taken, self.taken = self.taken, None
        return None if taken is None else Keep((taken > self.method.threshold) & view.present)


def taken_up(view: AttentionView) -> Tensor:
    """The largest |c_ij| over text tokens i, fp32 (B, V)."""
    visual, text = view.layout.visual, view.layout.text
    length = torch.linalg.vector_norm(visual.pick(view.values, 2), dim=-1, dtype=torch.float32)
    most = torch.zeros_like(view.present, dtype=torch.float32)
    for weights, present in view.scan(text):
        norm = torch.linalg.vector_norm(visual.pick(weights, 3) * length[:, :, None], dim=1)
        most = torch.maximum(most, (norm * present[..., None]).amax(1))
    return most
