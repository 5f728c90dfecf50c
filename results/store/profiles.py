"""What ``visibench profile`` measured: times of methods side by side by phase, and the file that holds them."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from ...errors import DataError
from . import disk
from .records import Environment, Record

SCHEMA: Literal[1] = 1
DENSE = "dense"
"""What the model without the engine is called."""
EARLY: dict[str, Any] = {"schema_version": SCHEMA, "left_out": []}
"""What files of early versions lack, and what it was: a setting that did not fit in memory then ended the profile."""
Positive = Annotated[int, Field(ge=1, strict=True)]
# What readers name of the environment, by part.
_NAMED = {
    "model": ("name", "weights", "dtype", "attention", "device", "hardware", "threads"),
    "versions": ("visibench", "transformers", "torch"),
    "machine": ("python",),
}
_PHASES = ("vision", "prefill", "decode", "end_to_end")
_NESTED = ("vision", "prefill", "end_to_end")  # each contains the one before
_WHOLE = ("prefill", "end_to_end")  # those that have a speed-up


class Lengths(Record):
    """Tokens of each row: text and visual ones in the prompt, and generated ones."""

    prompt: Positive
    visual_tokens: Annotated[int, Field(ge=0, strict=True)]
    new_tokens: Positive

    def spelled(self) -> str:
        """In words."""
        return f"{self.prompt} text and {self.visual_tokens} visual tokens, {self.new_tokens} new ones"


class RepeatedTimes(Record):
    """Repeated times in milliseconds."""

    median: float
    iqr: float
    min: float
    times: list[float] = Field(min_length=1)

    @classmethod
    def of(cls, times: list[float]) -> RepeatedTimes:
        """Of the times of all repeats."""
        lower, upper = quartiles(times)
        return cls(median=statistics.median(times), iqr=upper - lower, min=min(times), times=times)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The lower and the upper one."""
        return quartiles(self.times)


class ProfileRow(Record):
    """One method at one batch size and length.

    ``ms``: times by phase, see :func:`~visibench.evals.compute.timing.time_phases`; ``decode`` is per generated token.
    ``plain_ms``: a prefill of the model alone whose layers get as many tokens as the method leaves them; None for the
    dense model, where plain layers cannot follow it, and in files of early versions. ``overhead_ms``: of prefill, what
    the method itself takes: scoring, merging and carrying out its cuts. ``speedup``: over dense, for prefill and
    end to end; ``promised``: what executed multiply-adds of prefill promise. ``tokens_per_second``: generated ones of
    the whole batch, end to end. ``peak_memory``: most bytes allocated on the device at one time, weights included.
    ``kv_bytes``: keys and values that the cache holds after prefill. ``host_syncs``: times that Python waited for the
    device, in prefill and in one decoding step. ``visual_tokens``: at each layer's input.
    """

    method: str
    options: dict[str, Any]
    batch_size: int
    lengths: Lengths
    ms: dict[str, RepeatedTimes]
    overhead_ms: RepeatedTimes | None
    plain_ms: RepeatedTimes | None = None
    speedup: dict[str, float]
    promised: float
    executed_macs: float
    tokens_per_second: float
    peak_memory: int
    kv_bytes: int
    host_syncs: tuple[int, float] | None
    visual_tokens: list[float]
    clocks_mhz: dict[str, float]

    @property
    def is_dense(self) -> bool:
        """Whether this is the model without the engine, and no method that is called so."""
        return self.method == DENSE and self.overhead_ms is None

    @property
    def realised(self) -> float:
        """Speed-up of prefill as a part of the promised one."""
        return self.speedup["prefill"] / self.promised


class Profile(Record):
    """The outcome: rows in the order in which they were asked for, dense first, and where they came from.

    ``left_out``: batch sizes and lengths that did not fit in memory.
    """

    schema_version: Literal[1] = SCHEMA
    rows: list[ProfileRow] = Field(min_length=1)
    left_out: list[str]
    notes: list[str]
    warmup: int
    repeats: int
    weights_bytes: int
    environment: Environment

    def together(self) -> list[list[ProfileRow]]:
        """Rows that were measured in the same rounds, at one batch size and length; dense first."""
        rounds: list[list[ProfileRow]] = []
        for row in self.rows:
            if row.is_dense or not rounds:
                rounds.append([])
            rounds[-1].append(row)
        return rounds

    def origin(self) -> str:
        """Model, machine and versions in one line."""
        environment = self.environment
        model, versions, code = environment.model, environment.versions, environment.code
        threads = f"{model['threads']} thread{'' if model['threads'] == 1 else 's'}"
        clocks = "".join(f", {name} {rate:.0f} MHz" for name, rate in self.rows[-1].clocks_mhz.items())
        changes = " with changes" if code.get("dirty") else ""
        commit = f" (commit {str(code['commit'])[:9]}{changes})" if "commit" in code else ""
        size = f"{self.weights_bytes / 2**30:.2f} GiB"
        return (
            f"Model {model['name']}: {model['weights']} weights, {size} {model['dtype']}, "
            f"{model['attention']} attention, {model['device']} ({model['hardware']}, {threads}{clocks}); "
            f"visibench {versions['visibench']}{commit}, transformers {versions['transformers']}, "
            f"torch {versions['torch']}, Python {environment.machine['python']}."
        )


def quartiles(times: Sequence[float]) -> tuple[float, float]:
    """The lower and the upper one; both the same for a single time."""
    lower, _, upper = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [*times] * 3
    return lower, upper


def ratios(dense: Sequence[float], method: Sequence[float]) -> list[float]:
    """Dense time / method time in each round."""
    return [a / b for a, b in zip(dense, method, strict=True)]


def speedup(dense: Sequence[float], method: Sequence[float]) -> float:
    """Median over rounds of dense time / method time."""
    return statistics.median(ratios(dense, method))


# ---- reading a file ------------------------------------------------------------------------------------------------


def read(path: Path) -> Profile:
    """Read a profile.

    Raises :class:`DataError` if the file is missing or damaged, of another schema, something else, or if its medians
    and speed-ups are not those of its times.
    """
    remedy = "restore it, or measure anew with `visibench profile --out`"
    try:
        content = json.loads(disk.read(path))
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror or error}): {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged, or no profile (no whole JSON file): {remedy}") from error
    if not isinstance(content, dict) or "rows" not in content:
        raise DataError(
            f"{path} is no profile: give the file that `visibench profile --out` wrote, or the folder of a run"
        )
    if "schema_version" not in content:
        content = EARLY | content
    version = content["schema_version"]
    if version != SCHEMA:
        raise DataError(
            f"{path} has schema version {version}, this visibench knows {SCHEMA}: read it with the visibench that "
            "wrote it, or measure anew with `visibench profile --out`"
        )
    try:
        profile = Profile.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"{path} is damaged, or no profile ({where}: {first['msg']}): {remedy}") from error
    wrong = next(_contradictions(profile), None)
    if wrong is not None:
        raise DataError(f"{path} is damaged, or was changed after it was written ({wrong}): {remedy}")
    return profile


def _contradictions(profile: Profile) -> Iterator[str]:
    """What of a file cannot be what was measured, or is not what its readers need."""
    for part, names in _NAMED.items():
        missing = [name for name in names if name not in getattr(profile.environment, part)]
        if missing:
            yield f"environment.{part} has no {missing[0]!r}"
    for rows in profile.together():
        setting = {(row.batch_size, row.lengths) for row in rows}
        if not rows[0].is_dense or len(setting) > 1:
            yield f"{rows[-1].method}: no row of the dense model at its batch size and lengths stands before it"
        for row in rows:
            where = f"{row.method}, batch {row.batch_size} with {row.lengths.spelled()}"
            yield from (f"{where}: {wrong}" for wrong in _wrong(row, rows[0], profile.repeats))


def _wrong(row: ProfileRow, dense: ProfileRow, repeats: int) -> Iterator[str]:
    """What is wrong with a row; the first thing counts, since the others build on it."""
    absent = {"vision"} if row.lengths.visual_tokens == 0 else set()
    absent |= {"decode"} if row.lengths.new_tokens == 1 else set()
    if row.ms.keys() != set(_PHASES) - absent or row.speedup.keys() != set(_WHOLE):
        yield f"times of {', '.join(row.ms)} and speed-ups of {', '.join(row.speedup)} are not what such a row has"
    if (row.overhead_ms is None) != row.is_dense:
        yield "a method without overhead"
    for phase, measured in row.ms.items():
        if len(measured.times) != repeats:
            yield f"{len(measured.times)} times of {phase} in {repeats} rounds"
        if not all(math.isfinite(time) and time > 0 for time in measured.times):
            yield f"a time of {phase} is no positive number"
    if row.plain_ms is not None and len(row.plain_ms.times) != repeats:
        yield f"{len(row.plain_ms.times)} times of plain layers in {repeats} rounds"
    others = {"overhead": row.overhead_ms, "plain layers": row.plain_ms}
    for phase, measured in (row.ms | {name: times for name, times in others.items() if times is not None}).items():
        if not all(map(math.isfinite, measured.times)) or not _agree(measured, RepeatedTimes.of(measured.times)):
            yield f"median, range or minimum of {phase} are not those of its times"
    nested = [row.ms[phase].times for phase in _NESTED if phase in row.ms]
    if any(a > b for inner, outer in pairwise(nested) for a, b in zip(inner, outer, strict=True)):
        yield "a phase takes longer than the one that contains it"
    for phase, claimed in row.speedup.items():
        if not math.isclose(claimed, speedup(dense.ms[phase].times, row.ms[phase].times), rel_tol=1e-9):
            yield f"the speed-up of {phase} is not that of its times"
    if not math.isfinite(row.promised) or row.promised <= 0:
        yield "the promised speed-up is no positive number"


def _agree(one: RepeatedTimes, other: RepeatedTimes) -> bool:
    pairs = ((one.median, other.median), (one.iqr, other.iqr), (one.min, other.min))
    return all(math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9) for a, b in pairs)
