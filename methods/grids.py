"""What methods share that turn each image into a coarser grid of new tokens."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor, sqrt
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


def scaled(budget: int, rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns that an image of so many has when it is made smaller at its own aspect.

    Its sides are those that make as many cells as the ``budget``, rounded up or down to the most cells within it, of
    several grids to the nearest. An image processor, which rounds both down, makes no more.
    """
    scale = sqrt(budget / (rows * columns))
    high = max(rows * scale, 1)
    wide = max(min(columns * scale, budget / high), 1)
    high = min(high, budget / wide)
    sides = [(floor(side), min(ceil(side), most)) for side, most in ((high, rows), (wide, columns))]
    grids = [(h, w) for h in sides[0] for w in sides[1] if h * w <= budget]
    return max(grids, key=lambda grid: (grid[0] * grid[1], -abs(grid[0] - high)))


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
        return grid_within(self.cells(rows * columns), rows, columns)

    def cells(self, patches: int) -> int:
        """The most of them for an image of so many ``patches``."""
        budget = per_image(self, patches)
        self.require(budget >= 1, AT_LEAST)
        return budget

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
