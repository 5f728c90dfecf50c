"""What methods share that turn each image into a coarser grid of new tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .base import Budgeted, OnImages
from .pieces import added_need_renumbering, per_image

if TYPE_CHECKING:
    from ..engine.contract import Geometry

AT_LEAST = "the budget must be at least 1 token an image"


def grid_within(budget: int, rows: int, columns: int | None = None) -> tuple[int, int]:
    """Rows and columns of the grid of most cells within the budget, for tokens of so many ``rows`` and ``columns``.

    Without ``columns`` there are as many as rows.
    Cells are no wider than high, and no more than twice as high as wide. Of several grids the one of most rows.
    """
    columns = columns or rows
    grids = [(1, 1)]
    for h in range(1, rows + 1):
        widest = min(budget // h, max(2 * h * columns // rows, 1), columns)
        if widest and h * h * columns <= budget * rows:
            grids.append((h, widest))
    return max(grids, key=lambda grid: (grid[0] * grid[1], grid[0]))


@dataclass(frozen=True)
class Gridded(OnImages, Budgeted):
    """A method that makes of the grid of an image's patches the largest :meth:`grid` within its budget.

    The tokens get new positions.
    """

    vision_blocks = ()
    positions = "renumber"

    def __post_init__(self) -> None:
        super().__post_init__()
        added_need_renumbering(self)

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns that ``rows`` × ``columns`` patches become."""
        budget = per_image(self, rows * columns)
        self.require(budget >= 1, AT_LEAST)
        return grid_within(budget, rows, columns)

    def check(self, geometry: Geometry) -> None:
        super().check(geometry)
        self.require(self.tokens != 0, AT_LEAST)
        if geometry.vision is None or not geometry.vision.tokens:
            return
        tokens, side = geometry.vision.tokens, geometry.vision.grid
        self.require(side * side == tokens, f"needs a square grid of patches, and this model has {tokens} an image")
        self.grid(side, side)

    def unit_left(self, grid: tuple[int, int, int]) -> int:
        rows, columns = self.grid(*grid[1:])
        return grid[0] * rows * columns
