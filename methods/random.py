"""Random visual tokens: the reference that every method has to beat.

Each sample draws its own set from ``seed`` and a hash of its inputs, so that the set does not depend on the batch.
The tokens that stay keep their order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..engine.contract import Forward, Keep
from .base import Budgeted, top
from .registry import register

if TYPE_CHECKING:
    from ..engine.contract import Geometry, LayerView, TokenLayout

_GOLDEN = -7046029254386353131  # 2^64 / golden ratio as a signed 64-bit integer


@register
@dataclass(frozen=True)
class Random(Budgeted):
    """Keep a random set of visual tokens at the input of one decoder layer (option ``layer``)."""

    name = "random"
    title = "Random tokens"
    hook_points = ("decoder",)
    examples = ("keep=0.5", "tokens=5,layer=3,positions=renumber")

    layer: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.layer >= 0, "layer must be >= 0")

    def check(self, geometry: Geometry) -> None:
        self.require(self.layer < geometry.layers, f"layer={self.layer}, but the model has {geometry.layers} layers")

    def left(self, layout: TokenLayout, geometry: Geometry) -> dict[int, Tensor]:
        return {self.layer: self.budget(layout.visual.total)}

    def begin(self, layout: TokenLayout, geometry: Geometry) -> Forward:
        return RandomForward(self)


class RandomForward(Forward):
    """One prefill."""

    def __init__(self, method: Random) -> None:
        self.method = method

    def layer_input(self, layer: int, view: LayerView) -> Keep | None:
        if layer != self.method.layer:
            return None
        scores = draw(view.layout.fingerprint + self.method.seed, view.present.shape[1])
        return Keep(top(scores, self.method.budget(view.layout.visual.total), view.present))


def draw(seeds: Tensor, count: int) -> Tensor:
    """Uniform numbers in [0, 1), fp64 (B, count), from int seeds (B,): SplitMix64, a counter-based generator.

    Number j of a row depends on its seed and j alone, on every device.
    """
    state = _mix(seeds)[:, None] + (torch.arange(count, device=seeds.device) + 1) * _GOLDEN
    return (_mix(state) >> 11 & (1 << 53) - 1).double() / (1 << 53)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * -4658895280553007687
    z = (z ^ _shift(z, 27)) * -7723592293110705685
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of signed 64-bit integers."""
    return z >> bits & (1 << 64 - bits) - 1
