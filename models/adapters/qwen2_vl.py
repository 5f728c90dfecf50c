"""Qwen2-VL: images and videos of any shape, in whole attention, 2 × 2 patches merged into a token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Family, Images, Patches, VisionGeometry


def vit(config: Any, projector_macs: int, *, hidden: int, intermediate: int, **more: Any) -> VisionGeometry:
    """Sizes of a tower of images of any shape; ``hidden`` and ``intermediate`` have another name in each family."""
    vision = config.vision_config
    return VisionGeometry(
        layers=vision.depth,
        hidden=hidden,
        heads=vision.num_heads,
        intermediate=intermediate,
        tokens=0,
        patch_inputs=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
        has_cls=False,
        feature_block=vision.depth - 1,
        projector_macs=projector_macs,
        merged=vision.spatial_merge_size**2,
        **more,
    )


def _vit(config: Any, projector_macs: int) -> VisionGeometry:
    width = config.vision_config.embed_dim
    return vit(config, projector_macs, hidden=width, intermediate=int(width * config.vision_config.mlp_ratio))


def _in_order(config: Any, grids: Tensor) -> Tensor:
    """Tokens of all images one behind the other, row by row."""
    return torch.arange(int(grids.prod(1).sum()) // config.vision_config.spatial_merge_size**2)


def _grids(vision: VisionGeometry, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    return kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]


def _views(config: Any, processor: Any, inputs: Mapping[str, Any], number: int, size: tuple[int, int]) -> list:
    _, rows, columns = inputs["image_grid_thw"][number].tolist()
    merge = config.vision_config.spatial_merge_size
    return [[rows // merge, columns // merge, 1, 1, 0]]


def _image(vision: VisionGeometry, config: Any, visual_tokens: int, batch: int) -> Images:
    """One image a row, as square as its number of tokens allows."""
    rows = max(n for n in range(1, int(visual_tokens**0.5) + 1) if visual_tokens % n == 0)
    merge = config.vision_config.spatial_merge_size
    grid = torch.tensor([[1, rows * merge, visual_tokens // rows * merge]])
    shape = (batch * int(grid.prod()), vision.patch_inputs)
    return Images(shape, {"image_grid_thw": grid.expand(batch, -1)})


def _images(config: Any, patches: Tensor, grid: Sequence[int]) -> Tensor:
    """Of a patch lie all channels and copies of the frame, of squares of patches those that become one token."""
    side, merge = config.vision_config.patch_size, config.vision_config.spatial_merge_size
    rows, columns = grid[1] // merge, grid[2] // merge
    parts = patches.unflatten(1, (-1, side, side)).unflatten(0, (-1, rows, columns, merge, merge))
    return parts.permute(0, 5, 1, 3, 6, 2, 4, 7).flatten(5).flatten(2, 4)


def _rows(config: Any, images: Tensor) -> Tensor:
    side, merge = config.vision_config.patch_size, config.vision_config.spatial_merge_size
    parts = images.unflatten(3, (-1, merge, side)).unflatten(2, (-1, merge, side))
    return parts.permute(0, 2, 5, 3, 6, 1, 4, 7).flatten(5).flatten(0, 4)


def _smaller(config: Any, given: Mapping[str, Any], pixels: Tensor, grids: Tensor) -> dict[str, Any]:
    return {"grid_thw": grids.to(given["grid_thw"])}


def _places(model: Any, visual: Tensor, valid: Tensor, grids: Tensor) -> Tensor:
    """By the model's own count, for which all that is visual is of images."""
    kinds = visual.long()
    places, _ = model.get_rope_index(kinds, kinds, image_grid_thw=grids, attention_mask=valid.long())
    return places.movedim(0, -1)


FAMILY = Family(
    decoder="model.language_model",
    vision_tower="model.visual",
    vision_blocks="model.visual.blocks",
    projector="model.visual.merger",
    video_token="video_token_id",
    features="model.visual.merger.mlp",
    vision_norm="norm2",
    vision_attention="attn",
    vision=_vit,
    sides=("image", "tower", "vision", "projector"),
    grids=_grids,
    smaller=_smaller,
    patches=Patches(_images, _rows),
    tower_outputs=("pooler_output",),
    places=_places,
    order=_in_order,
    views=_views,
    images=_image,
    towers={"qwen2_vl_vision": None},
)
