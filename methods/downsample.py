"""Downsampling of the image itself: fewer patches for vision tower, projector and decoder alike.

    the pixels of an image are resized (bicubic, antialiased) to h × w patches, and the tower interpolates its position
    embeddings to that grid
    h × w: as for pooling, the largest grid within the budget that is at most twice as wide as high

So it is compared at the number of visual tokens that the decoder really gets, and saves compute in the tower besides.
The tokens get new positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.functional import interpolate

from .grids import Gridded
from .pieces import precise
from .registry import register

if TYPE_CHECKING:
    from ..engine.contract import VisionGeometry


@register("downsample", "Smaller image")
class Downsample(Gridded):
    """Show the vision tower a smaller image."""

    hook_points = ("image",)

    def tower_tokens(self, vision: VisionGeometry) -> list[tuple[int, int]]:
        rows, columns = self.grid(vision.grid, vision.grid)
        return [(rows * columns + vision.has_cls,) * 2] * vision.layers

    def image(self, pixels: Tensor, vision: VisionGeometry) -> Tensor | None:
        rows, columns = self.grid(vision.grid, vision.grid)
        if rows == columns == vision.grid:
            return None
        patch = pixels.shape[-1] // vision.grid
        size = (rows * patch, columns * patch)
        smaller = interpolate(precise(pixels), size, mode="bicubic", align_corners=False, antialias=True)
        return smaller.to(pixels.dtype)
