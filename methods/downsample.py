"""Downsampling of the image itself: fewer patches for vision tower, projector and decoder alike.

    the pixels of an image are resized (bicubic, antialiased) to h × w patches, and the tower interpolates its position
    embeddings to that grid
    h × w: as for pooling, the largest grid within the budget that is at most twice as wide as high

So it is compared at the number of visual tokens that the decoder really gets, and saves compute in the tower besides.
The tokens get new positions.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.functional import interpolate

from .base import Budgeted, Forward, Positions
from .pieces import added_need_renumbering, grid_within, left_of_grid, needs_grid, per_image, precise
from .registry import register

if TYPE_CHECKING:
    from ..engine.layout import TokenLayout
    from ..models.adapters import Geometry, VisionGeometry


@register
@dataclass(frozen=True)
class Downsample(Budgeted):
    """Show the vision tower a smaller image."""

    name = "downsample"
    title = "Smaller image"
    stage = ("image",)
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

    def image(self, pixels: Tensor, vision: VisionGeometry) -> Tensor | None:
        rows, columns = grid_within(per_image(self, vision.tokens), vision.grid)
        if rows == columns == vision.grid:
            return None
        patch = pixels.shape[-1] // vision.grid
        size = (rows * patch, columns * patch)
        smaller = interpolate(precise(pixels), size, mode="bicubic", align_corners=False, antialias=True)
        return smaller.to(pixels.dtype)
