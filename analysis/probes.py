"""Probes: methods that take vision away from text in some layers, to see what the model does without it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..engine.contract import Forward, Method

if TYPE_CHECKING:
    from ..engine.contract import AttentionView, Geometry, TokenLayout

Blindness = Literal["masked", "moved"]


@dataclass(frozen=True)
class Blind(Method):
    """Text behind the image does not read visual tokens in ``blind_layers``; visual tokens run on as ever.

    ``how``: ``masked``, before the softmax, so that other tokens get the attention; ``moved``, behind the softmax: all
    weight on visual tokens then reads the value of the prompt's first one, and none is normalised again. So attention
    keeps a place to go, and nothing but the first token's own content is read.
    """

    name = "blind"
    title = "Text blind to vision"
    hook_points = ("attention",)

    blind_layers: tuple[int, ...] = ()
    how: Blindness = "masked"

    def begin(self, layout: TokenLayout, geometry: Geometry) -> Forward:
        return _BlindForward(self)


class _BlindForward(Forward):
    def __init__(self, probe: Blind) -> None:
        self.layers, self.how = frozenset(probe.blind_layers), probe.how

    def attention(self, layer: int, view: AttentionView) -> Tensor | None:
        if layer not in self.layers:
            return None
        layout = view.layout
        if self.how == "masked":
            return view.attend((layout.text, layout.nonvisual), onto=view.output)
        visual, first = layout.visual.mask[:, None, :, None], (layout.visual_id == 0)[:, None, :, None]
        return view.reread(
            lambda values: torch.where(visual, (values * first).sum(2, keepdim=True), values), layout.text
        )
