"""LLaVA-OneVision: as LLaVA-NeXT with a SigLIP tower; of several images in a prompt none is cut into tiles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import sqrt
from typing import Any

import torch
from torch import Tensor, arange, cat, full

from .base import Family, VisionGeometry
from .llava import clip, interpolated
from .llava_next import base_and_tiles, four_tiles, packed, tiled_image, tiles

UNLIMITED = "anyres_max_1000000"
"""A limit of tiles that no image has."""


def _siglip(config: Any, projector_macs: int) -> VisionGeometry:
    return replace(clip(config, projector_macs), tiled=True)


def _packing(model: Any, vision: VisionGeometry, arguments: Mapping[str, Any]) -> list[tuple[Tensor, int, Tensor]]:
    if "image_sizes" not in arguments:
        return _videos(vision, *arguments["pixel_values_videos"].shape[:2])
    sizes, several = arguments["image_sizes"], arguments.get("batch_num_images")
    numbers = [1] * len(sizes) if several is None else [int(number) for number in several]
    cut = [number == 1 for number in numbers for _ in range(number)]
    ratio = arguments.get("vision_aspect_ratio") or model.config.vision_aspect_ratio
    own, whole = (packed(model, vision, sizes, cut, vision_aspect_ratio=limit) for limit in (ratio, UNLIMITED))
    return [_mixed(mine, *image, vision.tokens) for (mine, *_), image in zip(own, whole, strict=True)]


def _mixed(own: Tensor, whole: Tensor, tiles: int, every: Tensor, base: int) -> tuple[Tensor, int, Tensor]:
    """An image of too many tiles is made smaller behind the projector: all but its ``base`` tokens are mixtures."""
    if len(own) == len(whole):
        return whole, tiles, every
    behind = own[base:]
    return cat([own[:base], behind.where(behind < 0, -2)]), tiles, every


def _views(config: Any, processor: Any, inputs: Mapping[str, Any], number: int, size: tuple[int, int]) -> list:
    """As LLaVA-NeXT, the tiles' grid made smaller where it is over the limit; of several images a square and a newline.

    ``batch_num_images`` of ``inputs``: how many images each prompt has.
    """
    whole, (rows, columns, *once) = base_and_tiles(config, processor, inputs, number, size)
    counts = inputs.get("batch_num_images")
    if counts is not None and counts[int((torch.as_tensor(counts).cumsum(0) <= number).sum())] > 1:
        return [whole, [1, 0, *once]]
    limit = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
    ratio = sqrt(rows * columns / (limit * whole[0] ** 2))
    return [whole, [int(rows // ratio), int(columns // ratio), *once] if ratio > 1.1 else [rows, columns, *once]]


def _videos(vision: VisionGeometry, videos: int, frames: int) -> list[tuple[Tensor, int, Tensor]]:
    """Each frame is made half as wide and high behind the projector; one newline ends a video."""
    pooled = frames * ((vision.grid + 1) // 2) ** 2
    source = cat([full((pooled,), -2), full((1,), -1)])
    return [(source, frames, arange(frames * vision.tokens))] * videos


FAMILY = Family(
    decoder="model.language_model",
    vision_tower="model.vision_tower",
    vision_blocks="model.vision_tower.encoder.layers",
    projector="model.multi_modal_projector",
    video_token="video_token_id",
    vision=_siglip,
    sides=("image", "tower", "vision", "projector"),
    smaller=interpolated,
    grids=tiles,
    packing=_packing,
    views=_views,
    images=tiled_image,
    typical=four_tiles,
    towers={"siglip_vision_model": "full"},
)
