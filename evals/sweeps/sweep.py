"""Sweeps: methods × tasks × seeds on one model, one cell after the other, each stored as soon as it is done."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from ...errors import IncompleteError
from ...methods import Method
from ...models import LoadedModel, load_model
from ...models.load import release
from ...results.store.store import Cell, Store
from ...results.tables.render import render
from ...results.tables.tables import ResultTable, build
from ...utils.interrupt import stoppable
from ..answers.cell import agreed, run_cell
from ..answers.cell_spec import CellSpec
from ..compute import budget
from ..tasks.tasks import Task, load_tasks
from . import torchrun
from .cells import fingerprint, plan
from .claims import claimed, done_elsewhere
from .config import SweepConfig, settled
from .events import (
    CellFailed,
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
from .feature_sharing import feature_store
from .processes import Executor, Job
from .references import references

__all__ = ["CellSpec", "Prepared", "fingerprint", "local", "plan", "run_cell", "save_tables", "sweep"]

SHOWN = 3
"""Failed cells named in the last line."""


def sweep(
    config: SweepConfig,
    out: Path,
    console: Console,
    *,
    dense: bool = True,
    report: Reporter | None = None,
    executor: Executor | None = None,
) -> list[Cell]:
    """Run what is not done yet, and return all cells of the sweep in their order.

    Tasks and methods are built before the model is loaded, so that mistakes show at once. Progress goes to ``report``,
    by default bars or lines on ``console``. Interrupted cells go on behind their last batch. Several processes may run
    the same sweep on the same folder: each takes cells that nobody else works on, and waits for the others' at the end.
    Models come one after the other, each loaded once and gone before the next. ``executor`` runs the cells of a model,
    by default :func:`local`.

    Raises :class:`IncompleteError`, which holds the finished cells, if some failed; all others have run by then.
    """
    store, models, clock = Store(out), config.by_model(), Stopwatch()
    for later in models[1:]:
        geometry = load_model(later.model, weights="meta").geometry
        for method in settled(later):
            method.check(geometry)
    saved = yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=True), sort_keys=False)
    with report or reporter(console) as tell:
        tell(SweepStarted(out=str(out), models=[one.model for one in models], tasks=config.tasks))
        cells: list[Cell] = []
        failed: list[str] = []
        for one in models:
            finished, problems = _sweep_model(one, store, tell, dense, saved, executor or local)
            cells, failed = cells + finished, failed + problems
        tell(SweepFinished(out=str(out), cells=len(cells), seconds=clock()))
    if failed:
        raise IncompleteError(_summary(failed, len(cells)), cells)
    return cells


def _summary(failed: list[str], done: int) -> str:
    others = f" (and {len(failed) - SHOWN} more)" if len(failed) > SHOWN else ""
    return (
        f"{len(failed)} of {len(failed) + done} cells are incomplete and left out of tables: "
        f"{'; '.join(failed[:SHOWN])}{others}. Run the same command again to try what failed once more"
    )


def _sweep_model(
    config: SweepConfig, store: Store, report: Reporter, dense: bool, saved: str, executor: Executor
) -> tuple[list[Cell], list[str]]:
    """The finished cells of a model, and what is to be said of the others."""
    prepared = Prepared(config, report)

    def run(cells: list[CellSpec]) -> tuple[list[Cell], list[str]]:
        failed: list[str] = []
        pending = [cell for cell in cells if store.done(cell.config) is None]
        sizes = prepared.sizes({cell.config.task for cell in pending})
        questions = sum(sizes[cell.config.task] for cell in pending)
        done = len(cells) - len(pending)
        report(ModelStarted(model=config.model, cells=len(cells), done=done, questions=questions))
        if pending:
            store.save("sweep.yaml", saved)
            failed = executor(Job(config, pending, sizes, store, time.time()), prepared, report)
        finished = [(planned, store.done(planned.config)) for planned in cells]
        return [agreed(cell, planned.dense, store) for planned, cell in finished if cell is not None], failed

    finished, failed = run(plan(config, dense=dense, solve=prepared.solve))
    if config.references and not failed:
        more = references(config, finished, prepared.solve, lambda text: report(Note(text=text)))
        report(Note(text=f"{len(more)} cells of references (references: false leaves them out)"))
        added, failed = run(more)
        finished += added
    prepared.forget()
    return finished, failed


def save_tables(cells: list[Cell], out: Path) -> list[ResultTable]:
    """Write the tables of ``cells`` to ``out`` as ``table.md``, ``table.csv`` and ``table.json``, and return them."""
    tables = build(cells)
    for form in ("md", "csv", "json"):
        Store(out).save(f"table.{form}", render(tables, form) + "\n")
    return tables


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

    def forget(self) -> None:
        """Free the model's memory."""
        for name in ("prompts", "loaded"):
            self.__dict__.pop(name, None)
        release()

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


def local(job: Job, prepared: Prepared, report: Reporter) -> list[str]:
    """Run cells in this process, and tell which failed. Processes on one folder share the cells out by their claims."""
    tasks, loaded, store = prepared.tasks(list(job.sizes)), prepared.loaded, job.store
    failed = []
    for cell in job.cells:
        cell.method.check(loaded.geometry)

    def say(text: str) -> None:
        report(Note(text=text))

    with (
        feature_store(loaded, prepared.config, say) as features,
        stoppable(say) as check,
        closing(claimed(job.cells, store, say, check)) as mine,
    ):
        for number, cell in enumerate(mine, start=1):
            clock, name = Stopwatch(), Named.cell(cell.config, number, len(job.cells), job.sizes[cell.config.task])
            report(CellStarted(cell=name))
            counts = Counts(name, clock, report)

            def on_batch(answered: int, counts: Counts = counts) -> None:
                counts(answered)
                check()

            try:
                done = done_elsewhere(cell.config, name.questions, store, job.began) or run_cell(
                    loaded, cell, tasks[cell.config.task], store, on_batch, features, torchrun.answer
                )
                report(CellFinished.of(name, done.metrics, clock()))
            except IncompleteError as error:
                report(CellFailed(cell=name, problem=str(error), seconds=clock()))
                failed.append(f"{name.label} · {name.task} · seed {name.seed}: {error}")
    return failed
