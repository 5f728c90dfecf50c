"""Load a model with its processor: the embedded ``tiny``, a local folder or a hub checkpoint; or its sizes alone."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor, BatchFeature, PretrainedConfig, PreTrainedModel

from ..errors import (
    DataError,
    InputError,
    OptionError,
    UnknownNameError,
    UnsupportedModelError,
    boundary,
    reason,
    suggest,
)
from ..utils.bounded_cache import GIB, BoundedCache
from ..utils.machine import processor, version
from ..utils.sources import ends
from . import lora, sizes
from .adapters import FAMILIES, UNFIT, Adapter, Geometry, family_of
from .compiled import compile_parts
from .geometry import Weights, about, build, check_weights, configuration, nbytes, published, synthetic_inputs
from .inputs import as_text, prepared, special_tokens
from .protocols import HF, Protocol, find
from .support import ATTENTION, check_configuration
from .weights import Quantization, placement
from .weights import read as read_weights

EMBEDDED = {"tiny": Path(__file__).parent / "tiny" / "checkpoint"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(repr=False)
class LoadedModel:
    """A vision-language model ready to answer questions: ``model`` and ``processor`` are plain transformers objects.

    A model known by its sizes alone has no processor (None); ``weights`` says whether its own are in it. ``kept``:
    bytes of processed inputs that stay on the host at most. ``base``: where it is an adapter's, the model without it.
    ``compiled``: whether its norms and MLPs are.
    """

    name: str
    model: PreTrainedModel
    processor: Any
    weights: Weights = "pretrained"
    protocol: Protocol = HF
    kept: int = GIB
    base: str = ""
    compiled: bool = False

    def __repr__(self) -> str:
        dtype = str(self.model.dtype).removeprefix("torch.")
        weights = "" if self.weights == "pretrained" else f", weights {self.weights}"
        size = f"{self.model.num_parameters() / 1e6:.4g} M parameters"
        return f"LoadedModel({self.name!r}, {type(self.model).__name__}, {size}, {dtype}, {self.model.device}{weights})"

    @cached_property
    def adapter(self) -> Adapter:
        """Where the model keeps its parts."""
        return Adapter(self.model)

    @cached_property
    def geometry(self) -> Geometry:
        """Sizes of the model."""
        return self.adapter.geometry

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        return nbytes(self.model)

    @cached_property
    def _processed(self) -> BoundedCache[BatchFeature]:
        return BoundedCache(lambda inputs: sum(tensor.nbytes for tensor in inputs.values()), self.kept)

    def inputs(
        self, questions: list[str], images: list[list[Image.Image]], key: Hashable | None = None
    ) -> BatchFeature:
        """Model inputs for a batch: by the protocol's template, images first, left padded, on the model's device.

        ``images[i]`` are the images of ``questions[i]``, possibly none, each as :func:`~visibench.models.inputs.as_rgb`
        takes it. Token ids are (B, L). ``key``: names questions and images, so that those which come again need not be
        processed again.
        """
        encoded = (
            self.encoded(questions, images)
            if key is None
            else self._processed.get(key, lambda: self.encoded(questions, images))
        )
        # A copy, since moving changes what is moved.
        return BatchFeature(dict(encoded)).to(self.model.device, dtype=self.model.dtype)

    def encoded(self, questions: list[str], images: list[list[Image.Image]]) -> BatchFeature:
        """The same as the processor gives them: on the host, and of its own precision.

        Raises :class:`InputError` for a prompt longer than the model's positions.
        """
        if self.processor is None:
            raise InputError(f"{self.name} has no processor here: load a checkpoint, or use synthetic_inputs")
        rows = prepared(questions, images)
        plain = [as_text(question, self.processor) for question in questions]
        texts = [self.protocol.prompt(self.processor, *row) for row in zip(plain, map(len, rows), strict=True)]
        options = special_tokens(texts, self.processor.tokenizer)
        # By row: processors that cut a lone image into tiles, and none of several, cannot tell otherwise.
        nested = [self.protocol.shaped(self.processor, pictures) for pictures in rows] if any(rows) else None
        inputs = self.processor(
            text=texts, images=nested, padding=True, padding_side="left", return_tensors="pt", **options
        )
        length, text = inputs["input_ids"].shape[1], self.model.config.get_text_config()
        most = getattr(text, "max_position_embeddings", None) or length
        if length > most:
            raise InputError(
                f"a prompt of {length} tokens is longer than the {most} positions of {self.name}: shorten it, or "
                "choose another model"
            )
        return inputs

    def synthetic_inputs(self, batch: int, prompt: int, visual_tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
        """Random inputs of ``batch`` rows of ``prompt`` text tokens and ``visual_tokens``, for timing."""
        return synthetic_inputs(self.adapter, batch, prompt, visual_tokens, seed)

    def decode(self, ids: torch.Tensor) -> list[str]:
        """Text of generated token ids (B, n), without special tokens."""
        return [text.strip() for text in self.processor.batch_decode(ids, skip_special_tokens=True)]

    def _placed(self) -> dict[str, Any]:
        """How weights are packed and where they lie, where that is not the plain way."""
        packed = getattr(self.model.config, "quantization_config", None)
        spread = getattr(self.model, "hf_device_map", None)
        return ({"quantization": packed if isinstance(packed, dict) else packed.to_dict()} if packed else {}) | (
            {"device_map": {part: str(place) for part, place in spread.items()}} if spread else {}
        )

    def describe(self) -> dict[str, Any]:
        """Facts that every result must carry: name, dtype, device, attention, image processor, versions."""
        device = self.model.device
        return {
            "name": self.name,
            "architecture": type(self.model).__name__,
            "parameters": self.model.num_parameters(),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": device.type,
            "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
            "threads": torch.get_num_threads(),
            "attention": self.model.config.get_text_config()._attn_implementation,
            "image_processor": self.processor and type(self.processor.image_processor).__name__,
            "image_backend": self.processor and getattr(self.processor.image_processor, "backend", None),
            "weights": self.weights,
            **({"base": self.base} if self.base else {}),
            **self._placed(),
            **({"compile": True} if self.compiled else {}),
            "template": self.processor and self.protocol.template_of(self.processor),
            "versions": {name: version(name) for name in ("torch", "transformers", "visibench")},
        }


def list_models() -> dict[str, str]:
    """Models that need no download, by name, with one line each."""
    tiny = "LLaVA architecture, trained on synthetic scenes, embedded in the package (first run, CI, development)"
    return {"tiny": tiny} | {name: about(name) for name in published()}


def load_model(
    name_or_path: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    attn_implementation: str = "sdpa",
    trust_remote_code: bool = False,
    weights: Weights = "pretrained",
    layers: int | None = None,
    protocol: str | Mapping[str, Any] | Protocol = HF,
    device_map: Any = None,
    quantization: Quantization | None = None,
    compile: bool = False,
) -> LoadedModel:
    """Load a model by name (``tiny``), local folder or hub id such as ``llava-hf/llava-1.5-7b-hf``.

    A local folder may be a LoRA adapter, which is merged into the base model that it names.
    ``device``: ``auto`` (CUDA where there is one), ``cpu``, ``cuda``, ``cuda:1`` … ``dtype``: ``auto`` (fp32 on CPU,
    the checkpoint's own on GPU), ``float32``, ``bfloat16``, ``float16``. Weights are read from safetensors only.
    ``weights``: ``random`` needs no download for the names in ``geometry.yaml``, ``meta`` no memory either, for sizes
    and compute alone; both take ``layers``, to keep only that many decoder layers. ``protocol``: how it is asked, see
    :func:`~visibench.models.protocols.find`. ``device_map``: as transformers takes it, in place of ``device``; the
    decoder must lie on one device. ``quantization``: ``4bit`` or ``8bit``, by bitsandbytes while weights are read.
    ``compile``: see :mod:`.compiled`. Raises UnknownNameError, UnsupportedModelError, OptionError or DataError.
    """
    check_weights(name_or_path, weights, layers)
    _check_attention(attn_implementation)
    _check_together(weights, placed=device_map is not None or quantization is not None, compiled=compile)
    asked = protocol if isinstance(protocol, Protocol) else find(protocol)
    processor, precision = None, _precision(dtype, place := _device(device))
    with boundary(f"cannot load model {name_or_path!r}", DataError):  # whatever stands in its files
        base = lora.base_of(name_or_path)
        adapted, source = base if base != name_or_path else "", _source(base)
        if adapted:
            lora.check(name_or_path, packed=quantization is not None)
        if base in published():
            config = configuration(base)
        else:
            _check_content(name_or_path, base, source)
            config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
            _check_family(name_or_path, config)
            processor = _processor(source, config, trust_remote_code)
        model: Any
        if weights == "pretrained":
            options = {"attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
            options |= placement(device_map, quantization, place, precision)
            model = read_weights(base, source, config, dtype=precision, **options)
            if adapted:
                model = lora.merged(model, name_or_path)
            if "device_map" not in options:
                model.to(place)
        else:
            model = build(config, weights, layers, place, precision, attn_implementation)
        loaded = LoadedModel(name_or_path, model.eval(), processor, weights, asked, base=adapted, compiled=compile)
        if processor is not None:
            asked.set_up(processor)
        loaded.geometry  # noqa: B018  # checks the model
        if compile:
            compile_parts(loaded.adapter)
    return loaded


def check_outside(out: Path, model: str) -> None:
    """Raise :class:`OptionError` where results would lie among the files of a model, and change its fingerprint."""
    for folder in _parts(model):
        if os.path.isdir(folder) and Path(os.path.realpath(out)).is_relative_to(os.path.realpath(folder)):
            raise OptionError(
                f"the run folder {out} lies in that of model {model}, whose files say which weights these are: "
                "choose another --out"
            )


def _parts(model: str) -> list[Path]:
    """The folder of a model, and that of the model which it adapts."""
    folder = EMBEDDED.get(model, Path(model))
    with boundary(f"cannot read model {model!r}", DataError):  # an adapter's configuration may be anything
        return list(dict.fromkeys((folder, Path(lora.base_of(str(folder))))))


def _check_attention(name: str) -> None:
    if name not in ATTENTION:  # transformers drops parts of a name, such as "paged|"
        raise OptionError(f"attention implementation {name!r} cannot be observed; {suggest(name, ATTENTION)}")


def _check_together(weights: Weights, *, placed: bool, compiled: bool) -> None:
    if weights != "pretrained" and placed:
        raise OptionError("device_map and quantization are about weights that are read: leave weights out")
    if compiled and (placed or weights == "meta"):
        raise OptionError("compile is about plain weights on one device: leave it out, or device_map and quantization")


def fingerprint(model: str) -> str:
    """Hash of a local checkpoint, so that results of other weights are not taken for its own; empty for a hub name.

    That of an adapter counts its base model, where that is local. Of files above 32 MiB only the size and both ends
    are read.
    """
    folder = EMBEDDED.get(model, Path(model))
    if not os.path.isdir(folder):
        return ""
    digest = hashlib.sha256()
    for part in _parts(model):
        _check_files(part)
        for file in sorted(path for path in part.rglob("*") if path.is_file()):
            digest.update(f"{file.relative_to(part)}:{file.stat().st_size}".encode())
            digest.update(ends(file))
    return digest.hexdigest()[:16]


def of_rank(device: str, local_rank: int) -> str:
    """The device of one of several ranks on a machine: the GPU of its local rank, or the CPU."""
    if device == "cpu" or not torch.cuda.is_available():
        return device
    if device not in ("auto", "cuda"):
        raise OptionError(f"device {device} would put all ranks on one GPU: leave it out, each takes its own")
    return f"cuda:{local_rank}"


def release() -> None:
    """Give back the memory of models that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _check_content(name: str, base: str, source: str) -> None:
    """Before transformers says that it knows no such architecture, or offers to run the checkpoint's own code."""
    content, _ = PretrainedConfig.get_config_dict(source)
    kind = content.get("model_type")
    if content.get("auto_map") and kind not in {*FAMILIES, *UNFIT}:
        raise UnsupportedModelError(
            f"{name}: architecture {kind!r} cannot be pruned: its code comes with its checkpoint; load a checkpoint of "
            "transformers' own class"
        )
    if isinstance(kind, str):
        family_of(kind, name)
    sizes.check(base, source, content)


def _check_family(name: str, config: Any) -> None:
    """Before any weights are read."""
    family = family_of(config.model_type, name)
    if family.projector is None:
        raise UnsupportedModelError(
            f"{name}: architecture {config.model_type!r} has no adapter for images; see CONTRIBUTING.md"
        )
    check_configuration(config, family.towers, name)


def _processor(source: str, config: Any, trust_remote_code: bool) -> Any:
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)
    if getattr(processor, "patch_size", True) is None:
        processor.patch_size = config.vision_config.patch_size
    return processor


def _source(name: str) -> str:
    if name in published():
        return name
    if name in EMBEDDED:
        return str(EMBEDDED[name])
    if os.path.isdir(name):
        _check_files(Path(name))
        return name
    if name.count("/") == 1 and not name.startswith((".", "/")):
        return name
    raise UnknownNameError(
        f"unknown model {name!r}: not a folder, and not a hub id (owner/name); {suggest(name, list_models())}"
    )


def _check_files(folder: Path) -> None:
    """Raise :class:`DataError` for a folder of no model, and for what is no file, such as a pipe without an end.

    And for generation settings that cannot be read: transformers goes on without them, and their stop tokens.
    """
    settings = folder / "generation_config.json"
    if not any(any(folder.glob(name)) for name in ("config.json", lora.CONFIG, "*.safetensors")):
        raise DataError(f"cannot load model {str(folder)!r}: it holds neither config.json nor {lora.CONFIG}")
    for file in sorted(folder.rglob("*")):
        if file.exists() and not (file.is_file() or file.is_dir()):
            raise DataError(f"cannot read {file} (no regular file): put the model's own file there, or remove it")
    try:
        json.loads(settings.read_bytes() if settings.exists() else b"{}")
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read {settings} ({reason(error)}): put the model's own file there") from error


def _precision(name: str, place: torch.device) -> Any:
    if name != "auto" and name not in DTYPES:
        raise OptionError(f"unknown dtype {name!r}; {suggest(name, ['auto', *DTYPES])}")
    return DTYPES.get(name, torch.float32 if place.type == "cpu" else "auto")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name, re.ASCII):
        raise OptionError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise OptionError("no CUDA device here: use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptionError(f"no device {name} here: the last one is cuda:{torch.cuda.device_count() - 1}")
    return device
