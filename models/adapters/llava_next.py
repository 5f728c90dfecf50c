"""LLaVA-NeXT: a small whole image, then tiles without their padding, a newline behind each row of tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

from ...errors import InputError
from .base import Family, Images, VisionGeometry
from .llava import CLIP_OR_SIGLIP, clip, interpolated


def _tiled(config: Any, projector_macs: int) -> VisionGeometry:
    return replace(clip(config, projector_macs), tiled=True)


def tiles(vision: VisionGeometry, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    pixels = args[0] if args else kwargs["pixel_values"]
    return torch.tensor([[1, vision.grid, vision.grid]]).expand(pixels.shape[0], -1)


def packed(
    model: Any, vision: VisionGeometry, sizes: Tensor, cut: list[bool], **options: Any
) -> list[tuple[Tensor, int, Tensor]]:
    """The model's own code packs the numbers of features in their place; -1 marks its newlines.

    ``sizes``: heights and widths (N, 2) of images; ``cut``: which are cut into tiles; ``options``: of that code.
    """
    shapes, side = model.config.image_grid_pinpoints, model.config.vision_config.image_size
    whole = [torch.tensor(select_best_resolution(size.tolist(), shapes)) for size in sizes]  # without padding
    counts = [1 + int((size // side).prod()) if tiles else 1 for size, tiles in zip(whole, cut, strict=True)]
    numbers = [torch.arange(count * vision.tokens, dtype=torch.float32).view(count, -1, 1) for count in counts]
    newline = torch.tensor([-1.0])
    unpadded, padded = (
        [image[:, 0].long() for image in model.pack_image_features(numbers, each, image_newline=newline, **options)[0]]
        for each in (sizes, whole)
    )
    every = (image[image >= 0] for image in padded)
    return list(zip(unpadded, counts, every, strict=True))


def _packing(model: Any, vision: VisionGeometry, arguments: Mapping[str, Any]) -> list[tuple[Tensor, int, Tensor]]:
    sizes = arguments["image_sizes"]
    return packed(model, vision, sizes, [True] * len(sizes), vision_feature_select_strategy="full")


def base_and_tiles(config: Any, processor: Any, inputs: Mapping[str, Any], number: int, size: tuple[int, int]) -> list:
    """The whole image, then all tiles as one grid without the rows or columns of padding, a newline behind each row."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    side = config.vision_config.image_size // config.vision_config.patch_size
    tall, wide = size[::-1]
    down, across = get_anyres_image_grid_shape(
        (tall, wide), config.image_grid_pinpoints, config.vision_config.image_size
    )
    rows, columns = unpad_image(torch.empty(1, down * side, across * side), (tall, wide)).shape[1:]
    return [[side, side, 1, 1, 0], [rows, columns, 1, 1, 1]]


def image_tokens(vision: VisionGeometry, config: Any, height: int, width: int) -> int:
    """Visual tokens of an image of so many pixels, one of the shapes that are cut into tiles without padding."""
    tile, side = config.vision_config.image_size, vision.grid
    rows, columns = height // tile * side, width // tile * side
    most = getattr(config, "vision_aspect_ratio", None)  # LLaVA-OneVision's limit of tiles, "anyres_max_9"
    if most is not None:
        shrink = math.sqrt(rows * columns / (int(most.removeprefix("anyres_max_")) * vision.tokens))
        rows, columns = (int(length // shrink) if shrink > 1.1 else length for length in (rows, columns))
    return vision.tokens + rows * (columns + 1)


def tiled_image(vision: VisionGeometry, config: Any, visual_tokens: int, batch: int) -> Images:
    """One image a row, of a shape that is cut into tiles without padding: those and a small whole, lines ended."""
    tile = config.vision_config.image_size
    shapes = {image_tokens(vision, config, *size): size for size in config.image_grid_pinpoints}
    if visual_tokens not in shapes:
        known = ", ".join(map(str, sorted(shapes)))
        raise InputError(f"no image shape gives {visual_tokens} visual tokens: choose one of {known}")
    height, width = shapes[visual_tokens]
    tiles = 1 + (height // tile) * (width // tile)
    sizes = torch.tensor([[height, width]]).expand(batch, -1)
    return Images((batch, tiles, 3, tile, tile), {"image_sizes": sizes})


def four_tiles(vision: VisionGeometry, config: Any) -> int:
    """Visual tokens of an image of 2 × 2 tiles, or of what comes nearest to that."""
    side = 2 * config.vision_config.image_size
    size = min(config.image_grid_pinpoints, key=lambda size: abs(size[0] - side) + abs(size[1] - side))
    return image_tokens(vision, config, *size)


FAMILY = Family(
    decoder="model.language_model",
    vision_tower="model.vision_tower",
    vision_blocks="model.vision_tower.encoder.layers",
    projector="model.multi_modal_projector",
    vision=_tiled,
    sides=("image", "tower", "vision", "projector"),
    smaller=interpolated,
    grids=tiles,
    packing=_packing,
    views=base_and_tiles,
    images=tiled_image,
    typical=four_tiles,
    towers=CLIP_OR_SIGLIP,
)
