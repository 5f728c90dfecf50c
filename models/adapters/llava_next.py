"""LLaVA-NeXT: a small whole image, then tiles without their padding, a newline behind each row of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from .base import Family, Images, VisionGeometry
from .llava import CLIP_OR_SIGLIP, clip


def _tiles(vision: VisionGeometry, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    pixels = args[0] if args else kwargs["pixel_values"]
    return torch.tensor([[1, vision.grid, vision.grid]]).expand(pixels.shape[0], -1)


def _base_and_tiles(config: Any, processor: Any, inputs: Mapping[str, Any], number: int, size: tuple[int, int]) -> list:
    """The whole image, then all tiles as one grid without the rows or columns of padding, a newline behind each row."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    side = config.vision_config.image_size // config.vision_config.patch_size
    tall, wide = size[::-1]
    down, across = get_anyres_image_grid_shape(
        (tall, wide), config.image_grid_pinpoints, config.vision_config.image_size
    )
    rows, columns = unpad_image(torch.empty(1, down * side, across * side), (tall, wide)).shape[1:]
    return [[side, side, 1, 1, 0], [rows, columns, 1, 1, 1]]


def _tiled_image(vision: VisionGeometry, config: Any, visual_tokens: int, batch: int) -> Images:
    """One image a row, of a shape that is cut into tiles without padding: those and a small whole, lines ended."""
    tile, side = config.vision_config.image_size, vision.grid
    shapes = {}
    for height, width in config.image_grid_pinpoints:
        rows, columns = height // tile * side, width // tile * side
        shapes[side**2 + rows * (columns + 1)] = (height, width)
    if visual_tokens not in shapes:
        known = ", ".join(map(str, sorted(shapes)))
        raise InputError(f"no image shape gives {visual_tokens} visual tokens: choose one of {known}")
    height, width = shapes[visual_tokens]
    tiles = 1 + (height // tile) * (width // tile)
    sizes = torch.tensor([[height, width]]).expand(batch, -1)
    grids = torch.tensor([[1, side, side]]).expand(tiles, -1)
    return Images((batch, tiles, 3, tile, tile), {"image_sizes": sizes}, grids)


FAMILY = Family(
    decoder="model.language_model",
    vision_tower="model.vision_tower",
    vision_blocks="model.vision_tower.encoder.layers",
    projector="model.multi_modal_projector",
    vision=clip,
    grids=_tiles,
    views=_base_and_tiles,
    images=_tiled_image,
    towers=CLIP_OR_SIGLIP,
)
