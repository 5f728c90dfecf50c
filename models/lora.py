"""LoRA adapters: a folder of one is a model, its base with the adapter's weights added to those that they change."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from ..errors import DataError, OptionError
from ..utils.files import read

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def base_of(name: str) -> str:
    """The model that the adapter in a local folder changes; ``name`` itself where there is no adapter."""
    file = Path(name) / CONFIG
    if not os.path.isfile(file) or os.path.isfile(Path(name) / "config.json"):  # merged already, or whole beside it
        return name
    settings = json.loads(read(file))
    if settings.get("peft_type") != "LORA":
        raise DataError(f"{file}: an adapter of type {settings.get('peft_type')!r}: LORA alone can be merged")
    base = settings.get("base_model_name_or_path")
    if not base:
        raise DataError(f"{file} names no base model: write it as base_model_name_or_path")
    beside = Path(name) / str(base)
    return str(beside) if os.path.isdir(beside) else str(base)


def check(folder: str, *, packed: bool) -> None:
    """Before its base is read.

    Raises :class:`OptionError` without peft or for ``packed`` weights, :class:`DataError` unless it is in safetensors.
    """
    if packed:
        raise OptionError("an adapter cannot be merged into packed weights: leave quantization out")
    if not (Path(folder) / WEIGHTS).is_file():
        raise DataError(f"{folder} has no {WEIGHTS}: save the adapter as safetensors")
    if find_spec("peft") is None:
        raise OptionError(f"{folder} is a LoRA adapter, which needs peft: pip install peft")


def merged(model: Any, folder: str) -> Any:
    """``model`` with the adapter in ``folder`` merged into it. Raises :class:`DataError` if that does not fit."""
    from peft import PeftModel, get_peft_model_state_dict

    wrapped, file = PeftModel.from_pretrained(model, folder), Path(folder) / WEIGHTS
    # What peft does not find it makes up, and says so in a warning alone.
    strange = sorted(get_peft_model_state_dict(wrapped).keys() ^ load_file(file).keys())
    if strange:
        raise DataError(f"{file} does not fit its base model: {len(strange)} tensors, such as {strange[0]}")
    return wrapped.merge_and_unload()
