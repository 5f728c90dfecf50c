"""Sweeps: methods × tasks × seeds on one model, one cell after the other, each stored as soon as it is done."""

from __future__ import annotations

import hashlib
import os
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console

from ..errors import OptionError
from ..methods import Method
from ..models import LoadedModel, load_model
from ..models.load import EMBEDDED, release
from ..results.records import (
    CellConfig,
    CellMetrics,
    Compute,
    PrefillTime,
    VisualTokens,
    environment,
)
from ..results.render import render
from ..results.store import Cell, Store
from ..results.tables import build
from . import budget
from .config import Solve, SweepConfig, nowhere, settled, variants
from .progress import (
    CellFinished,
    CellStarted,
    Counts,
    ModelStarted,
    Named,
    Note,
    Reporter,
    Stopwatch,
    SweepFinished,
    SweepStarted,
    reporter,
)
from .tasks import Task, check_data, definition, load_tasks, origin_of

if TYPE_CHECKING:
    from .lmms import Evaluation

_WHOLE_FILE = 32 << 20
_EDGE = 64 << 10


@dataclass(frozen=True)
class Plan:
    """One cell to be: its configuration, and the method and task that it names."""

    config: CellConfig
    method: Method


def plan(config: SweepConfig, *, dense: bool = True, solve: Solve = nowhere) -> list[Plan]:
    """All cells of a sweep, the dense model first. Names and options are checked; nothing is loaded.

    ``solve`` is asked, after all checks, for the methods that have a budget.
    """
    check_data(config.data)
    if isinstance(config.limit, dict):
        stray = sorted(set(config.limit) - set(config.tasks))
        if stray:
            raise OptionError(f"limit names task {stray[0]!r}, which is not in the sweep")
    for task in config.tasks:
        definition(task)
    return [cell for one in config.by_model() for cell in _of_model(one, dense, solve)]


def _of_model(config: SweepConfig, dense: bool, solve: Solve) -> list[Plan]:
    checkpoint = fingerprint(config.model)
    cells = []
    for variant in variants(config, dense=dense, solve=solve):
        for task in config.tasks:
            cell = CellConfig(
                model=config.model,
                checkpoint=checkpoint,
                device=config.device,
                dtype=config.dtype,
                attention=config.attention,
                method=variant.method.name,
                options=variant.method.hyperparameters(),
                label=variant.label,
                seed=variant.seed,
                task=task,
                origin=origin_of(task, config.data),
                limit=config.limit_of(task),
                batch_size=config.batch_size,
                timing=config.timing,
            )
            cells.append(Plan(cell, variant.method))
    return cells


def fingerprint(model: str) -> str:
    """Hash of a local checkpoint, so that results of other weights are not taken for its own; empty for a hub name.

    Of files above 32 MiB only the size and both ends are read.
    """
    folder = EMBEDDED.get(model, Path(model))
    if not folder.is_dir():
        return ""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)}:{size}".encode())
        with file.open("rb") as stream:
            if size <= _WHOLE_FILE:
                digest.update(stream.read())
            else:
                digest.update(stream.read(_EDGE))
                stream.seek(-_EDGE, os.SEEK_END)
                digest.update(stream.read())
    return digest.hexdigest()[:16]


def sweep(
    config: SweepConfig, out: Path, console: Console, *, dense: bool = True, report: Reporter | None = None
) -> list[Cell]:
    """Run what is not done yet, and return all cells of the sweep in their order.

    Tasks and methods are built before the model is loaded, so that mistakes show at once. Progress goes to ``report``,
    by default bars or lines on ``console``. A cell that was interrupted runs again from its start. Models come one
    after the other, each loaded once and gone before the next.
    """
    store, models, clock = Store(out), config.by_model(), Stopwatch()
    for later in models[1:]:
        geometry = load_model(later.model, weights="meta").geometry
        for method in settled(later):
            method.check(geometry)
    saved = yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=True), sort_keys=False)
    with report or reporter(console) as tell:
        tell(SweepStarted(out=str(out), models=[one.model for one in models], tasks=config.tasks))
        cells = [cell for one in models for cell in _sweep_model(one, store, tell, dense, saved)]
        tell(SweepFinished(out=str(out), cells=len(cells), seconds=clock()))
    return cells


def _sweep_model(config: SweepConfig, store: Store, report: Reporter, dense: bool, saved: str) -> list[Cell]:
    prepared = Prepared(config, report)
    cells = plan(config, dense=dense, solve=prepared.solve)
    pending = [cell for cell in cells if store.done(cell.config) is None]
    sizes = prepared.sizes({cell.config.task for cell in pending})
    questions = sum(sizes[cell.config.task] for cell in pending)
    done = len(cells) - len(pending)
    report(ModelStarted(model=config.model, cells=len(cells), done=done, questions=questions))
    if pending:
        store.save("sweep.yaml", saved)
        _run(pending, sizes, prepared, store, report)
    del prepared
    release()
    return [cell for cell in (store.done(planned.config) for planned in cells) if cell is not None]


def save_tables(cells: list[Cell], out: Path) -> None:
    """Write the tables of ``cells`` to ``out`` as ``table.md``, ``table.csv`` and ``table.json``."""
    tables = build(cells)
    for form in ("md", "csv", "json"):
        Store(out).save(f"table.{form}", render(tables, form) + "\n")


class Prepared:
    """Model and tasks of a sweep, each loaded when it is first needed."""

    def __init__(self, config: SweepConfig, report: Reporter) -> None:
        self.config, self.report = config, report
        self._tasks: dict[str, Task] = {}

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model."""
        config = self.config
        return load_model(config.model, device=config.device, dtype=config.dtype, attn_implementation=config.attention)

    def tasks(self, names: Sequence[str]) -> dict[str, Task]:
        """Tasks by name."""
        missing = [name for name in names if name not in self._tasks]
        self._tasks |= {task.name: task for task in (load_tasks(missing, self.config.data) if missing else [])}
        return {name: self._tasks[name] for name in names}

    def sizes(self, names: Collection[str]) -> dict[str, int]:
        """Questions to ask of each of these tasks."""
        tasks = self.tasks([name for name in self.config.tasks if name in names])
        return {name: task.size(self.config.limit_of(name))[0] for name, task in tasks.items()}

    @cached_property
    def prompts(self) -> budget.Prompts:
        """What budgets are solved on: the first questions of every task."""
        tasks = self.tasks(self.config.tasks)
        return budget.Prompts.of(self.loaded, list(tasks.values()), batch_size=self.config.batch_size)

    def solve(self, name: str, options: Mapping[str, Any], target: budget.Target) -> Method:
        """The method that meets the target."""
        found = budget.solve(name, options, target, self.prompts)
        price = target.spell(self.prompts.price(target.kind, found.method))
        self.report(Note(text=f"{name} {target}: {found.method} gives {price} on {self.prompts.count} prompts"))
        return found.method


def _run(pending: list[Plan], sizes: Mapping[str, int], prepared: Prepared, store: Store, report: Reporter) -> None:
    tasks, loaded = prepared.tasks(list(sizes)), prepared.loaded
    for cell in pending:
        cell.method.check(loaded.geometry)
    for number, cell in enumerate(pending, start=1):
        clock, name = Stopwatch(), Named.cell(cell.config, number, len(pending), sizes[cell.config.task])
        report(CellStarted(cell=name))
        counts = Counts(name, clock, report)
        done = run_cell(loaded, cell.method, tasks[cell.config.task], cell.config, store, counts)
        report(CellFinished.of(name, done.metrics, clock()))


def run_cell(
    loaded: LoadedModel,
    method: Method,
    task: Task,
    config: CellConfig,
    store: Store,
    on_batch: Callable[[int], None] | None = None,
) -> Cell:
    """Evaluate and time one cell, and store it."""
    from .lmms import evaluate

    folder = store.begin(config)
    evaluation = evaluate(
        loaded,
        method,
        task,
        limit=config.limit,
        batch_size=config.batch_size,
        seed=config.seed,
        output_dir=folder,
        on_batch=on_batch,
    )
    prefill = _time(loaded, method, task, config)
    return store.finish(config, evaluation.samples, _metrics(evaluation, prefill, config, loaded))


def _time(loaded: LoadedModel, method: Method, task: Task, config: CellConfig) -> PrefillTime | None:
    if config.timing is None:
        return None
    from .timing import time_prefill

    wanted = config.timing
    questions = [task.question(i) for i in range(min(wanted.batch_size, len(task.docs)))]
    inputs = loaded.inputs([prompt for prompt, _ in questions], [images for _, images in questions])
    timing = time_prefill(loaded, method, inputs, warmup=wanted.warmup, repeats=wanted.repeats)
    return PrefillTime(
        times_ms=list(timing.times_ms), warmup=timing.warmup, batch_size=timing.batch_size, device=timing.device
    )


def _metrics(result: Evaluation, prefill: PrefillTime | None, config: CellConfig, loaded: LoadedModel) -> CellMetrics:
    samples = result.samples
    tokens = list(zip(*samples["visual_tokens"], strict=True))
    macs = samples["executed_macs"].tolist()
    return CellMetrics(
        config_hash=config.digest(),
        size=result.size,
        total=result.total,
        note=result.note,
        scores=result.scores,
        metrics=result.metrics,
        categories=result.categories,
        visual_tokens=VisualTokens(
            prompt=statistics.fmean(samples["prompt_visual_tokens"]), per_layer=[statistics.fmean(t) for t in tokens]
        ),
        compute=Compute(macs=statistics.fmean(macs), macs_sd=statistics.pstdev(macs), components=result.components),
        prefill=prefill,
        generation=result.generation,
        seconds=result.seconds,
        data_hash=result.data_hash,
        environment=environment(loaded.describe()),
    )
