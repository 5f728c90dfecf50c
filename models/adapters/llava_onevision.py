"""LLaVA-OneVision: as LLaVA-NeXT with a SigLIP tower; of several images in a prompt none is cut into tiles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from .base import Family, VisionGeometry
from .llava import clip
from .llava_next import base_and_tiles, packed, tiled_image, tiles


def _siglip(config: Any, projector_macs: int) -> VisionGeometry:
    return replace(clip(config, projector_macs), tiled=True)


def _packing(model: Any, vision: VisionGeometry, arguments: Mapping[str, Any]) -> list[tuple[Tensor, int, Tensor]]:
    sizes, several = arguments["image_sizes"], arguments.get("batch_num_images")
    numbers = [1] * len(sizes) if several is None else [int(number) for number in several]
    cut = [number == 1 for number in numbers for _ in range(number)]
    ratio = arguments.get("vision_aspect_ratio") or model.config.vision_aspect_ratio
    return packed(model, vision, sizes, cut, vision_aspect_ratio=ratio)


FAMILY = Family(
    decoder="model.language_model",
    vision_tower="model.vision_tower",
    vision_blocks="model.vision_tower.encoder.layers",
    projector="model.multi_modal_projector",
    vision=_siglip,
    sides=("image", "tower", "vision", "projector"),
    grids=tiles,
    packing=_packing,
    views=base_and_tiles,
    images=tiled_image,
    towers={"siglip_vision_model": "full"},
)
