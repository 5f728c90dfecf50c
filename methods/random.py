"""Random visual tokens: the reference that every method has to beat.

Each sample draws its own set from ``seed`` and a hash of its inputs, so that the set does not depend on the batch.
The tokens that stay keep their order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .base import Scored
from .registry import register

if TYPE_CHECKING:
    from ..engine.contract import LayerView

_GOLDEN = -7046029254386353131  # 2^64 / golden ratio as a signed 64-bit integer


@register("random", "Random tokens")
class Random(Scored):
    """Keep a random set of visual tokens at the input of one decoder layer (option ``layer``)."""

    hook_points = ("decoder",)
    examples = ("keep=0.5", "tokens=5,layer=3,positions=renumber")

    layer: int = 0
    seed: int = 0

    def score(self, view: LayerView) -> Tensor:
        return draw(view.layout.fingerprint + self.seed, view.present.shape[1])


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
