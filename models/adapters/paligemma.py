"""PaliGemma: a square image through SigLIP, and a prompt that is seen in both directions; positions begin at 1."""

from __future__ import annotations

from typing import Any

from .base import Family, VisionGeometry
from .gemma3 import siglip
from .llava import FAMILY as LLAVA


def _plain(config: Any, projector_macs: int) -> VisionGeometry:
    return siglip(config, projector_macs)


FAMILY = Family(
    decoder="model.language_model",
    vision_tower="model.vision_tower",
    vision_blocks="model.vision_tower.encoder.layers",
    projector="model.multi_modal_projector",
    vision=_plain,
    bidirectional=True,
    first_position=1,
    token_type=0,
    scales_logits=True,
    views=LLAVA.views,
    images=LLAVA.images,
    towers={"siglip_vision_model": None},
    example={"vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False}},
)
