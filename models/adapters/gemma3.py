"""Gemma 3: square images through SigLIP, their patches averaged into tokens that see each other in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import Family, VisionGeometry
from .llava import whole_images


def siglip(config: Any, projector_macs: int, tokens: int | None = None) -> VisionGeometry:
    """A square tower without CLS, whose last block is used; ``tokens`` of an image, by default its patches."""
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    tokens = tokens or patches
    return VisionGeometry(
        layers=vision.num_hidden_layers,
        hidden=vision.hidden_size,
        heads=vision.num_attention_heads,
        intermediate=vision.intermediate_size,
        tokens=tokens,
        patch_inputs=vision.num_channels * vision.patch_size**2,
        has_cls=False,
        feature_block=vision.num_hidden_layers - 1,
        projector_macs=projector_macs,
        merged=patches // tokens,
    )


def _averaged(config: Any, projector_macs: int) -> VisionGeometry:
    # The projection is a bare matrix and no linear layer.
    macs = config.vision_config.hidden_size * config.text_config.hidden_size
    return siglip(config, macs, tokens=config.mm_tokens_per_image)


def _square(config: Any, processor: Any, inputs: Mapping[str, Any], number: int, size: tuple[int, int]) -> list:
    side = round(config.mm_tokens_per_image**0.5)
    return [[side, side, 1, 1, 0]]


FAMILY = Family(
    decoder="model.language_model",
    vision_tower="model.vision_tower",
    vision_blocks="model.vision_tower.encoder.layers",
    projector="model.multi_modal_projector",
    vision=_averaged,
    bidirectional=True,
    token_type=1,
    views=_square,
    images=whole_images,
    towers={"siglip_vision_model": None},
    example={"vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False}},
)
