"""Models of published sizes without their weights, and inputs for them that need no processor.

For compute, time and memory only the sizes count: weights are random, or missing altogether (``meta``).
"""

from __future__ import annotations

import inspect
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import yaml
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from ..errors import InputError, OptionError, suggest
from ..utils.memory import check_room
from .adapters import Adapter, Images

Weights = Literal["pretrained", "random", "meta"]
MOST_TOKENS = 10_000_000
"""Of a row at most, as many as the longest contexts."""


@cache
def published() -> dict[str, dict[str, Any]]:
    """Entries of ``geometry.yaml`` by name: ``config``, and ``checkpoint`` with ``parameters``, or ``about``."""
    entries = yaml.safe_load(Path(__file__).with_name("geometry.yaml").read_text(encoding="utf-8"))
    return {name: entry for name, entry in entries.items() if not name.startswith(".")}


def about(name: str) -> str:
    """One line on an entry."""
    entry = published()[name]
    return f"sizes alone, {entry.get('about') or 'those of ' + entry['checkpoint']}: add --weights random"


def configuration(name: str) -> Any:
    """The transformers configuration of an entry."""
    values = dict(published()[name]["config"])
    return AutoConfig.for_model(values.pop("model_type"), **values)


def check_weights(name: str, weights: str, layers: int | None) -> None:
    """Raise :class:`OptionError` unless model ``name`` can be had with these ``weights`` and ``layers``."""
    if weights not in get_args(Weights):
        raise OptionError(f"unknown weights {weights!r}; {suggest(weights, get_args(Weights))}")
    if weights != "pretrained":
        return
    if name in published():
        checkpoint = published()[name].get("checkpoint")
        instead = f", or load the checkpoint {checkpoint}" if checkpoint else ""
        raise OptionError(f"{name} is known by its sizes alone: give weights random or meta{instead}")
    if layers is not None:
        raise OptionError("a pretrained model cannot be cut to fewer layers: give weights random or meta with layers")


def build(config: Any, weights: Weights, layers: int | None, device: torch.device, dtype: Any, attention: str) -> Any:
    """A model of ``config`` cut to ``layers`` decoder layers, made where it stays and in its final dtype.

    ``random``: transformers' own initialisation, drawn with seed 0; ``meta``: shapes without memory. ``dtype`` "auto"
    is bfloat16. Raises :class:`OptionError` if there are fewer layers than asked for, and :class:`NoRoomError` for
    random weights that do not fit into the host's memory.
    """
    if layers is not None:
        text = config.get_text_config()
        if not 1 <= layers <= text.num_hidden_layers:
            raise OptionError(f"layers must lie in 1 … {text.num_hidden_layers} here, not {layers}")
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    precision = torch.bfloat16 if dtype == "auto" else dtype

    def made(place: torch.device) -> Any:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), place:
            torch.manual_seed(0)
            return AutoModelForImageTextToText.from_config(config, dtype=precision, attn_implementation=attention)

    sizes = made(torch.device("meta"))
    if weights == "meta":
        return sizes
    if device.type == "cpu":
        check_room(nbytes(sizes), "a model of these sizes", "choose fewer --layers, a smaller --dtype or another model")
    return made(device)


def nbytes(model: Any) -> int:
    """Bytes of a model's weights, tied ones counted once."""
    return sum(weight.nbytes for weight in model.parameters())


def synthetic_inputs(adapter: Adapter, batch: int, prompt: int, visual_tokens: int, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs of ``batch`` equal-length rows on the model's device: ``prompt`` text tokens and images.

    The images, ``visual_tokens`` together, stand in the middle of the text: token ids are (B, prompt + visual_tokens).
    Raises :class:`InputError` where the model has no images of so many tokens.
    """
    model = adapter.model
    check_prompt(batch, prompt, visual_tokens)
    made = _images(adapter, visual_tokens, batch)
    assert adapter.image_token is not None
    generator = torch.Generator().manual_seed(seed)
    # Special tokens stand at both ends of a vocabulary.
    text = torch.randint(3, min(*adapter.visual_tokens, 30_000), (batch, prompt), generator=generator)
    image = torch.full((batch, visual_tokens), adapter.image_token)
    ids = torch.cat([text[:, : prompt // 2], image, text[:, prompt // 2 :]], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if made is not None:
        inputs |= {"pixel_values": torch.randn(made.shape, generator=generator).to(model.dtype)} | made.more
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        inputs["mm_token_type_ids"] = (ids == adapter.image_token).int()
    if adapter.family.token_type is not None:
        inputs["token_type_ids"] = (ids == adapter.image_token).int() * adapter.family.token_type
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


def check_prompt(batch: int, prompt: int, visual_tokens: int) -> None:
    """Raise :class:`InputError` for rows that cannot be: text stands on both sides of the images."""
    if prompt < 2 or visual_tokens < 0 or batch < 1:
        raise InputError(f"need batch >= 1, prompt >= 2 and visual tokens >= 0, not {batch}, {prompt}, {visual_tokens}")


def image_inputs(adapter: Adapter, visual_tokens: int) -> dict[str, Tensor]:
    """What says which sizes the images have that :func:`synthetic_inputs` makes up for one row.

    Raises :class:`InputError` as that does.
    """
    made = _images(adapter, visual_tokens, 1)
    return {} if made is None else made.more


def typical(adapter: Adapter) -> int:
    """Visual tokens of an ordinary image; of one of 24 × 24 where sizes of images decide."""
    vision, family = adapter.geometry.vision, adapter.family
    if family.typical is not None and vision is not None:
        return family.typical(vision, adapter.model.config)
    return (vision.tokens if vision else 0) or 576


def _images(adapter: Adapter, visual_tokens: int, batch: int) -> Images | None:
    vision, images, config = adapter.geometry.vision, adapter.family.images, adapter.model.config
    if adapter.image_token is None or images is None or vision is None:
        raise InputError(f"cannot make up images for architecture {config.model_type!r}")
    return images(vision, config, visual_tokens, batch) if visual_tokens else None
