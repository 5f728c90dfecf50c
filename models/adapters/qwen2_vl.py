"""Qwen2-VL: images of any shape, in whole attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor, arange

from .base import Family, VisionGeometry
from .qwen2_5_vl import grid_image, grids, merged


def _vit(config: Any, projector_macs: int) -> VisionGeometry:
    vision = config.vision_config
    return VisionGeometry(
        layers=vision.depth,
        hidden=vision.embed_dim,
        heads=vision.num_heads,
        intermediate=int(vision.embed_dim * vision.mlp_ratio),
        tokens=0,
        patch_inputs=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
        has_cls=False,
        feature_block=vision.depth - 1,
        projector_macs=projector_macs,
        merged=vision.spatial_merge_size**2,
    )


def in_order(config: Any, grids: Tensor) -> Tensor:
    """Tokens of all images one behind the other, row by row."""
    return arange(int(grids.prod(1).sum()) // config.vision_config.spatial_merge_size**2)


FAMILY = Family(
    decoder="model.language_model",
    vision_tower="model.visual",
    vision_blocks="model.visual.blocks",
    projector="model.visual.merger",
    video_token="video_token_id",
    features="model.visual.merger.mlp",
    vision_attention="attn",
    vision=_vit,
    sides=("vision", "projector"),
    grids=grids,
    order=in_order,
    views=merged,
    images=grid_image,
    towers={"qwen2_vl_vision": None},
)
