"""Families by ``model_type`` of the configuration: a file of that name beside this one, and bare decoders."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from ...errors import UnsupportedModelError, suggest
from ..support import DECODERS
from .base import Family

_OTHERS = {"adapter", "base", "registry"}
_PACKAGE = __name__.rpartition(".")[0]
_HERE = sorted({module.name for module in iter_modules(import_module(_PACKAGE).__path__)} - _OTHERS)

FAMILIES: dict[str, Family] = dict.fromkeys(DECODERS, Family(decoder="model", scales_logits=True)) | {
    name: import_module(f"{_PACKAGE}.{name}").FAMILY for name in _HERE
}
"""All that have an adapter; those of images last."""

_ORIGINAL = "is in the format of its authors' code, which is no part of transformers: load the conversion {}"
UNFIT = {
    "llama4": "layers attend within chunks of places, which a cut would move, and choose among experts",
    "llava_llama": _ORIGINAL.format("llava-hf/llava-1.5-7b-hf, or another of llava-hf"),
    "llava_mistral": _ORIGINAL.format("llava-hf/llava-v1.6-mistral-7b-hf"),
    "llava_qwen": _ORIGINAL.format("llava-hf/llava-onevision-qwen2-7b-ov-hf"),
    "internvl_chat": _ORIGINAL.format("OpenGVLab/InternVL3-8B-hf"),
    "mllama": "images enter through cross-attention layers, and no visual tokens stand in the prompt",
    "mobilevlm": "is in the format of its authors' code, which is no part of transformers",
    "phi4_multimodal": "weights of the decoder differ for prompts with images (LoRA switched by input)",
}
"""Architectures that do not fit, by ``model_type``, and why."""


def family_of(kind: str, name: str) -> Family:
    """The family of architecture ``kind``; raises :class:`UnsupportedModelError` about the model ``name``."""
    if kind in UNFIT:
        raise UnsupportedModelError(f"{name}: architecture {kind!r} cannot be pruned: {UNFIT[kind]}")
    if kind not in FAMILIES:
        raise UnsupportedModelError(f"{name}: architecture {kind!r} has no adapter; {suggest(kind, FAMILIES)}")
    return FAMILIES[kind]
