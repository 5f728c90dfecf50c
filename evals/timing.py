"""Measured time: warmed up, synchronised, repeated, with its spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..engine import prune
from ..errors import OptionError
from ..methods import Method
from ..models import LoadedModel


@dataclass(frozen=True)
class Timing:
    """Repeated measurements of one thing, in milliseconds."""

    times_ms: tuple[float, ...]
    warmup: int
    batch_size: int
    device: str

    @property
    def repeats(self) -> int:
        """Measurements, warm-up not counted."""
        return len(self.times_ms)

    @property
    def median_ms(self) -> float:
        """Median time."""
        return statistics.median(self.times_ms)

    @property
    def iqr_ms(self) -> float:
        """Width of the middle half of the times."""
        return iqr(self.times_ms)

    @property
    def min_ms(self) -> float:
        """Shortest time."""
        return min(self.times_ms)


def iqr(values: tuple[float, ...] | list[float]) -> float:
    """Interquartile range; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return upper - lower


def time_prefill(
    loaded: LoadedModel, method: Method, inputs: Mapping[str, Any], *, warmup: int = 3, repeats: int = 20
) -> Timing:
    """Time the prefill of one batch under ``method``: from inputs on the device to the logits of the first new token.

    Vision tower, projector, decoder, the method's own scoring and the filling of the KV cache all count. Time the
    dense model with the method ``none``: it runs the same attention.
    """

    def prefill() -> None:
        loaded.model(**inputs, use_cache=True, logits_to_keep=1)

    with torch.inference_mode(), prune(loaded.model, method):
        times = measure(prefill, loaded.model.device, warmup=warmup, repeats=repeats)
    return Timing(tuple(times), warmup, inputs["input_ids"].shape[0], loaded.model.device.type)


def measure(work: Callable[[], object], device: torch.device, *, warmup: int, repeats: int) -> list[float]:
    """Milliseconds of ``repeats`` calls of ``work`` after ``warmup`` calls: CUDA events on a GPU, a clock elsewhere."""
    if repeats < 1 or warmup < 0:
        raise OptionError(f"timing needs repeats >= 1 and warmup >= 0, not {repeats} and {warmup}")
    once = _on_gpu if device.type == "cuda" else _on_host
    for _ in range(warmup):
        work()
    return [once(work, device) for _ in range(repeats)]


def _on_gpu(work: Callable[[], object], device: torch.device) -> float:
    with torch.cuda.device(device):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)


def _on_host(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3
