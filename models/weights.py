"""Weights of a checkpoint: read as a whole, or refused with the names of what does not fit.

transformers initialises what a checkpoint lacks anew and goes on, with a report on standard error. Here the report is
read instead: numbers from weights that nobody trained are wrong, however they look.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from ..errors import DataError, OptionError, suggest
from ..utils.memory import check_room
from .geometry import build, nbytes

NAMED = 3
"""Tensors of a kind that an error names."""
MEND = "Download or save it again, or correct its config.json"


def read(name: str, source: str, config: Any, **options: Any) -> Any:
    """The model with the weights of ``source``; ``options`` are those of ``from_pretrained``. ``name`` is for errors.

    Raises :class:`DataError` if tensors are missing, unexpected or of another shape. Tied weights, and buffers that
    transformers knows checkpoints to lack or to have too many, are none of these. Raises :class:`NoRoomError` for
    a model that is larger than the host's memory. Of a checkpoint on this disk numbers are counted first, so that one
    that holds less than half of what ``config`` asks for does not fill it.
    """
    if not hasattr(config, "quantization_config") and "quantization_config" not in options:
        _check_size(name, source, build(config, "meta", None, torch.device("cpu"), options["dtype"], "sdpa"))
    with _unreported(bar=not Path(source).is_dir()):
        read_with_report: Any = partial(AutoModelForImageTextToText.from_pretrained, output_loading_info=True)
        model, report = read_with_report(source, use_safetensors=True, ignore_mismatched_sizes=True, **options)
    complaints = list(_complaints(report))
    if complaints:
        raise DataError(
            f"cannot load model {name!r}: its weights are not those of its config.json: {'; '.join(complaints)}. {MEND}"
        )
    return model


def _check_size(name: str, source: str, model: Any) -> None:
    files, wanted = sorted(Path(source).glob("*.safetensors")), model.num_parameters()
    leaves = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
    if whole := [key for key in _integers(files) if key.rpartition(".")[2] in leaves]:
        raise DataError(
            f"cannot load model {name!r}: {len(whole)} of its weights are whole numbers, and its config.json has no "
            f"quantization_config that says of what: {_named(whole)}. {MEND}"
        )
    if files and 2 * (stored := _stored(files)) < wanted:
        raise DataError(
            f"cannot load model {name!r}: its config.json asks for {wanted:,} parameters, but its weights hold "
            f"{stored:,}. {MEND}"
        )
    check_room(nbytes(model), f"model {name!r}", "choose a smaller --dtype or model")


def _stored(files: Sequence[Path]) -> int:
    """Numbers in files of weights."""
    count = 0
    for file in files:
        with safe_open(file, "pt") as tensors:
            count += sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
    return count


def _integers(files: Sequence[Path]) -> list[str]:
    """Tensors in files of weights that hold no numbers with a fraction."""
    found: list[str] = []
    for file in files:
        with safe_open(file, "pt") as tensors:
            kinds = {key: tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118
            found += [key for key, kind in kinds.items() if "F" not in kind]
    return found


def _complaints(report: Mapping[str, Any]) -> Iterator[str]:
    shapes = {
        f"{key} ({'×'.join(map(str, stored))} for {'×'.join(map(str, wanted))})"
        for key, stored, wanted in report["mismatched_keys"]
    }
    kinds = {"missing": report["missing_keys"], "unexpected": report["unexpected_keys"], "of another shape": shapes}
    return (f"{len(keys)} {kind}: {_named(keys)}" for kind, keys in kinds.items() if keys)


def _named(keys: Collection[str]) -> str:
    return ", ".join(sorted(keys)[:NAMED]) + (" …" if len(keys) > NAMED else "")


@contextmanager
def _unreported(*, bar: bool) -> Iterator[None]:
    """Within: transformers prints no report, and no progress bar unless ``bar``."""
    logger, shown = logging.getLogger("transformers.modeling_utils"), transformers_logging.is_progress_bar_enabled()
    silent = lambda record: "LOAD REPORT" not in record.getMessage()  # noqa: E731
    logger.addFilter(silent)
    if not bar:  # weights on this disk are there in a moment
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.removeFilter(silent)
        if shown:
            transformers_logging.enable_progress_bar()


Quantization = Literal["4bit", "8bit"]


def placement(device_map: Any, quantization: str | None, device: torch.device, dtype: Any) -> dict[str, Any]:
    """Options of ``from_pretrained`` that spread or pack weights. Raises :class:`OptionError` for what is missing."""
    options: dict[str, Any] = {} if device_map is None else {"device_map": device_map}
    if quantization is None:
        return options
    if quantization not in get_args(Quantization):
        raise OptionError(f"unknown quantization {quantization!r}; {suggest(quantization, get_args(Quantization))}")
    if find_spec("bitsandbytes") is None:
        raise OptionError(f"quantization {quantization} needs bitsandbytes: pip install bitsandbytes")
    compute = torch.bfloat16 if dtype == "auto" else dtype
    four = {"load_in_4bit": True, "bnb_4bit_compute_dtype": compute}
    packed = BitsAndBytesConfig(**(four if quantization == "4bit" else {"load_in_8bit": True}))
    # Packed weights are made where they stay.
    return {"device_map": {"": str(device)}} | options | {"quantization_config": packed}
