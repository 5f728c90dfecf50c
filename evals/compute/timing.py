"""Measured time: warmed up, synchronised, repeated, with its spread. One clock for GPU and CPU."""

from __future__ import annotations

import gc
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from ...engine import prune
from ...errors import OptionError
from ...methods import Method
from ...models import LoadedModel
from ...results.store.profiles import quartiles


class Clock(Protocol):
    """Marks moments in a device's stream of work, without waiting for it."""

    def mark(self) -> Any:
        """This moment, behind all work that was handed to the device."""

    def settle(self) -> None:
        """Wait until the device has done all its work; times between marks are known after that."""

    def between(self, start: Any, end: Any) -> float:
        """Milliseconds from one mark to another."""


class HostClock:
    """For devices that work in step with Python."""

    def mark(self) -> float:
        return time.perf_counter()

    def settle(self) -> None:
        pass

    def between(self, start: float, end: float) -> float:
        return (end - start) * 1e3


class CudaClock:
    """CUDA events on the current stream of ``device``."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def settle(self) -> None:
        torch.cuda.synchronize(self.device)

    def between(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end)


def clock_of(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock(device) if device.type == "cuda" else HostClock()


@dataclass(frozen=True)
class Times:
    """Repeated measurements of one thing, in milliseconds."""

    times_ms: tuple[float, ...]

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


@dataclass(frozen=True)
class Timing(Times):
    """Times of a prefill, and how they were taken."""

    warmup: int
    batch_size: int
    device: str


def iqr(values: Sequence[float]) -> float:
    """Interquartile range; 0 for a single value."""
    lower, upper = quartiles(values)
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
    """Milliseconds of ``repeats`` calls of ``work`` after ``warmup`` calls."""
    check_repeats(warmup, repeats)
    clock = clock_of(device)
    for _ in range(warmup):
        work()
    return [_once(work, clock) for _ in range(repeats)]


def check_repeats(warmup: int, repeats: int) -> None:
    """Raise :class:`OptionError` for numbers that cannot be timed."""
    if repeats < 1 or warmup < 0:
        raise OptionError(f"timing needs repeats >= 1 and warmup >= 0, not {repeats} and {warmup}")


def _once(work: Callable[[], object], clock: Clock) -> float:
    clock.settle()
    start = clock.mark()
    work()
    end = clock.mark()
    clock.settle()
    return clock.between(start, end)


@contextmanager
def undisturbed(clock: Clock) -> Iterator[None]:
    """Nothing runs on the device before or behind what is timed inside, and no garbage is collected meanwhile."""
    collects = gc.isenabled()
    gc.disable()
    clock.settle()
    try:
        yield
        clock.settle()
    finally:
        if collects:
            gc.enable()


# ---- phases of a generation ----------------------------------------------------------------------------------------

PHASES = ("vision", "prefill", "decode", "end_to_end")


def greedy(model: Any, inputs: Mapping[str, Any], new_tokens: int, step: Callable[[Any], object]) -> None:
    """Generate ``new_tokens`` tokens, whatever they are; ``step`` gets the model's output for each of them.

    The loop of ``generate`` without its bookkeeping: no stopping, no copies to the host. Rows must be of one length:
    new tokens come without mask and positions, which follow from the cache.
    """
    mine = dict(inputs)
    for _ in range(new_tokens):
        output = model(**mine, use_cache=True, logits_to_keep=1)
        step(output)
        mine = {"input_ids": output.logits[:, -1:].argmax(-1), "past_key_values": output.past_key_values}


def time_phases(loaded: LoadedModel, inputs: Mapping[str, Any], new_tokens: int) -> dict[str, float]:
    """Milliseconds of each phase of one generation; decode is the mean per token.

    ``prefill`` runs from inputs on the device to the first token and contains ``vision``, which is tower and projector
    and is missing without images; ``decode`` is missing with one new token.
    """
    clock = clock_of(loaded.model.device)
    vision: list[Any] = []
    steps: list[Any] = []
    with ExitStack() as stack:
        tower, projector = loaded.adapter.vision_tower, loaded.adapter.projector
        stack.callback(tower.register_forward_pre_hook(lambda *_: vision.append(clock.mark()), prepend=True).remove)
        for part in (tower, projector):
            stack.callback(part.register_forward_hook(lambda *_: vision.append(clock.mark())).remove)
        stack.enter_context(undisturbed(clock))
        start = clock.mark()
        greedy(loaded.model, inputs, new_tokens, lambda _: steps.append(clock.mark()))
    times = {"prefill": clock.between(start, steps[0]), "end_to_end": clock.between(start, steps[-1])}
    if vision:
        times["vision"] = clock.between(vision[0], vision[-1])
    if new_tokens > 1:
        times["decode"] = clock.between(steps[0], steps[-1]) / (new_tokens - 1)
    return times


class MethodClock:
    """Adds up the time in the method, as a session's ``watch``: spans of it, less the model's own work inside them."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._open: list[str] = []
        self._spans: list[tuple[int, Any, Any]] = []

    @contextmanager
    def __call__(self, part: Literal["method", "model"]) -> Iterator[None]:
        counts = bool(self._open) == (part == "model")
        self._open.append(part)
        start = self.clock.mark()
        yield
        if counts:
            self._spans.append((1 if part == "method" else -1, start, self.clock.mark()))
        self._open.pop()

    def total(self) -> float:
        """Milliseconds, once the clock has settled."""
        return sum(sign * self.clock.between(start, end) for sign, start, end in self._spans)


def time_method(loaded: LoadedModel, method: Method, inputs: Mapping[str, Any]) -> float:
    """Milliseconds that one prefill spends in ``method``: scoring, merging, and the cuts that carry them out."""
    clock = clock_of(loaded.model.device)
    watch = MethodClock(clock)
    with prune(loaded.model, method, watch=watch), undisturbed(clock):
        loaded.model(**inputs, use_cache=True, logits_to_keep=1)
    return watch.total()


def clocks(device: torch.device) -> dict[str, float]:
    """Clock rates in MHz where they can be read now: ``sm`` and ``memory`` of a GPU, the mean over ``cpu`` cores."""
    if device.type == "cuda":
        uuid = torch.cuda.get_device_properties(device).uuid
        query = ["nvidia-smi", f"--id=GPU-{uuid}", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader,nounits"]
        try:
            answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
            return dict(zip(("sm", "memory"), map(float, answer.split(",")), strict=True))
        except (OSError, subprocess.SubprocessError, ValueError):
            return {}
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    rates = [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]
    return {"cpu": statistics.mean(rates)} if rates else {}
