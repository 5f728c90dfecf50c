"""Sweeps: methods × tasks × seeds on one model, each cell stored as soon as it is done."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import yaml
from rich.console import Console

from ...errors import IncompleteError, OptionError
from ...models import load_model
from ...models.load import check_outside
from ...results.store.store import Cell, Store
from ...results.tables.render import render
from ...results.tables.tables import ResultTable, build
from ..answers.cell import agreed
from ..answers.cell_spec import CellSpec
from ..settings.config import MethodEntry, settled
from .cells import cell_specs
from .config import SweepConfig
from .events import ModelStarted, Note, Reporter, Stopwatch, SweepFinished, SweepStarted, reporter
from .executor import Executor, Job, Prepared
from .in_process import InProcess
from .references import references

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
    by default :class:`~visibench.evals.sweeps.in_process.InProcess`.

    Raises :class:`IncompleteError`, which holds the finished cells, if some failed; all others have run by then.
    """
    if config.weights == "meta":
        raise OptionError("weights: meta has nothing that could answer: add --dry-run, or take weights: pretrained")
    store, models, clock = Store(out), config.by_model(), Stopwatch()
    for one in models:
        check_outside(out, one.model)
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
            finished, problems = _sweep_model(one, store, tell, dense, saved, executor or InProcess())
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
        pending = [cell for cell in cells if store.done(cell.config) is None]
        sizes = prepared.sizes({cell.config.task for cell in pending})
        questions = sum(sizes[cell.config.task] for cell in pending)
        done = len(cells) - len(pending)
        for text in _changed(store, pending):
            report(Note(text=text))
        report(ModelStarted(model=config.model, cells=len(cells), done=done, questions=questions))
        before = {cell.config.folder: store.attempt(cell.config) for cell in pending}
        job = Job(config, pending, sizes, store, before, saved)
        if pending:
            executor.run(job, prepared, report)
        finished = [(spec, store.done(spec.config)) for spec in cells]
        failed = [job.failure(spec) for spec, cell in finished if cell is None]
        return [agreed(cell, spec.dense, store) for spec, cell in finished if cell is not None], failed

    def expand(entry: MethodEntry) -> list[CellSpec]:
        alone = config.model_copy(update={"methods": [entry], "budget": None})
        return cell_specs(alone, dense=False, solve=prepared.solve)

    finished, failed = run(cell_specs(config, dense=dense, solve=prepared.solve))
    if config.references and not failed:
        more = references(finished, config.seeds[0], expand, lambda text: report(Note(text=text)))
        report(Note(text=f"{len(more)} cells of references (references: false leaves them out)"))
        added, failed = run(more)
        finished += added
    prepared.forget()
    return finished, failed


def _changed(store: Store, pending: list[CellSpec]) -> list[str]:
    """What is to be said of cells that run anew because their code has changed."""
    counts: Counter[str] = Counter()
    for new, old in store.superseded(cell.config for cell in pending):
        parts = [part for part in new.code if new.code[part] != old.code.get(part)] or ["method"]
        where = new.sources | {"engine": "visibench itself", "data": f"the data of {new.task}"}
        counts[" and ".join(where[part].removesuffix("+") for part in parts)] += 1
    return [
        f"{what} has changed since {count} of these cells ran: they run anew; what is there stays, shown by tables as "
        "of other code"
        for what, count in counts.items()
    ]


def save_tables(cells: list[Cell], out: Path) -> list[ResultTable]:
    """Write the tables of ``cells`` to ``out`` as ``table.md``, ``table.csv`` and ``table.json``, and return them."""
    tables = build(cells)
    for form in ("md", "csv", "json"):
        Store(out).save(f"table.{form}", render(tables, form) + "\n")
    return tables
