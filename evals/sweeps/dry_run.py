"""What a sweep has still to do: cells, questions, compute and time, each from what is known and named as such.

Compute per question is that of a finished cell of the same model, method and task, else that of the method's own plan
of visual tokens on the task's first questions, or, where these would have to be downloaded, on a typical prompt
(:mod:`~visibench.evals.sweeps.estimate`). Plans leave out scoring; for methods whose plan depends on what they see it
is that of keeping all tokens, as an upper bound. Time per question is that of finished cells, else that of the dense
model on one batch, else the prefills' multiply-adds at a stated rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Literal

from rich.console import Console

from ...engine.layout import TokenLayout
from ...engine.session import fitting
from ...errors import FOREIGN, DataError, reason
from ...methods import Method, load_method
from ...models import LoadedModel
from ...models.geometry import check_weights
from ...models.load import fingerprint
from ...results.store.records import CellConfig, CellMetrics
from ...results.store.store import Cell, Store
from ..answers.cell_spec import CellSpec
from ..compute.flops import executed
from ..compute.prefill_plan import planned
from ..settings.config import DENSE
from ..tasks.tasks import HUB
from . import estimate, pace
from .cells import cell_specs
from .config import SweepConfig
from .estimate import Basis, Rate
from .events import Lines, Note
from .executor import Prepared

PROMPTS = 8
"""Questions of a task on which a method's plan is priced."""


@dataclass(frozen=True)
class CellCost:
    """One cell. ``macs``: executed in one prefill, mean over questions; ``seconds``: for all of the cell.

    ``questions``: None where the task would have to be downloaded first. ``basis``: of ``macs``, which are an upper
    bound with ``bound``. ``clock``: whether finished cells, one batch of the dense model or a rate gave ``seconds``.
    ``memory``: bytes of the largest batch, estimated; None where that is not known.
    """

    config: CellConfig
    done: bool
    questions: int | None
    macs: float | None
    basis: Basis | None
    seconds: float | None
    clock: Literal["cells", "batch", "rate"] | None
    memory: int | None = None

    @property
    def tflops(self) -> float | None:
        """Executed by the prefills of all questions, 10¹² multiply-adds."""
        return None if self.macs is None or self.questions is None else self.macs * self.questions * 1e-12


def dry_run(config: SweepConfig, out: Path, console: Console, rate: Rate | None = None) -> list[CellCost]:
    """All cells of a sweep in their order. Nothing is written to ``out``. ``rate``: see :func:`.estimate.rate`.

    A model is loaded for budgets, and to time a batch if it is on this disk and not large. Raises
    :class:`VisibenchError` for what the sweep itself would refuse.
    """
    store = Store(out)
    return [cell for one in config.by_model() for cell in _of_model(one, store, console, rate or estimate.rate(None))]


def _of_model(config: SweepConfig, store: Store, console: Console, rate: Rate) -> list[CellCost]:
    prepared = Prepared(config, Lines(console))
    cells = cell_specs(config, solve=prepared.solve)
    model = _check(config, [cell.method for cell in cells], prepared)
    known = _Known(config, prepared, store.usable(), model, rate)
    try:
        return [_cell(cell, store.find(cell.config), known) for cell in cells]
    finally:
        prepared.forget()


def _check(config: SweepConfig, methods: Sequence[Method], prepared: Prepared) -> LoadedModel | None:
    """Raise what the engine has against the methods, or the model's settings against this machine."""
    check_weights(config.model, config.weights, None)
    try:
        sizes = estimate.sizes(config)
    except DataError as error:
        if fingerprint(config.model):
            raise
        prepared.report(Note(text=f"Not checked against the model: {error}"))
        return None
    for method in methods:
        fitting(sizes.adapter, method)
    return sizes


def _cell(cell: CellSpec, done: Cell | None, known: _Known) -> CellCost:
    config = cell.config
    if done:
        size, compute = done.metrics.size, done.metrics.compute.macs
        return CellCost(config, True, size, compute, "measured", _seconds(done.metrics), "cells")
    questions = known.questions(config)
    seconds = known.seconds(config, questions)
    clock: Literal["cells", "batch", "rate"] | None = "cells" if seconds else None
    here = questions is not None and config.origin != HUB
    if seconds is None and here and (batch := known.pace(config.task)):
        seconds, clock = batch.question * (questions or 0) + batch.prefill, "batch"
    macs, basis = known.compute(cell)
    if seconds is None and questions is not None and macs is not None and known.by_rate(config):
        seconds, clock = macs * questions * 1e-12 / known.rate.tmacs, "rate"
    return CellCost(config, False, questions, macs, basis, seconds, clock, known.memory)


def _what(config: CellConfig) -> tuple:
    """What decides the compute of one question, the seed aside."""
    options = {key: value for key, value in config.options.items() if key != "seed"}
    what = config.role, config.method, sorted(map(str, options.items()))
    return (*_where(config)[:2], str(config.protocol), *what, config.task, config.origin)


def _where(config: CellConfig) -> tuple:
    """What decides the speed of the model itself."""
    settings = config.device, config.dtype, config.attention, str(config.placed), str(config.protocol)
    return config.model, config.checkpoint, *settings, config.batch_size


class _Known:
    """What finished cells, plans and the first batch of a task tell of the cells of one model."""

    def __init__(
        self, config: SweepConfig, prepared: Prepared, finished: Sequence[Cell], model: LoadedModel | None, rate: Rate
    ) -> None:
        self.config, self.prepared, self.finished, self.model, self.rate = config, prepared, finished, model, rate
        self.memory = None if model is None else estimate.memory(model, config.batch_size, config.quantization)
        self.prompts = cache(lambda task: _Prompts(config, prepared, task))
        self.pace = cache(self._pace)

    def questions(self, config: CellConfig) -> int | None:
        for one in self.finished:
            if (one.config.task, one.config.origin, one.config.limit) == (config.task, config.origin, config.limit):
                return one.metrics.size
        if config.origin == HUB:
            size = estimate.QUESTIONS.get(config.task)
            return size if size is None or config.limit is None else min(size, config.limit)
        return self.prepared.tasks([config.task])[config.task].size(config.limit)[0]

    def by_rate(self, config: CellConfig) -> bool:
        """Whether a rate may stand for a time: of what is not here to be timed, or where one was given."""
        return config.origin == HUB or self.rate.given or self.model is None or self.model.processor is None

    def compute(self, cell: CellSpec) -> tuple[float | None, Basis | None]:
        measured = [one.metrics.compute.macs for one in self.finished if _what(one.config) == _what(cell.config)]
        if measured:
            return fmean(measured), "measured"
        if self.model is None:
            return None, None
        if cell.config.origin == HUB or self.model.processor is None:
            return estimate.macs(self.model, cell.method)
        prompts = self.prompts(cell.config.task)
        macs = prompts.macs(cell.method)
        if macs is not None:
            return macs, "planned"
        most = prompts.macs(load_method(DENSE))
        return most, None if most is None else "bound"

    def seconds(self, config: CellConfig, questions: int | None) -> float | None:
        """By finished cells of the same method and task, else of the task, else by all on the same settings."""
        alike = [one for one in self.finished if _where(one.config) == _where(config)]
        same = [one for one in alike if one.config.task == config.task]
        basis = [one for one in same if _what(one.config) == _what(config)] or same or alike
        if not basis or questions is None:
            return None
        answering = fmean(one.metrics.seconds["total"] / one.metrics.size for one in basis)
        timed = [_prefill_seconds(one.metrics) for one in basis if one.config.timing == config.timing]
        return answering * questions + (fmean(timed) if timed and config.timing else 0.0)

    def _pace(self, task: str) -> pace.Pace | None:
        """Of the dense model, if it is on this disk and not large."""
        if not fingerprint(self.config.model) or self.model is None or self.model.nbytes > pace.LARGEST:
            return None
        try:
            return pace.pace(self.prepared.loaded, self.prepared.tasks([task])[task], self.config)
        except FOREIGN as error:  # whatever a sweep would note of single questions
            self.prepared.report(Note(text=f"No time for {task}: {reason(error)}"))
            return None


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
        self.model = estimate.sizes(config)
        questions = [task.question(i) for i in range(count)]
        inputs = self.model.encoded([text for text, _ in questions], [images for _, images in questions])
        visual = inputs["input_ids"] == self.model.adapter.image_token
        self.layout = TokenLayout.from_masks(visual, inputs["attention_mask"])
        self.images = {key: sizes for key, sizes in inputs.items() if not key.startswith("pixel")}

    def macs(self, method: Method) -> float | None:
        """Executed in one prefill, mean over the questions; None where no plan says so."""
        trace = planned(self.model.adapter, method, self.layout, self.images)
        return None if trace is None else fmean(executed(trace, self.model.geometry).total())
