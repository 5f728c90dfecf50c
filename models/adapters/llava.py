"""LLaVA-1.5: one square image through CLIP or SigLIP; Pixtral 12B: images of any shape through its own tower."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from ...errors import InputError
from .base import Family, Images, VisionGeometry
from .mistral3 import PIXTRAL

# SigLIP has no CLS token: the strategy "default" would drop a patch instead.
CLIP_OR_SIGLIP = {"clip_vision_model": "default", "siglip_vision_model": "full"}


def clip(config: Any, projector_macs: int) -> VisionGeometry:
    """Sizes of a CLIP or SigLIP tower; ``projector_macs``: for a token."""
    vision, layers = config.vision_config, config.vision_feature_layer
    # hidden_states[0] is the embedding: hidden_states[f] is the output of block f - 1, and from the end for f < 0.
    numbers = [layers] if isinstance(layers, int) else layers
    blocks = tuple(number - 1 if number >= 0 else vision.num_hidden_layers + number for number in numbers)
    return VisionGeometry(
        layers=vision.num_hidden_layers,
        hidden=vision.hidden_size,
        heads=vision.num_attention_heads,
        intermediate=vision.intermediate_size,
        tokens=(vision.image_size // vision.patch_size) ** 2,
        patch_inputs=vision.num_channels * vision.patch_size**2,
        has_cls=getattr(config, "vision_feature_select_strategy", "default") == "default",
        feature_block=max(blocks),
        joined_blocks=blocks if len(blocks) > 1 else (),
        projector_macs=projector_macs,
    )


def whole_images(vision: VisionGeometry, config: Any, visual_tokens: int, batch: int) -> Images:
    """Images of one size, each of equally many tokens."""
    size = config.vision_config.image_size
    images, rest = divmod(visual_tokens, vision.tokens)
    if rest:
        raise InputError(
            f"{visual_tokens} visual tokens are no whole images of {vision.tokens}: give a multiple of that"
        )
    height, width = (size, size) if isinstance(size, int) else size
    return Images((batch * images, 3, height, width), {})


def interpolated(config: Any, given: Mapping[str, Any], pixels: Tensor, grids: Tensor) -> dict[str, Any]:
    """CLIP and SigLIP interpolate the embeddings of positions where they are told to."""
    return {"interpolate_pos_encoding": True}


def _square(config: Any, processor: Any, inputs: Mapping[str, Any], number: int, size: tuple[int, int]) -> list:
    side = config.vision_config.image_size // config.vision_config.patch_size
    return [[side, side, 1, 1, 0]]


def _with_cls(config: Any, projector_macs: int) -> VisionGeometry:
    """CLIP under the strategy "full": CLS becomes a visual token, in front of the patches."""
    sizes = clip(config, projector_macs)
    return replace(sizes, has_cls=True, cls_enters=True, tokens=sizes.tokens + 1)


def _cls_and_square(config: Any, processor: Any, inputs: Mapping[str, Any], number: int, size: tuple[int, int]) -> list:
    return [[1, 0, 1, 1, 1], *_square(config, processor, inputs, number, size)]


def _by_tower(config: Any) -> Family:
    return VARIANTS.get((config.vision_config.model_type, config.vision_feature_select_strategy), FAMILY)


FAMILY = Family(
    decoder="model.language_model",
    vision_tower="model.vision_tower",
    vision_blocks="model.vision_tower.encoder.layers",
    projector="model.multi_modal_projector",
    vision=clip,
    sides=("image", "tower", "vision", "projector"),
    smaller=interpolated,
    views=_square,
    images=whole_images,
    towers=CLIP_OR_SIGLIP | {"clip_vision_model": None, "pixtral": "full"},
    variant=_by_tower,
)

VARIANTS = {
    ("clip_vision_model", "full"): replace(FAMILY, vision=_with_cls, sides=("projector",), views=_cls_and_square),
    ("pixtral", "full"): replace(FAMILY, **PIXTRAL),
}
