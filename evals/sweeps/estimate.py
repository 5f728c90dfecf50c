"""What a model would compute and hold that is not here: from its sizes, a typical prompt and a method's options."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Literal

from torch import nn

from ...errors import DataError, OptionError
from ...methods import Method, load_method
from ...models import LoadedModel, load_model
from ...models.geometry import published, typical
from ...models.load import fingerprint
from ...models.protocols import Protocol
from ...models.weights import Quantization
from ..compute.flops import executed
from ..compute.paper_flops import PREFIX, QUESTION
from ..compute.prefill_plan import planned_prefill
from ..settings.config import DENSE
from ..tasks.hub import hub_or_cache
from .config import SweepConfig

Basis = Literal["measured", "planned", "bound"]
TEXT = PREFIX + QUESTION
"""Text tokens of a typical prompt."""
QUESTIONS = {"gqa": 12_578, "mme": 2_374, "textvqa_val": 5_000, "pope": 9_000}
"""Questions of the full sets on the hub."""
PEAKS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "A6000": 155.0, "L40": 181.0, "4090": 165.0, "V100": 125.0}
"""Peak of cards in 10¹² floating-point operations a second: 16 bits, dense, from their makers' data sheets."""
CARD, SHARE = "A100", 0.4
PACKED: dict[Quantization, int] = {"4bit": 4, "8bit": 8}
"""Bits of a packed weight."""


@dataclass(frozen=True)
class Rate:
    """Multiply-adds a second, 10¹², and where that comes from."""

    tmacs: float
    origin: str
    given: bool = False


def rate(given: float | None) -> Rate:
    """What ``--rate`` gives; else a share of the peak of the card that is here, or of an A100."""
    if given is not None:
        if given <= 0:
            raise OptionError(f"--rate {given:g}: give 10¹² multiply-adds a second, above 0")
        return Rate(given, "--rate", given=True)
    from ...utils.machine import host

    here = [(gpu, card) for gpu in host()["gpus"][:1] for card in PEAKS if card in gpu]
    name, card = here[0] if here else (f"{CARD}, as no known card is here", CARD)
    tmacs = SHARE * PEAKS[card] / 2  # an operation is a multiplication or an addition
    return Rate(tmacs, f"{100 * SHARE:.0f} % of the peak of {name}")


def sizes(config: SweepConfig) -> LoadedModel:
    """The model of a sweep without its weights. What is known by its sizes, also by its hub name, needs no download.

    Raises :class:`DataError` for a hub model that is not known and cannot be had.
    """
    return _sizes(config.model, config.device, config.dtype, config.attention, config.asked)


@cache
def _sizes(model: str, device: str, dtype: str, attention: str, protocol: Protocol) -> LoadedModel:
    options = {"device": device, "dtype": dtype, "attn_implementation": attention, "weights": "meta"}
    known = model in published() or bool(fingerprint(model))
    try:
        with nullcontext() if known else hub_or_cache():
            return load_model(model, protocol=protocol, **options)  # type: ignore[arg-type]
    except DataError:
        alike = [name for name, entry in published().items() if entry.get("checkpoint") == model]
        if not alike:
            raise
        return load_model(alike[0], protocol=protocol, **options)  # type: ignore[arg-type]


def macs(model: LoadedModel, method: Method) -> tuple[float | None, Basis | None]:
    """Executed in one prefill of a typical prompt; of a method whose inputs decide, the dense model's as a bound."""
    visual = typical(model.adapter)
    try:
        return executed(planned_prefill(model, method, TEXT, visual), model.geometry).total()[0], "planned"
    except OptionError:
        if method.name == DENSE:
            return None, None
        most, _ = macs(model, load_method(DENSE))
        return most, None if most is None else "bound"


def memory(model: LoadedModel, batch: int, quantization: Quantization | None = None) -> int:
    """Bytes of a batch of typical prompts at most: weights, KV cache, and what one decoder layer holds at a time.

    In 16 bits, weights as they are packed, without what the allocator and kernels hold beside it.
    """
    g, length, width = model.geometry, TEXT + typical(model.adapter), 2
    cache_entries = 2 * g.layers * g.kv_heads * g.head_size
    layer = 4 * g.hidden + 2 * g.intermediate + 2 * (g.heads + g.kv_heads) * g.head_size
    weights: float = sum(weight.numel() for weight in model.model.parameters())
    if quantization is not None:  # all linear layers but the LM head
        head = model.model.get_output_embeddings()
        linear = (part for part in model.model.modules() if isinstance(part, nn.Linear) and part is not head)
        weights -= sum(part.weight.numel() for part in linear) * (1 - PACKED[quantization] / 16)
    return int(width * weights) + width * (batch * length * (cache_entries + layer) + 2 * batch * g.vocabulary)
