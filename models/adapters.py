"""Where each model family keeps its parts, as data: one line a family, no subclassing.

The engine and the FLOPs counter read models only through an :class:`Adapter`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError, suggest
from .support import Towers, check_configuration


@dataclass(frozen=True)
class VisionGeometry:
    """Sizes of the vision tower and projector.

    ``tokens``: visual tokens of one image, or of one tile in a family that cuts images into tiles; 0 if they depend on
    the image. ``patches``: those of which the tower makes them, without CLS. ``merged``: patches in one token.
    ``projector_macs``: for one token. ``ffn_matrices``: 2, or 3 in a gated FFN. ``window``: patches along a side of the
    windows in which blocks attend, all but ``full_blocks`` of them; None: every block attends to the whole image.
    """

    layers: int
    hidden: int
    heads: int
    intermediate: int
    tokens: int
    patch_inputs: int
    has_cls: bool
    feature_block: int
    projector_macs: int
    merged: int = 1
    ffn_matrices: int = 2
    window: int | None = None
    full_blocks: int = 0

    @property
    def patches(self) -> int:
        """Patches of one image or tile, without CLS."""
        return self.tokens * self.merged

    @property
    def block_weights(self) -> int:
        """Weights of one block, as :attr:`Geometry.layer_weights`."""
        return 4 * self.hidden**2 + self.ffn_matrices * self.hidden * self.intermediate

    @property
    def grid(self) -> int:
        """Visual tokens along one side of the (square) image."""
        return round(self.tokens**0.5)


@dataclass(frozen=True)
class Geometry:
    """Sizes of the decoder (Llama-style: q, k, v, o projections and a gated FFN of three matrices) and of its eyes."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    vision: VisionGeometry | None = None

    @property
    def layer_weights(self) -> int:
        """Weights of one layer: its multiply-adds for a token, without the products of attention."""
        return 2 * self.hidden * (self.heads + self.kv_heads) * self.head_size + 3 * self.hidden * self.intermediate


def matrix_weights(module: nn.Module) -> int:
    """Weights of all linear layers: multiply-adds for a token. Packed or quantised ones count unpacked."""
    inside = sum(matrix_weights(child) for child in module.children())
    return inside or getattr(module, "in_features", 0) * getattr(module, "out_features", 0)


# ---- families -----------------------------------------------------------------------------------------------------


def _clip(config: Any, projector_macs: int) -> VisionGeometry:
    vision = config.vision_config
    # hidden_states[0] is the embedding: hidden_states[f] is the output of block f - 1, and from the end for f < 0.
    feature = config.vision_feature_layer
    return VisionGeometry(
        layers=vision.num_hidden_layers,
        hidden=vision.hidden_size,
        heads=vision.num_attention_heads,
        intermediate=vision.intermediate_size,
        tokens=(vision.image_size // vision.patch_size) ** 2,
        patch_inputs=vision.num_channels * vision.patch_size**2,
        has_cls=config.vision_feature_select_strategy == "default",
        feature_block=feature - 1 if feature >= 0 else vision.num_hidden_layers + feature,
        projector_macs=projector_macs,
    )


def _intern_vit(config: Any, projector_macs: int) -> VisionGeometry:
    vision, merged = config.vision_config, round(config.downsample_ratio**-2)
    patches = (vision.image_size[0] // vision.patch_size[0]) * (vision.image_size[1] // vision.patch_size[1])
    return VisionGeometry(
        layers=vision.num_hidden_layers,
        hidden=vision.hidden_size,
        heads=vision.num_attention_heads,
        intermediate=vision.intermediate_size,
        tokens=patches // merged,
        patch_inputs=vision.num_channels * vision.patch_size[0] * vision.patch_size[1],
        has_cls=config.vision_feature_select_strategy == "default",
        feature_block=vision.num_hidden_layers - 1,
        projector_macs=projector_macs,
        merged=merged,
    )


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
        full_blocks=len(vision.fullatt_block_indexes),
    )


def _tiles(vision: VisionGeometry, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    pixels = args[0] if args else kwargs["pixel_values"]
    return torch.tensor([[1, vision.grid, vision.grid]]).expand(pixels.shape[0], -1)


def _grids(vision: VisionGeometry, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    return kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]


# Where the tokens of one image lie in it: see visibench.results.store.token_grids. Arguments: the model's
# configuration, its image processor, the inputs of the batch, and the image's number and size (width, height) there.
Views = Callable[[Any, Any, Mapping[str, Any], int, tuple[int, int]], list[list[int]]]


def _square(config: Any, processor: Any, inputs: Mapping[str, Any], number: int, size: tuple[int, int]) -> list:
    side = config.vision_config.image_size // config.vision_config.patch_size
    return [[side, side, 1, 1, 0]]


def _base_and_tiles(config: Any, processor: Any, inputs: Mapping[str, Any], number: int, size: tuple[int, int]) -> list:
    """The whole image, then all tiles as one grid without the rows or columns of padding, a newline behind each row."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    side = config.vision_config.image_size // config.vision_config.patch_size
    tall, wide = size[::-1]
    down, across = get_anyres_image_grid_shape(
        (tall, wide), config.image_grid_pinpoints, config.vision_config.image_size
    )
    rows, columns = unpad_image(torch.empty(1, down * side, across * side), (tall, wide)).shape[1:]
    return [[side, side, 1, 1, 0], [rows, columns, 1, 1, 1]]


def _canvas(config: Any, processor: Any, inputs: Mapping[str, Any], number: int, size: tuple[int, int]) -> list:
    """Tiles of the stretched image, then the whole of it once more if there are several."""
    from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

    vision, merge = config.vision_config, round(1 / config.downsample_ratio)
    rows, columns = (side // patch // merge for side, patch in zip(vision.image_size, vision.patch_size, strict=True))
    # InternVLProcessor always has tiles cut, whatever ``crop_to_patches`` of the checkpoint's image processor says.
    tile = (processor.size["height"], processor.size["width"])
    across, down = get_optimal_tiled_canvas(size[::-1], tile, processor.min_patches, processor.max_patches)
    return [[rows, columns, down, across, 0], *([[rows, columns, 1, 1, 0]] if down * across > 1 else [])]


def _merged(config: Any, processor: Any, inputs: Mapping[str, Any], number: int, size: tuple[int, int]) -> list:
    _, rows, columns = inputs["image_grid_thw"][number].tolist()
    merge = config.vision_config.spatial_merge_size
    return [[rows // merge, columns // merge, 1, 1, 0]]


@dataclass(frozen=True)
class Family:
    """Attribute paths, from the top-level model, of the parts of one architecture (``config.model_type``).

    ``vision``: sizes of its vision side, from the configuration and the projector's MACs for a token. ``sides``: hook
    points of methods that may act on that side. ``grids``: frames and patches (N, 3) of each image or tile, from the
    arguments of the vision tower; None where every image has ``VisionGeometry.tokens``. ``views``: where the tokens of
    an image lie in it.
    """

    decoder: str
    vision_tower: str | None = None
    vision_blocks: str | None = None
    projector: str | None = None
    # Parts of a vision block: the norm in front of its MLP, and the MLP.
    vision_norm: str = "layer_norm2"
    vision_mlp: str = "mlp"
    image_token: str = "image_token_id"
    vision: Callable[[Any, int], VisionGeometry] | None = None
    sides: tuple[str, ...] = ()
    grids: Callable[[Any, tuple, Mapping[str, Any]], Tensor] | None = None
    views: Views | None = None
    towers: Towers = field(default_factory=dict)


# SigLIP has no CLS token: the strategy "default" would drop a patch instead.
_CLIP_OR_SIGLIP = {"clip_vision_model": "default", "siglip_vision_model": "full"}
_DECODER_ONLY = Family(decoder="model")
FAMILIES: dict[str, Family] = {
    "llama": _DECODER_ONLY,
    "mistral": _DECODER_ONLY,
    "qwen2": _DECODER_ONLY,
    "qwen3": _DECODER_ONLY,
    "llava": Family(
        decoder="model.language_model",
        vision_tower="model.vision_tower",
        vision_blocks="model.vision_tower.encoder.layers",
        projector="model.multi_modal_projector",
        vision=_clip,
        sides=("image", "tower", "vision", "projector"),
        views=_square,
        towers=_CLIP_OR_SIGLIP,
    ),
    "llava_next": Family(
        decoder="model.language_model",
        vision_tower="model.vision_tower",
        vision_blocks="model.vision_tower.encoder.layers",
        projector="model.multi_modal_projector",
        vision=_clip,
        grids=_tiles,
        views=_base_and_tiles,
        towers=_CLIP_OR_SIGLIP,
    ),
    "internvl": Family(
        decoder="model.language_model",
        vision_tower="model.vision_tower",
        vision_blocks="model.vision_tower.encoder.layer",
        projector="model.multi_modal_projector",
        vision=_intern_vit,
        sides=("projector",),
        views=_canvas,
        towers={"internvl_vision": "default"},
    ),
    "qwen2_5_vl": Family(
        decoder="model.language_model",
        vision_tower="model.visual",
        vision_blocks="model.visual.blocks",
        projector="model.visual.merger",
        vision=_qwen_vit,
        grids=_grids,
        views=_merged,
        towers={"qwen2_5_vl_vision": None},
    ),
}


# Wrappers by the attribute that only they have, and how to get at the model inside.
WRAPPERS = {
    "get_base_model": "pass model.merge_and_unload(), which puts its adapters into the weights, or model.unload()",
    "module": "pass the model inside, model.module",
    "_orig_mod": "pass the model as it was before torch.compile, model._orig_mod",
}


class Adapter:
    """The parts of one model.

    Raises :class:`UnsupportedModelError` for wrappers and for all that was not tested.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        for attribute, instead in WRAPPERS.items():
            if hasattr(model, attribute):
                raise UnsupportedModelError(f"cannot prune {type(model).__name__}, which wraps a model: {instead}")
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        if kind not in FAMILIES:
            raise UnsupportedModelError(
                f"cannot prune {type(model).__name__}: architecture {kind!r} has no adapter; {suggest(kind, FAMILIES)}"
            )
        self.model, self.kind = model, kind
        self.family = FAMILIES[kind]
        check_configuration(model.config, self.family.towers, type(model).__name__)
        self.decoder = self._part(self.family.decoder)
        self.vision_tower = self._part(self.family.vision_tower)
        self.vision_blocks = self._part(self.family.vision_blocks)
        self.projector = self._part(self.family.projector)
        self.layers = self.decoder.layers
        self.image_token: int | None = getattr(model.config, self.family.image_token, None)
        self._check_sizes()

    def _part(self, path: str | None) -> Any:
        if path is None:
            return None
        try:
            return attrgetter(path)(self.model)
        except AttributeError:
            raise UnsupportedModelError(
                f"cannot prune {type(self.model).__name__}: it has no {path!r}; "
                "pass the full model with its language-model head (…ForConditionalGeneration or …ForCausalLM)"
            ) from None

    def _check_sizes(self) -> None:
        """Compute is counted by the configuration: what is there must be what it says."""
        name, geometry = type(self.model).__name__, self.geometry
        parts = [("decoder layer", self.layers, geometry.layers, geometry.layer_weights)]
        if geometry.vision is not None:
            parts += [("vision block", self.vision_blocks, geometry.vision.layers, geometry.vision.block_weights)]
        for part, modules, count, weights in parts:
            if len(modules) != count:
                raise UnsupportedModelError(
                    f"{name} cannot be pruned: it has {len(modules)} {part}s where its configuration says {count}: "
                    "set the number there"
                )
            for number, module in enumerate(modules):
                if (held := matrix_weights(module)) != weights:
                    raise UnsupportedModelError(
                        f"{name} cannot be pruned: {part} {number} multiplies by {held:,} weights, by its "
                        f"configuration {weights:,}: merge adapters such as LoRA first (merge_and_unload)"
                    )

    def rotary(self, like: Tensor, positions: Tensor) -> Any:
        """Rotary cos and sin for int ``positions``, in the dtype and on the device of ``like``.

        Positions are (B, L), or (B, L, 3) in a family that counts time, height and width.
        """
        axes_first = positions.movedim(-1, 0) if positions.ndim == 3 else positions
        return self.decoder.rotary_emb(like, position_ids=axes_first)

    @property
    def geometry(self) -> Geometry:
        """Sizes of the model, read from its configuration and projector."""
        text = self.decoder.config
        vision = None
        if self.family.vision is not None:
            vision = self.family.vision(self.model.config, matrix_weights(self.projector))
        return Geometry(
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_size=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            intermediate=text.intermediate_size,
            vocabulary=text.vocab_size,
            vision=vision,
        )
