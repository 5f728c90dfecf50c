"""DeepSeek-VL: square images through SigLIP, each patch a token."""

from __future__ import annotations

from .base import Family
from .gemma3 import siglip
from .llava import interpolated, whole_images

FAMILY = Family(
    decoder="model.language_model",
    vision_tower="model.vision_model",
    vision_blocks="model.vision_model.encoder.layers",
    projector="model.aligner",
    vision=siglip,
    sides=("image", "tower", "vision", "projector"),
    smaller=interpolated,
    images=whole_images,
    towers={"siglip_vision_model": None},
    example={"vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False}},
)
