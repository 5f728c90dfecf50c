"""GLM-4.1V: images of any shape, 2 × 2 patches made into a token by a convolution."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .base import VisionGeometry
from .qwen2_vl import FAMILY as QWEN2_VL
from .qwen2_vl import vit


def _glm_vit(config: Any, projector_macs: int) -> VisionGeometry:
    vision = config.vision_config
    convolution = vision.spatial_merge_size**2 * vision.hidden_size * vision.out_hidden_size
    return vit(
        config,
        projector_macs + convolution,
        hidden=vision.hidden_size,
        # Not ``intermediate_size``, which is that of the merger.
        intermediate=vision.out_hidden_size,
        ffn_matrices=3,
    )


FAMILY = replace(
    QWEN2_VL,
    vision=_glm_vit,
    sides=(),
    features=None,
    order=None,
    video_token=None,
    towers={"glm4v_vision": None},
)
