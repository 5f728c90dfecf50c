"""Time, memory and compute of methods side by side, in one process and on one model.

The dense model stands beside them without the engine. Repeats go round-robin over all methods, so that a drift of the
machine hits all alike, and speed-ups are medians over repeats of dense time / method time. What cannot be measured on a
device is None.
"""

from __future__ import annotations

import os
import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, field_validator
from rich.console import Console

from ...engine import prune
from ...errors import OptionError
from ...methods import Method, load_method
from ...models import LoadedModel, load_model
from ...models.geometry import MOST_TOKENS, Weights, typical
from ...models.load import release
from ...results.store.profiles import DENSE, Lengths, Profile, ProfileRow, RepeatedTimes, speedup
from ...results.store.records import MOST_PREFILLS, Record, environment
from ..settings.config import Config, Count, Variant, variants
from . import attainable, flops, timing
from .memory import check_prefill, keep_freed_memory, out_of_memory, peak_memory

Tokens = Annotated[int, Field(ge=1, le=MOST_TOKENS, strict=True)]
Rounds = Annotated[int, Field(ge=1, le=MOST_PREFILLS, strict=True)]
Threads = Annotated[int, Field(ge=1, le=max(64, os.cpu_count() or 1), strict=True)]
"""More would be slower, and so many that OpenMP ends the process."""


class AskedLengths(Record):
    """Lengths as a configuration gives them: what it leaves out has a default, of visual tokens those of one image."""

    prompt: Tokens = 64
    visual_tokens: Annotated[int, Field(ge=0, le=MOST_TOKENS, strict=True)] | None = None
    new_tokens: Tokens = 16

    def of(self, loaded: LoadedModel) -> Lengths:
        """The same for a model."""
        visual = typical(loaded.adapter) if self.visual_tokens is None else self.visual_tokens
        return Lengths(prompt=self.prompt, visual_tokens=visual, new_tokens=self.new_tokens)


class ProfileConfig(Config):
    """Methods × batch sizes × lengths on one model."""

    parts: ClassVar = {"lengths": AskedLengths}

    weights: Weights = "pretrained"
    """`random`: the model's sizes with random weights; nothing is downloaded."""
    layers: Count | None = None
    """Keep only so many decoder layers."""
    threads: Threads | None = None
    """Threads of torch on a CPU; null leaves them as they are."""
    batch_sizes: list[Count] = Field(default=[1], min_length=1)
    """Rows of the batches that are timed."""
    lengths: list[AskedLengths] = Field(default=[AskedLengths()], min_length=1)
    """Text tokens, visual tokens (null: those of one image) and new tokens of a row."""
    warmup: Annotated[int, Field(ge=0, le=MOST_PREFILLS, strict=True)] = 3
    """Rounds before the first that counts."""
    repeats: Rounds = 20
    """Rounds that are timed; each runs all methods in turn."""
    overhead_every: Count = 1
    """The overhead of methods takes a prefill of its own, in one of so many rounds."""

    @field_validator("batch_sizes", "lengths")
    @classmethod
    def _once(cls, values: list[Any]) -> list[Any]:
        if any(value in values[:place] for place, value in enumerate(values)):
            raise ValueError("one stands there twice: leave it out")
        return values


@dataclass(frozen=True)
class Contender:
    """A method as tables call it; None for the model alone."""

    label: str
    method: Method | None

    def under(self, loaded: LoadedModel) -> AbstractContextManager[Any]:
        """The model under this method."""
        return nullcontext() if self.method is None else prune(loaded.model, self.method)


@dataclass(frozen=True)
class Facts:
    """What does not change from repeat to repeat; as in :class:`ProfileRow`."""

    schedule: list[int] | None
    executed_macs: float
    visual_tokens: list[float]
    kv_bytes: int
    peak_memory: int
    host_syncs: tuple[int, float] | None


def profile(config: ProfileConfig, console: Console, keep: Callable[[Profile], object] = lambda _: None) -> Profile:
    """Measure all rows. Methods and lengths are checked before anything is timed; progress goes to ``console``.

    ``keep`` gets what there is after each batch size and length, with a note on what is still to come. What does not
    fit in memory is left out; :class:`OptionError` if that is all.
    """
    if config.weights == "meta":
        raise OptionError("a model on meta cannot run: give weights random, or pretrained ones")
    compared = variants(config, dense=False)
    if any(variant.control for variant in compared):
        raise OptionError("a control takes the time of its method and more: leave control out of a profile")
    loaded = load_model(config.model, **config.loading, weights=config.weights, layers=config.layers)
    for variant in compared:
        with prune(loaded.model, variant.method):
            pass  # as far as can be known before it runs
    asked = [lengths.of(loaded) for lengths in config.lengths]
    for lengths in asked:
        loaded.synthetic_inputs(1, lengths.prompt, lengths.visual_tokens)
    contenders = [Contender(DENSE, None), *(Contender(_label(v, compared), v.method) for v in compared)]
    rows: list[ProfileRow] = []
    left_out: list[str] = []
    settings = list(product(asked, config.batch_sizes))

    def so_far(to_come: int) -> Profile:
        return Profile(
            rows=rows,
            left_out=left_out,
            notes=_notes(config, [variant.method for variant in compared], to_come),
            warmup=config.warmup,
            repeats=config.repeats,
            weights_bytes=loaded.nbytes,
            environment=environment(loaded.describe()),
        )

    with _cpu(config.threads):
        for to_come, (lengths, batch) in zip(reversed(range(len(settings))), settings, strict=True):
            console.print(f"batch {batch}, {lengths.spelled()}: {len(contenders)} rows", highlight=False)
            new = compare(loaded, contenders, batch, lengths, config)
            if new is None:
                release()
                left_out.append(f"batch {batch} with {lengths.spelled()}")
            else:
                rows += new
            if rows:
                keep(so_far(to_come))
        if not rows:
            raise OptionError(f"{left_out[0]} does not fit in memory: ask for less")
        return so_far(0)


@contextmanager
def _cpu(threads: int | None) -> Iterator[None]:
    """So many threads of torch inside, and memory that stays with the process, then and later."""
    keep_freed_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compare(
    loaded: LoadedModel, contenders: list[Contender], batch: int, lengths: Lengths, config: ProfileConfig
) -> list[ProfileRow] | None:
    """One row for each contender, the first of which is the dense model; None if they do not fit in memory."""
    try:
        check_prefill(loaded, batch, lengths.prompt + lengths.visual_tokens + lengths.new_tokens)
        inputs = loaded.synthetic_inputs(batch, lengths.prompt, lengths.visual_tokens)
        with torch.inference_mode():
            facts = [_facts(loaded, contender, inputs, lengths.new_tokens) for contender in contenders]
            times = _round_robin(loaded, contenders, facts, inputs, lengths.new_tokens, config)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return None
    clocks = timing.clocks(loaded.model.device)
    dense_facts, dense_times = facts[0], times[0]
    rows = []
    for contender, fact, measured in zip(contenders, facts, times, strict=True):
        overhead, plain = measured.pop("overhead", None), measured.pop("plain", None)
        end_to_end = statistics.median(measured["end_to_end"]) / 1e3
        rows.append(
            ProfileRow(
                method=contender.label,
                options=contender.method.hyperparameters() if contender.method else {},
                batch_size=batch,
                lengths=lengths,
                ms={phase: RepeatedTimes.of(measured[phase]) for phase in timing.PHASES if phase in measured},
                overhead_ms=RepeatedTimes.of(overhead) if overhead else None,
                plain_ms=RepeatedTimes.of(plain) if plain else None,
                speedup={phase: speedup(dense_times[phase], measured[phase]) for phase in ("prefill", "end_to_end")},
                promised=dense_facts.executed_macs / fact.executed_macs,
                tokens_per_second=batch * lengths.new_tokens / end_to_end,
                clocks_mhz=clocks,
                **{name: value for name, value in vars(fact).items() if name != "schedule"},
            )
        )
    return rows


def _round_robin(
    loaded: LoadedModel,
    contenders: list[Contender],
    facts: list[Facts],
    inputs: dict[str, Any],
    new_tokens: int,
    config: ProfileConfig,
) -> list[dict[str, list[float]]]:
    """Times by phase of each contender, one for each repeat. Each round starts with another contender.

    Right behind a method plain layers run on its schedule of tokens.
    """
    times: list[dict[str, list[float]]] = [{} for _ in contenders]
    for number in range(-config.warmup, config.repeats):
        for turn in range(len(contenders)):
            which = (turn + number + config.warmup) % len(contenders)
            contender, schedule = contenders[which], facts[which].schedule
            with contender.under(loaded):
                measured = timing.time_phases(loaded, inputs, new_tokens)
            if schedule is not None:
                measured["plain"] = attainable.time_plain(loaded, inputs, schedule)
            if contender.method is not None and number % config.overhead_every == 0:
                measured["overhead"] = timing.time_method(loaded, contender.method, inputs)
            if number >= 0:
                for phase, value in measured.items():
                    times[which].setdefault(phase, []).append(value)
    return times


def _facts(loaded: LoadedModel, contender: Contender, inputs: dict[str, Any], new_tokens: int) -> Facts:
    """Two untimed runs: one for memory and waits, one under the engine for what was executed."""
    device = loaded.model.device
    kv_bytes: list[int] = []
    waits: list[Any] = []

    def look(output: Any) -> None:
        waits.append(syncs())
        kv_bytes.append(sum(layer.keys.nbytes + layer.values.nbytes for layer in output.past_key_values.layers))

    with contender.under(loaded), _host_syncs(device) as syncs, peak_memory(device, loaded.nbytes) as peak:
        timing.greedy(loaded.model, inputs, new_tokens, look)
    with prune(loaded.model, contender.method or load_method("none")) as session:
        loaded.model(**inputs, use_cache=True, logits_to_keep=1)
    first, last = waits[0], waits[-1]
    method = contender.method
    return Facts(
        schedule=None if method is None else attainable.schedule(session.trace, method, loaded),
        executed_macs=sum(flops.executed(session.trace, loaded.geometry).total()),
        visual_tokens=session.trace.visual_counts().double().mean(0).tolist(),
        kv_bytes=kv_bytes[0],
        peak_memory=peak(),
        host_syncs=None if first is None else (first, (last - first) / max(new_tokens - 1, 1)),
    )


@contextmanager
def _host_syncs(device: torch.device) -> Iterator[Callable[[], Any]]:
    """Count how often Python waits for a CUDA device, by torch's own warnings; None on other devices."""
    if device.type != "cuda":
        yield lambda: None
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lambda: sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _label(variant: Variant, compared: list[Variant]) -> str:
    """With the seed where a method stands there with several."""
    several = sum(other.label == variant.label for other in compared) > 1
    return f"{variant.label} seed {variant.seed}" if several else variant.label


def _notes(config: ProfileConfig, methods: list[Method], to_come: int) -> list[str]:
    """What a reader must know of these rows."""
    notes = ["random prompts, images and weights" if config.weights == "random" else "random prompts and images"]
    if to_come:
        notes.append(f"unfinished: {to_come} more batch sizes and lengths were to be measured")
    for method in methods:
        if method.hyperparameters().get("forced"):
            notes.append(f"{method}: where it cuts and how much was forced, not found by its rule")
        elif method.adaptive and not method.hyperparameters().get("tokens"):
            notes.append(f"{method}: chooses by its rule how much it keeps, which on random inputs says nothing")
    return notes
