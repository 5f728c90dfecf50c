"""Downsampling of the image itself: fewer patches for vision tower, projector and decoder alike.

    the pixels of an image are resized (bicubic, antialiased) to h × w patches, and the tower interpolates its position
    embeddings to that grid
    h × w: as for pooling, the largest grid within the budget that is at most twice as wide as high; the largest square
    within it where the model makes tokens of squares of patches, and takes these out of a square

So it is compared at the number of visual tokens that the decoder really gets, and saves compute in the tower besides.
The tokens get new positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import isqrt, prod
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.functional import interpolate

from .grids import Gridded
from .pieces import precise
from .registry import register

if TYPE_CHECKING:
    from ..engine.contract import Geometry, Grid, ImageShape, TokenLayout, VisionGeometry


@register("downsample", "Smaller image")
class Downsample(Gridded):
    """Show the vision tower a smaller image."""

    hook_points = ("image",)

    def smaller(self, vision: VisionGeometry) -> tuple[int, int]:
        """Rows and columns of the tokens of an image or tile."""
        rows, columns = self.grid(vision.grid, vision.grid)
        side = isqrt(rows * columns)
        return (side, side) if vision.squares else (rows, columns)

    def images(self, layout: TokenLayout, geometry: Geometry) -> Sequence[Sequence[ImageShape]] | None:
        images = super().images(layout, geometry)
        if images is None or geometry.vision is None:
            return None
        unit = (1, *self.smaller(geometry.vision))
        return [
            [replace(one, units=(unit,) * len(one.padded or one.units), padded=()) for one in row] for row in images
        ]

    def unit_left(self, grid: Grid) -> int:
        return prod(grid)

    def tower_tokens(self, vision: VisionGeometry) -> list[tuple[int, int]]:
        return [(prod(self.smaller(vision)) * vision.merged + vision.has_cls,) * 2] * vision.layers

    def image(self, pixels: Tensor, vision: VisionGeometry) -> Tensor | None:
        rows, columns = self.smaller(vision)
        if rows == columns == vision.grid:
            return None
        patch = pixels.shape[-1] // vision.grid
        size = (rows * patch, columns * patch)
        smaller = interpolate(precise(pixels), size, mode="bicubic", align_corners=False, antialias=True)
        return smaller.to(pixels.dtype)
