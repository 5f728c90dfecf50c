"""The dense model: nothing is pruned. Every table's first row."""

from typing import TYPE_CHECKING

from torch import Tensor

from ..engine.contract import Method
from .registry import register

if TYPE_CHECKING:
    from ..engine.contract import Geometry, TokenLayout


@register("none", "Dense (no pruning)")
class Dense(Method):
    """The model as it is."""

    everything = ""

    def left(self, layout: "TokenLayout", geometry: "Geometry") -> dict[int, Tensor]:
        return {}
