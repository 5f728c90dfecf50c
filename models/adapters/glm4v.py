"""GLM-4.1V: images of any shape, 2 × 2 patches made into a token by a convolution."""

from __future__ import annotations

from typing import Any

from .base import Family, VisionGeometry
from .qwen2_5_vl import grid_image, grids, merged


def _glm_vit(config: Any, projector_macs: int) -> VisionGeometry:
    vision = config.vision_config
    merge = vision.spatial_merge_size**2
    return VisionGeometry(
        layers=vision.depth,
        hidden=vision.hidden_size,
        heads=vision.num_heads,
        # Not ``intermediate_size``, which is that of the merger.
        intermediate=vision.out_hidden_size,
        tokens=0,
        patch_inputs=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
        has_cls=False,
        feature_block=vision.depth - 1,
        projector_macs=projector_macs + merge * vision.hidden_size * vision.out_hidden_size,
        merged=merge,
        ffn_matrices=3,
    )


FAMILY = Family(
    decoder="model.language_model",
    vision_tower="model.visual",
    vision_blocks="model.visual.blocks",
    projector="model.visual.merger",
    vision=_glm_vit,
    grids=grids,
    views=merged,
    images=grid_image,
    towers={"glm4v_vision": None},
)
