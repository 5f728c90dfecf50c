"""Qwen3-VL: as Qwen2-VL; features from inside the tower are added behind early decoder layers (deepstack)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .base import VisionGeometry
from .qwen2_vl import FAMILY as QWEN2_VL
from .qwen2_vl import vit


def _deep(config: Any, projector_macs: int) -> VisionGeometry:
    vision = config.vision_config
    return vit(
        config,
        projector_macs,
        hidden=vision.hidden_size,
        intermediate=vision.intermediate_size,
        # Features from inside the tower go through mergers of their own, of the same sizes.
        inner_macs=projector_macs * len(vision.deepstack_visual_indexes),
        inner_blocks=tuple(vision.deepstack_visual_indexes),
    )


FAMILY = replace(
    QWEN2_VL,
    features="model.visual.merger.linear_fc1",
    vision=_deep,
    deepstack=True,
    inner_projectors="model.visual.deepstack_merger_list",
    tower_outputs=("pooler_output", "deepstack_features"),
    towers={"qwen3_vl_vision": None},
)
