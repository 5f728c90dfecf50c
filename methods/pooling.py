"""Average pooling of the token grid: the plainest way to fewer visual tokens, and a reference for every other.

    the patches of an image, g × g, become h × w means over equal, where need be overlapping, rectangles
    h × w: of all grids within the budget and at most twice as wide as high, the one of most cells, the squarest first

Pooling takes place in front of the projector, row by row; the pooled tokens get new positions. It needs the patches to
form a square grid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import adaptive_avg_pool2d

from ..engine.contract import Merge
from .base import OnPatches
from .grids import Gridded
from .pieces import precise
from .registry import register

if TYPE_CHECKING:
    from ..engine.contract import VisionView


@register("pooling", "Average pooling")
class Pooling(OnPatches, Gridded):
    """Average the features over the cells of a coarser grid."""

    hook_points = ("vision",)
    positions = "renumber"

    def vision(self, view: VisionView) -> Merge | None:
        images, _, size = view.features.shape
        _, rows, columns = view.grid
        grid = self.grid(rows, columns)
        if grid == (rows, columns):
            return None
        cells = precise(view.features).transpose(1, 2).reshape(images, size, rows, columns)
        means = adaptive_avg_pool2d(cells, grid).flatten(2).transpose(1, 2)
        return Merge(torch.zeros_like(view.present), added=means.to(view.features.dtype), counts=(0,) * images)
