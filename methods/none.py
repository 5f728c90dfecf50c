"""The dense model: nothing is pruned. Every table's first row."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..engine.contract import Forward, Method
from .registry import register

if TYPE_CHECKING:
    from ..engine.contract import Geometry, TokenLayout


@register
@dataclass(frozen=True)
class Dense(Method):
    """The model as it is."""

    name = "none"
    title = "Dense (no pruning)"
    everything = ""

    def left(self, layout: "TokenLayout", geometry: "Geometry") -> dict[int, Tensor]:
        return {}

    def begin(self, layout: "TokenLayout", geometry: "Geometry") -> Forward:
        return Forward()
