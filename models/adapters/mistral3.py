"""Mistral Small 3.1 with Pixtral's tower: images of any shape, a break behind each row of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from .base import Family, Images, VisionGeometry


def pixtral(config: Any, projector_macs: int) -> VisionGeometry:
    """Sizes of Pixtral's tower; LLaVA makes a token of each patch."""
    vision = config.vision_config
    return VisionGeometry(
        layers=vision.num_hidden_layers,
        hidden=vision.hidden_size,
        heads=vision.num_attention_heads,
        intermediate=vision.intermediate_size,
        tokens=0,
        patch_inputs=vision.num_channels * vision.patch_size**2,
        has_cls=False,
        feature_block=vision.num_hidden_layers - 1,
        projector_macs=projector_macs,
        merged=_merge(config) ** 2,
        ffn_matrices=3,
        one_sequence=True,
    )


def _merge(config: Any) -> int:
    return getattr(config, "spatial_merge_size", 1)


def sized(vision: VisionGeometry, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    if (sizes := kwargs.get("image_sizes")) is None:  # as the tower takes it: no image is padded
        pixels = next(value for value in (*args, kwargs.get("pixel_values")) if value is not None)
        sizes = [pixels.shape[-2:]] * len(pixels)
    sizes = torch.as_tensor(sizes) // isqrt(vision.patch_inputs // 3)
    return torch.cat([torch.ones_like(sizes[:, :1]), sizes], dim=1).cpu()


def sized_image(vision: VisionGeometry, config: Any, visual_tokens: int, batch: int) -> Images:
    """One image a row, as square as its number of tokens allows."""
    merge, patch = _merge(config), config.vision_config.patch_size
    rows = max(n for n in range(1, isqrt(visual_tokens) + 1) if visual_tokens % n == 0)
    sides = [rows * merge, visual_tokens // rows * merge]
    sizes = torch.tensor([[side * patch for side in sides]])
    shape = (batch, 3, *sizes[0].tolist())
    return Images(shape, {"image_sizes": sizes.expand(batch, -1)})


def rows_of_tokens(config: Any, processor: Any, inputs: Mapping[str, Any], number: int, size: tuple[int, int]) -> list:
    """By the sizes in the inputs, or by the patches that a trace has seen."""
    patches = inputs.get("image_grid_thw")
    sides = inputs["image_sizes"][number] // config.vision_config.patch_size if patches is None else patches[number][1:]
    rows, columns = (int(side) // _merge(config) for side in sides)
    return [[rows, columns, 1, 1, 0]]


# What follows from the tower, in whichever model it stands.
PIXTRAL: dict[str, Any] = {
    "vision_blocks": "model.vision_tower.transformer.layers",
    "vision": pixtral,
    "sides": ("projector",),
    "grids": sized,
    "views": rows_of_tokens,
    "images": sized_image,
}

FAMILY = Family(
    decoder="model.language_model",
    vision_tower="model.vision_tower",
    projector="model.multi_modal_projector",
    towers={"pixtral": None},
    **PIXTRAL,
)
