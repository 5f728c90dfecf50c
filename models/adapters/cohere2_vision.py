"""Command A Vision: as Aya Vision, with another choice of tiles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .aya_vision import FAMILY as _AYA_VISION
from .internvl import canvas


def _views(config: Any, processor: Any, inputs: Mapping[str, Any], number: int, size: tuple[int, int]) -> list:
    from transformers.models.cohere2_vision.image_processing_cohere2_vision import get_optimal_tiled_canvas

    side = config.vision_config.image_size // config.vision_config.patch_size // config.downsample_factor
    return canvas(processor, size, side, side, get_optimal_tiled_canvas)


FAMILY = replace(
    _AYA_VISION,
    views=_views,
    towers={"siglip_vision_model": None},
    example={"vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False}},
)
