"""Average pooling of the token grid: the plainest way to fewer visual tokens, and a reference for every other.

    the patches of an image, g × g, become h × w means over equal, where need be overlapping, rectangles
    h × w: of all grids within the budget and at most twice as wide as high, the one of most cells, the squarest first

Pooling takes place in front of the projector, row by row; the pooled tokens get new positions. It needs the patches to
form a square grid.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from .base import Budgeted, Forward, Merge, Positions
from .pieces import added_need_renumbering, grid_within, left_of_grid, needs_grid, per_image, precise
from .registry import register

if TYPE_CHECKING:
    from ..engine.layout import TokenLayout
    from ..engine.views import VisionView
    from ..models.adapters import Geometry


@register
@dataclass(frozen=True)
class Pooling(Budgeted):
    """Average the features over the cells of a coarser grid."""

    name = "pooling"
    title = "Average pooling"
    stage = ("vision",)
    vision_blocks = ()

    positions: Positions = dataclasses.field(default="renumber", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        added_need_renumbering(self)

    def check(self, geometry: Geometry) -> None:
        needs_grid(self, geometry)

    def left(self, layout: TokenLayout, geometry: Geometry) -> dict[int, Tensor]:
        return left_of_grid(self, layout, geometry)

    def begin(self, layout: TokenLayout, geometry: Geometry) -> Forward:
        return Forward()

    def vision(self, view: VisionView) -> Merge | None:
        images, patches, size = view.features.shape
        side = view.grid
        grid = grid_within(per_image(self, patches), side)
        if grid == (side, side):
            return None
        cells = precise(view.features).transpose(1, 2).reshape(images, size, side, side)
        means = adaptive_avg_pool2d(cells, grid).flatten(2).transpose(1, 2)
        return Merge(torch.zeros_like(view.present), added=means.to(view.features.dtype))
