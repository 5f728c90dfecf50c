"""Where each model family keeps its parts, as data: one line a family, no subclassing.

The engine and the FLOPs counter read models only through an :class:`Adapter`.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError, suggest


@dataclass(frozen=True)
class Family:
    """Attribute paths, from the top-level model, of the parts of one architecture (``config.model_type``)."""

    decoder: str
    vision_tower: str | None = None
    vision_blocks: str | None = None
    projector: str | None = None
    # Parts of a vision block: the norm in front of its MLP, and the MLP.
    vision_norm: str = "layer_norm2"
    vision_mlp: str = "mlp"
    image_token: str = "image_token_id"


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
    ),
}


@dataclass(frozen=True)
class VisionGeometry:
    """Sizes of the vision tower and projector. ``tokens`` counts the patches of one image, without CLS."""

    layers: int
    hidden: int
    heads: int
    intermediate: int
    tokens: int
    patch_inputs: int
    has_cls: bool
    feature_block: int
    projector_macs: int

    @property
    def grid(self) -> int:
        """Patches along one side of the (square) image."""
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


class Adapter:
    """The parts of one model. Raises :class:`UnsupportedModelError` for an architecture that is not in the table."""

    def __init__(self, model: PreTrainedModel) -> None:
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        if kind not in FAMILIES:
            raise UnsupportedModelError(
                f"cannot prune {type(model).__name__}: architecture {kind!r} has no adapter; {suggest(kind, FAMILIES)}"
            )
        self.model = model
        self.family = FAMILIES[kind]
        self.decoder = self._part(self.family.decoder)
        self.vision_tower = self._part(self.family.vision_tower)
        self.vision_blocks = self._part(self.family.vision_blocks)
        self.projector = self._part(self.family.projector)
        self.layers = self.decoder.layers
        self.image_token: int | None = getattr(model.config, self.family.image_token, None)

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

    def rotary(self, like: Tensor, positions: Tensor) -> Any:
        """Rotary cos and sin for int ``positions`` (B, L), in the dtype and on the device of ``like``."""
        return self.decoder.rotary_emb(like, position_ids=positions)

    @property
    def geometry(self) -> Geometry:
        """Sizes of the model, read from its configuration and projector."""
        text = self.decoder.config
        return Geometry(
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_size=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            intermediate=text.intermediate_size,
            vocabulary=text.vocab_size,
            vision=self._vision_geometry() if self.vision_tower is not None else None,
        )

    def _vision_geometry(self) -> VisionGeometry:
        vision, config = self.vision_tower.config, self.model.config
        # hidden_states[0] is the embedding: hidden_states[f] is the output of block f - 1, and from the end for f < 0.
        feature = config.vision_feature_layer
        block = feature - 1 if feature >= 0 else vision.num_hidden_layers + feature
        return VisionGeometry(
            layers=vision.num_hidden_layers,
            hidden=vision.hidden_size,
            heads=vision.num_attention_heads,
            intermediate=vision.intermediate_size,
            tokens=(vision.image_size // vision.patch_size) ** 2,
            patch_inputs=vision.num_channels * vision.patch_size**2,
            has_cls=config.vision_feature_select_strategy == "default",
            feature_block=block,
            projector_macs=sum(m.weight.numel() for m in self.projector.modules() if isinstance(m, nn.Linear)),
        )
