"""Downsampling of the image itself: fewer patches for vision tower, projector and decoder alike.

    the pixels of an image are resized (bicubic, antialiased) to h × w tokens, and the tower does with them what it does
    with an image of that size
    h × w: where images have any shape, the largest grid within the budget at the image's own aspect; else as for
    pooling the largest that is at most twice as wide as high, and the largest square where the model makes tokens of
    squares of patches, and takes these out of a square

So it is compared at the number of visual tokens that the decoder really gets, and saves compute in the tower besides.
The tokens get new positions: those that the model gives the tokens of an image of that size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import isqrt, prod
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.functional import interpolate

from .grids import Gridded, scaled
from .pieces import precise
from .registry import register

if TYPE_CHECKING:
    from ..engine.contract import Geometry, Grid, ImageShape, TokenLayout, VisionGeometry


@register("downsample", "Smaller image")
class Downsample(Gridded):
    """Show the vision tower a smaller image."""

    hook_points = ("image",)

    def smaller(self, grid: Grid, vision: VisionGeometry) -> Grid:
        if not vision.tokens:
            return (grid[0], *scaled(self.cells(grid[1] * grid[2]), *grid[1:]))
        rows, columns = self.grid(*grid[1:])
        side = isqrt(rows * columns)
        return (grid[0], side, side) if vision.squares else (grid[0], rows, columns)

    def images(self, layout: TokenLayout, geometry: Geometry) -> Sequence[Sequence[ImageShape]] | None:
        images, vision = super().images(layout, geometry), geometry.vision
        if images is None or vision is None:
            return None
        return [
            [
                replace(one, units=tuple(self.smaller(unit, vision) for unit in one.padded or one.units), padded=())
                for one in row
            ]
            for row in images
        ]

    def unit_left(self, grid: Grid) -> int:
        return prod(grid)

    def image(self, pixels: Tensor, grid: Grid, vision: VisionGeometry) -> Tensor | None:
        small = self.smaller(grid, vision)
        if small == grid:
            return None
        sides = zip(pixels.shape[2:], grid[1:], small[1:], strict=True)
        size = [side // before * after for side, before, after in sides]
        smaller = interpolate(precise(pixels), size, mode="bicubic", align_corners=False, antialias=True)
        return smaller.to(pixels.dtype)
