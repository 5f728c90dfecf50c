"""One model, through what its family says: the engine and the FLOPs counter read models only through an Adapter."""

from __future__ import annotations

import inspect
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import UnsupportedModelError
from ..support import check_configuration, layer_types
from .base import Geometry
from .registry import family_of

# Wrappers by the attribute that only they have, and how to get at the model inside.
WRAPPERS = {
    "get_base_model": "pass model.merge_and_unload(), which puts its adapters into the weights, or model.unload()",
    "module": "pass the model inside, model.module",
    "_orig_mod": "pass the model as it was before torch.compile, model._orig_mod",
}


def matrix_weights(module: nn.Module) -> int:
    """Weights of all linear layers: multiply-adds for a token. Packed or quantised ones count unpacked."""
    inside = sum(matrix_weights(child) for child in module.children())
    return inside or getattr(module, "in_features", 0) * getattr(module, "out_features", 0)


class Adapter:
    """The parts of one model.

    Raises :class:`UnsupportedModelError` for wrappers and for all that was not tested.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        for attribute, instead in WRAPPERS.items():
            if hasattr(model, attribute):
                raise UnsupportedModelError(f"cannot prune {type(model).__name__}, which wraps a model: {instead}")
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        if type(model).__module__.startswith("transformers_modules"):
            raise UnsupportedModelError(
                f"cannot prune {type(model).__name__}: its code came with its checkpoint; "
                "load a checkpoint of transformers' own class"
            )
        self.model, self.kind = model, kind
        self.family = family_of(kind, f"cannot prune {type(model).__name__}")
        check_configuration(model.config, self.family.towers, type(model).__name__)
        self.known_as = repr(kind)
        own = self.family if self.family.variant is None else self.family.variant(model.config)
        if own is not self.family:
            strategy = model.config.vision_feature_select_strategy
            self.known_as += f" with tower {model.config.vision_config.model_type!r} under the strategy {strategy!r}"
            self.family = own
        self.decoder = self._part(self.family.decoder)
        self.vision_tower = self._part(self.family.vision_tower)
        self.vision_blocks = self._part(self.family.vision_blocks)
        self.projector = self._part(self.family.projector)
        self.features = self._part(self.family.features) if self.family.features else self.projector
        self.inner_projectors = [*(self._part(self.family.inner_projectors) or ())]
        self.layers = self.decoder.layers
        self.image_token: int | None = getattr(model.config, self.family.image_token, None)
        names = (self.family.image_token, self.family.video_token)
        found = [getattr(model.config, name, None) for name in names if name is not None]
        self.visual_tokens: tuple[int, ...] = tuple(token for token in found if token is not None)
        self._check_devices()
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

    def _check_devices(self) -> None:
        places = {str(weights.device) for weights in self.decoder.parameters()}
        if len(places) > 1:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} cannot be pruned: its decoder lies on {', '.join(sorted(places))}, and "
                "cuts are made on one device: load it with a device_map that keeps the decoder together"
            )

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

    def beside_attention(self) -> list[nn.Module]:
        """What has weights in the decoder's layers beside their attention: norms and MLPs, layer by layer."""
        parts = [part for layer in self.layers for part in layer.children() if part is not layer.self_attn]
        return [part for part in parts if any(True for _ in part.parameters())]

    @cached_property
    def layer_types(self) -> tuple[str, ...]:
        """How each decoder layer attends, in the terms of its configuration."""
        return layer_types(self.decoder.config)

    @cached_property
    def carried_types(self) -> frozenset[str]:
        """Types of layers whose mask causality and padding alone do not make."""
        return frozenset(self.layer_types) if self.family.bidirectional else frozenset({"sliding_attention"})

    def rotary(self, like: Tensor, positions: Tensor, layer_type: str) -> Any:
        """Rotary cos and sin for int ``positions``, in the dtype and on the device of ``like``, for layers of a type.

        Positions are (B, L), or (B, L, 3) in a family that counts time, height and width.
        """
        axes_first = positions.movedim(-1, 0) if positions.ndim == 3 else positions
        by_type = {"layer_type": layer_type} if self._rotary_by_type else {}
        return self.decoder.rotary_emb(like, position_ids=axes_first, **by_type)

    def places(self, visual: Tensor, valid: Tensor, grids: Tensor) -> Tensor:
        """Positions (B, L, 3) that the model gives a prompt, of which tokens ``visual`` and ``valid``, bool (B, L).

        ``grids``: int (N, 3), frames and patches of its images. Counted on the host.
        """
        assert self.family.places is not None
        is_visual, counts = torch.stack([visual, valid]).cpu()
        return self.family.places(self.model.base_model, is_visual, counts, grids).to(visual.device)

    @cached_property
    def _rotary_by_type(self) -> bool:
        return "layer_type" in inspect.signature(self.decoder.rotary_emb.forward).parameters

    def read(self, hidden: Tensor) -> Tensor:
        """Logits (…, vocabulary) of the token behind, from hidden states (…, D): the last norm and the LM head.

        Scaled and capped as the model's own are.
        """
        text, logits = self.decoder.config, self.model.get_output_embeddings()(self.decoder.norm(hidden))
        if not self.family.scales_logits:
            return logits
        logits = logits * getattr(text, "logit_scale", 1) / getattr(text, "logits_scaling", 1)
        cap = getattr(text, "final_logit_softcapping", None)
        return logits if cap is None else cap * (logits / cap).tanh()

    @cached_property
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
