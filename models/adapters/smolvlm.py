"""SmolVLM: tiles through a SigLIP tower without CLS, patches shuffled together into tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

from ...errors import InputError
from .base import Family, Images, VisionGeometry


def shuffled(config: Any, projector_macs: int) -> VisionGeometry:
    """A square tower without CLS, of whose patches ``scale_factor`` squared make a token."""
    vision, merged = config.vision_config, config.scale_factor**2
    return VisionGeometry(
        layers=vision.num_hidden_layers,
        hidden=vision.hidden_size,
        heads=vision.num_attention_heads,
        intermediate=vision.intermediate_size,
        tokens=(vision.image_size // vision.patch_size) ** 2 // merged,
        patch_inputs=vision.num_channels * vision.patch_size**2,
        has_cls=False,
        feature_block=vision.num_hidden_layers - 1,
        projector_macs=projector_macs,
        merged=merged,
        squares=True,
    )


def square_tiles(vision: VisionGeometry, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    """Padding among the tiles of a batch does not come as far as the tower."""
    side = round(vision.patches**0.5)
    pixels = args[0] if args else kwargs["pixel_values"]
    return torch.tensor([[1, side, side]]).expand(pixels.shape[0], -1)


def _padding(config: Any, given: Mapping[str, Any], pixels: Tensor, grids: Tensor) -> dict[str, Any]:
    """Patches of a smaller tile count where any of those behind them did."""
    mask, (_, *size) = given["patch_attention_mask"], grids[0].tolist()
    return {"patch_attention_mask": adaptive_max_pool2d(mask[:, None].float(), size)[:, 0].bool()}


def _tiles_and_whole(
    config: Any, processor: Any, inputs: Mapping[str, Any], number: int, size: tuple[int, int]
) -> list:
    """Tiles of the stretched image, then the whole of it; the whole alone where the processor cuts none."""
    vision = config.vision_config
    side = vision.image_size // vision.patch_size // config.scale_factor
    _, down, across = processor.get_number_of_image_patches(size[1], size[0])
    return [*([[side, side, down, across, 0]] if down else []), [side, side, 1, 1, 0]]


def tiles_of_rows(vision: VisionGeometry, config: Any, visual_tokens: int, batch: int) -> Images:
    """Tiles, row by row of the batch."""
    tiles, rest = divmod(visual_tokens, vision.tokens)
    if rest:
        raise InputError(f"{visual_tokens} tokens are no whole tiles of {vision.tokens}: give a multiple of that")
    size = config.vision_config.image_size
    return Images((batch, tiles, 3, size, size), {})


FAMILY = Family(
    decoder="model.text_model",
    vision_tower="model.vision_model",
    vision_blocks="model.vision_model.encoder.layers",
    projector="model.connector.modality_projection",
    vision=shuffled,
    sides=("image", "tower", "vision", "projector"),
    smaller=_padding,
    grids=square_tiles,
    views=_tiles_and_whole,
    images=tiles_of_rows,
    towers={"smolvlm_vision": None},
    # Of transformers' default sizes patches make no whole tokens.
    example={"vision_config": {"image_size": 384, "patch_size": 14}, "scale_factor": 3},
)
