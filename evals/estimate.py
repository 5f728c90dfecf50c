"""What a sweep has still to do: cells, questions, compute and time, each from what is known and named as such.

Compute per question is that of a finished cell of the same model, method and task, else that of the method's own plan
of visual tokens on the task's first questions, which leaves out scoring and what is saved in the vision tower. Time per
question is that of finished cells. What neither gives is None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Literal

from rich.console import Console

from ..engine.layout import TokenLayout
from ..errors import VisibenchError
from ..methods import Method
from ..models import LoadedModel, load_model
from ..results.records import CellConfig, CellMetrics
from ..results.store import Cell, Store
from .config import SweepConfig
from .flops import executed
from .paper_flops import Work, planned
from .progress import Lines
from .sweep import Plan, Prepared, plan
from .tasks import HUB

PROMPTS = 8
"""Questions of a task on which a method's plan is priced."""


@dataclass(frozen=True)
class Forecast:
    """One cell. ``macs``: executed in one prefill, mean over questions; ``seconds``: for all of the cell.

    ``questions``: None where the task would have to be downloaded first.
    """

    config: CellConfig
    done: bool
    questions: int | None
    macs: float | None
    basis: Literal["measured", "planned"] | None
    seconds: float | None

    @property
    def tflops(self) -> float | None:
        """Executed by the prefills of all questions, 10¹² multiply-adds."""
        return None if self.macs is None or self.questions is None else self.macs * self.questions * 1e-12


def forecast(config: SweepConfig, out: Path, console: Console) -> list[Forecast]:
    """All cells of a sweep in their order. Nothing is written to ``out``; a model is loaded for budgets alone."""
    store = Store(out)
    return [cell for one in config.by_model() for cell in _of_model(one, store, console)]


def _of_model(config: SweepConfig, store: Store, console: Console) -> list[Forecast]:
    prepared = Prepared(config, Lines(console))
    cells = plan(config, solve=prepared.solve)
    finished = store.usable()
    prompts = cache(lambda task: _Prompts(config, prepared, task))
    return [_cell(cell, store, finished, prepared, prompts) for cell in cells]


def _cell(
    cell: Plan, store: Store, finished: Sequence[Cell], prepared: Prepared, prompts: Callable[[str], _Prompts]
) -> Forecast:
    config, found = cell.config, store.found(cell.config)
    if found:
        compute = found.metrics.compute.macs
        return Forecast(config, True, found.metrics.size, compute, "measured", _seconds(found.metrics))
    questions = _questions(config, finished, prepared)
    measured = [one.metrics.compute.macs for one in finished if _what(one.config) == _what(config)]
    macs = fmean(measured) if measured else None if config.origin == HUB else prompts(config.task).macs(cell.method)
    basis: Literal["measured", "planned"] | None = "measured" if measured else None if macs is None else "planned"
    return Forecast(config, False, questions, macs, basis, _time(config, questions, finished))


def _what(config: CellConfig) -> tuple:
    """What decides the compute of one question, the seed aside."""
    options = {key: value for key, value in config.options.items() if key != "seed"}
    return (*_where(config)[:2], config.method, sorted(map(str, options.items())), config.task, config.origin)


def _where(config: CellConfig) -> tuple:
    """What decides the speed of the model itself."""
    return config.model, config.checkpoint, config.device, config.dtype, config.attention, config.batch_size


def _questions(config: CellConfig, finished: Sequence[Cell], prepared: Prepared) -> int | None:
    for one in finished:
        if (one.config.task, one.config.origin, one.config.limit) == (config.task, config.origin, config.limit):
            return one.metrics.size
    if config.origin == HUB:
        return None
    return prepared.tasks([config.task])[config.task].size(config.limit)[0]


def _time(config: CellConfig, questions: int | None, finished: Sequence[Cell]) -> float | None:
    """By finished cells of the same method and task, else of the task, else by all on the same settings."""
    alike = [one for one in finished if _where(one.config) == _where(config)]
    same = [one for one in alike if one.config.task == config.task]
    basis = [one for one in same if _what(one.config) == _what(config)] or same or alike
    if not basis or questions is None:
        return None
    answering = fmean(one.metrics.seconds["total"] / one.metrics.size for one in basis)
    timed = [_prefill_seconds(one.metrics) for one in basis if one.config.timing == config.timing]
    return answering * questions + (fmean(timed) if timed and config.timing else 0.0)


def _seconds(metrics: CellMetrics) -> float:
    return metrics.seconds["total"] + _prefill_seconds(metrics)


def _prefill_seconds(metrics: CellMetrics) -> float:
    if metrics.prefill is None:
        return 0.0
    return fmean(metrics.prefill.times_ms) * (len(metrics.prefill.times_ms) + metrics.prefill.warmup) * 1e-3


class _Prompts:
    """The first questions of a task, as the processor lays them out, and a model known by its sizes alone."""

    def __init__(self, config: SweepConfig, prepared: Prepared, name: str) -> None:
        task = prepared.tasks([name])[name]
        count = min(PROMPTS, task.size(config.limit_of(name))[0])
        self.model = _sizes(config.model)
        questions = [task.question(i) for i in range(count)]
        inputs = self.model.encoded([text for text, _ in questions], [images for _, images in questions])
        visual = inputs["input_ids"] == self.model.adapter.image_token
        self.layout = TokenLayout.from_masks(visual, inputs["attention_mask"])

    def macs(self, method: Method) -> float | None:
        """Executed in one prefill, mean over the questions; None where no plan says so."""
        geometry = self.model.geometry
        if geometry.vision is None or not geometry.vision.tokens:
            return None
        try:
            method.check(geometry)
            counts = method.visual_counts(self.layout, geometry)
        except VisibenchError:
            return None
        if counts is None:
            return None
        rows = zip(counts, self.layout.visual_counts, self.layout.lengths, strict=True)
        traces = (planned(row[None], visual, Work(), geometry, 0, length - visual) for row, visual, length in rows)
        return fmean(executed(trace, geometry).total()[0] for trace in traces)


@cache
def _sizes(model: str) -> LoadedModel:
    return load_model(model, weights="meta")
