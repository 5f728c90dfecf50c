"""Qwen2.5-VL: as Qwen2-VL, with attention in windows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers.vision_utils import get_vision_window_index

from .base import VisionGeometry
from .qwen2_vl import FAMILY as QWEN2_VL
from .qwen2_vl import vit


def _windowed(config: Any, projector_macs: int) -> VisionGeometry:
    vision = config.vision_config
    return vit(
        config,
        projector_macs,
        hidden=vision.hidden_size,
        intermediate=vision.intermediate_size,
        ffn_matrices=3,
        # Windows hold whole tokens.
        window=vision.window_size // vision.spatial_merge_size // vision.patch_size * vision.spatial_merge_size,
        full_blocks=tuple(vision.fullatt_block_indexes),
    )


def _windows(config: Any, grids: Tensor) -> Tensor:
    vision = config.vision_config
    taken, _ = get_vision_window_index(grids, vision.spatial_merge_size, vision.window_size, vision.patch_size)
    return taken.argsort()


FAMILY = replace(QWEN2_VL, vision=_windowed, order=_windows, towers={"qwen2_5_vl_vision": None})
