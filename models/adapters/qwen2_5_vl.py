"""Qwen2.5-VL: images of any shape, attention in windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_window_index

from .base import Family, Images, VisionGeometry


def _qwen_vit(config: Any, projector_macs: int) -> VisionGeometry:
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
        ffn_matrices=3,
        # Windows hold whole tokens.
        window=vision.window_size // vision.spatial_merge_size // vision.patch_size * vision.spatial_merge_size,
        full_blocks=tuple(vision.fullatt_block_indexes),
    )


def grids(vision: VisionGeometry, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    return kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]


def _windows(config: Any, grids: Tensor) -> Tensor:
    vision = config.vision_config
    taken, _ = get_vision_window_index(grids, vision.spatial_merge_size, vision.window_size, vision.patch_size)
    return taken.argsort()


def merged(config: Any, processor: Any, inputs: Mapping[str, Any], number: int, size: tuple[int, int]) -> list:
    _, rows, columns = inputs["image_grid_thw"][number].tolist()
    merge = config.vision_config.spatial_merge_size
    return [[rows // merge, columns // merge, 1, 1, 0]]


def grid_image(vision: VisionGeometry, config: Any, visual_tokens: int, batch: int) -> Images:
    """One image a row, as square as its number of tokens allows."""
    rows = max(n for n in range(1, int(visual_tokens**0.5) + 1) if visual_tokens % n == 0)
    merge = config.vision_config.spatial_merge_size
    grid = torch.tensor([[1, rows * merge, visual_tokens // rows * merge]])
    shape = (batch * int(grid.prod()), vision.patch_inputs)
    return Images(shape, {"image_grid_thw": grid.expand(batch, -1)})


FAMILY = Family(
    decoder="model.language_model",
    vision_tower="model.visual",
    vision_blocks="model.visual.blocks",
    projector="model.visual.merger",
    video_token="video_token_id",
    features="model.visual.merger.mlp",
    vision_attention="attn",
    vision=_qwen_vit,
    sides=("vision", "projector"),
    order=_windows,
    grids=grids,
    views=merged,
    images=grid_image,
    towers={"qwen2_5_vl_vision": None},
)
