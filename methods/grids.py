"""What methods share that turn each image into a coarser grid of new tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from .base import Budgeted
from .pieces import added_need_renumbering, per_image

if TYPE_CHECKING:
    from ..engine.contract import Geometry, TokenLayout


def grid_within(budget: int, side: int) -> tuple[int, int]:
    """Rows and columns of the grid of most cells within the budget: no wider than twice its height, nor than ``side``.

    Of several the squarest.
    """
    grids = [(h, min(budget // h, 2 * h, side)) for h in range(1, side + 1) if h * h <= budget]
    return max(grids, key=lambda grid: (grid[0] * grid[1], grid[0]))


@dataclass(frozen=True)
class Gridded(Budgeted):
    """A method that makes of the square grid of an image's patches the largest :meth:`grid` within its budget.

    The tokens get new positions.
    """

    vision_blocks = ()
    positions = "renumber"

    def __post_init__(self) -> None:
        super().__post_init__()
        added_need_renumbering(self)

    def grid(self, side: int) -> tuple[int, int]:
        """Rows and columns that ``side`` × ``side`` patches become."""
        return grid_within(per_image(self, side * side), side)

    def check(self, geometry: Geometry) -> None:
        if geometry.vision is None:
            return
        tokens, side = geometry.vision.tokens, geometry.vision.grid
        self.require(side * side == tokens, f"needs a square grid of patches, and this model has {tokens} an image")
        self.require(per_image(self, tokens) >= 1, "the budget must be at least 1 token an image")

    def left(self, layout: TokenLayout, geometry: Geometry) -> dict[int, Tensor]:
        assert geometry.vision is not None
        rows, columns = self.grid(geometry.vision.grid)
        return {0: layout.visual.host_counts // geometry.vision.tokens * (rows * columns)}
