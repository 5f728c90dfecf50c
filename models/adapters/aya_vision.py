"""Aya Vision: tiles of one size through SigLIP, patches shuffled together into tokens; layers with sliding windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import Family, VisionGeometry
from .gemma3 import siglip
from .internvl import canvas
from .llava import whole_images


def _shuffled(config: Any, projector_macs: int) -> VisionGeometry:
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    return siglip(config, projector_macs, tokens=patches // config.downsample_factor**2)


def _views(config: Any, processor: Any, inputs: Mapping[str, Any], number: int, size: tuple[int, int]) -> list:
    side = config.vision_config.image_size // config.vision_config.patch_size // config.downsample_factor
    return canvas(processor, size, side, side)


FAMILY = Family(
    decoder="model.language_model",
    vision_tower="model.vision_tower",
    vision_blocks="model.vision_tower.encoder.layers",
    projector="model.multi_modal_projector",
    vision=_shuffled,
    views=_views,
    images=whole_images,
    towers={"siglip_vision_model": "full"},
    example={
        "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False},
        "vision_feature_select_strategy": "full",
    },
)
