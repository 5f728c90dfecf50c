"""Qwen3-VL: images and videos of any shape, whose features from inside the tower are added behind early layers."""

from __future__ import annotations

from typing import Any

from .base import Family, VisionGeometry
from .qwen2_5_vl import grid_image, grids, merged
from .qwen2_vl import in_order


def _qwen3_vit(config: Any, projector_macs: int) -> VisionGeometry:
    vision = config.vision_config
    return VisionGeometry(
        layers=vision.depth,
        hidden=vision.hidden_size,
        heads=vision.num_heads,
        intermediate=vision.intermediate_size,
        tokens=0,
        patch_inputs=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
        has_cls=False,
        feature_block=vision.depth - 1,
        projector_macs=projector_macs,
        merged=vision.spatial_merge_size**2,
        # Features from inside the tower go through mergers of their own, of the same sizes.
        inner_macs=projector_macs * len(vision.deepstack_visual_indexes),
    )


FAMILY = Family(
    decoder="model.language_model",
    vision_tower="model.visual",
    vision_blocks="model.visual.blocks",
    projector="model.visual.merger",
    video_token="video_token_id",
    features="model.visual.merger.linear_fc1",
    vision_attention="attn",
    vision=_qwen3_vit,
    sides=("vision", "projector"),
    order=in_order,
    grids=grids,
    views=merged,
    images=grid_image,
    towers={"qwen3_vl_vision": None},
)
