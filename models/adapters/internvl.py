"""InternVL 2.5 and 3: tiles of one size, patches shuffled together into tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .base import Family, VisionGeometry
from .llava import whole_images


def _intern_vit(config: Any, projector_macs: int) -> VisionGeometry:
    vision, merged = config.vision_config, round(config.downsample_ratio**-2)
    patches = (vision.image_size[0] // vision.patch_size[0]) * (vision.image_size[1] // vision.patch_size[1])
    return VisionGeometry(
        layers=vision.num_hidden_layers,
        hidden=vision.hidden_size,
        heads=vision.num_attention_heads,
        intermediate=vision.intermediate_size,
        tokens=patches // merged,
        patch_inputs=vision.num_channels * vision.patch_size[0] * vision.patch_size[1],
        has_cls=config.vision_feature_select_strategy == "default",
        feature_block=vision.num_hidden_layers - 1,
        projector_macs=projector_macs,
        merged=merged,
        squares=True,
    )


def canvas(processor: Any, size: tuple[int, int], rows: int, columns: int, arranged: Callable | None = None) -> list:
    """Tiles of the stretched image, ``rows`` × ``columns`` tokens each; then, if there are several, the whole.

    ``arranged``: the processor's choice of tiles, by default that of InternVL's and Aya Vision's.
    """
    from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

    # The processors always have tiles cut, whatever ``crop_to_patches`` of the checkpoint's image processor says.
    tile = (processor.size["height"], processor.size["width"])
    across, down = (arranged or get_optimal_tiled_canvas)(
        size[::-1], tile, processor.min_patches, processor.max_patches
    )
    return [[rows, columns, down, across, 0], *([[rows, columns, 1, 1, 0]] if down * across > 1 else [])]


def _views(config: Any, processor: Any, inputs: Mapping[str, Any], number: int, size: tuple[int, int]) -> list:
    vision, merge = config.vision_config, round(1 / config.downsample_ratio)
    sides = zip(vision.image_size, vision.patch_size, strict=True)
    return canvas(processor, size, *(side // patch // merge for side, patch in sides))


FAMILY = Family(
    decoder="model.language_model",
    vision_tower="model.vision_tower",
    vision_blocks="model.vision_tower.encoder.layer",
    projector="model.multi_modal_projector",
    vision_norm="layernorm_after",
    vision_attention="attention",
    vision_scale="lambda_2",
    vision=_intern_vit,
    sides=("image", "tower", "vision", "projector"),
    views=_views,
    images=whole_images,
    towers={"internvl_vision": "default"},
)
