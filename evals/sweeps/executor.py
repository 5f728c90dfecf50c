"""Who runs the cells of a model: the interface, and what every executor is handed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

from ...engine.session import fitting
from ...errors import IncompleteError
from ...methods import Method
from ...models import LoadedModel, load_model
from ...models.geometry import typical
from ...models.load import release
from ...results.store.store import Store
from ..answers.cell_spec import CellSpec
from ..compute import budget
from ..settings.target import Target
from ..tasks.definitions import called
from ..tasks.tasks import Task, load_tasks
from . import estimate
from .claims import done_elsewhere
from .config import SweepConfig
from .events import Named, Note, Reporter

UNFINISHED = "not finished"


class Executor(Protocol):
    """Runs cells: in this process, in several on this machine, or on a Ray cluster."""

    def run(self, job: Job, prepared: Prepared, report: Reporter) -> None:
        """Leave each cell of ``job``, once begun, done in its store, or with its failures written down there.

        ``prepared`` is what this process has loaded; an executor uses it, or frees it for workers of its own.
        ``report`` hears of each cell once when it begins and once when it ends. Other processes may work on the same
        store: cells that they have claimed are waited for. Raises :class:`VisibenchError` where no cell can run, such
        as a method that cannot act on the model, and ``KeyboardInterrupt`` behind what was running.
        """
        ...


@dataclass(frozen=True)
class Job:
    """Cells of one model to run: all of ``cells`` with ``sizes`` questions by task.

    ``before``: failed attempts at them (:meth:`~visibench.results.store.store.Store.attempt`) that are to be tried
    again, by folder. ``asked``: the configuration of the whole run.
    """

    config: SweepConfig
    cells: list[CellSpec]
    sizes: Mapping[str, int]
    store: Store
    before: Mapping[str, str | None]
    asked: str

    def begin(self) -> None:
        """Write down what is asked of the run: after all that can refuse it, and before the first cell."""
        self.store.save("sweep.yaml", self.asked)

    def check(self, loaded: LoadedModel | None = None) -> None:
        """Raise what the engine has against the methods on the model, as far as can be known before they run.

        Without the model its sizes do, without its weights.
        """
        if loaded is None:
            attention = self.config.attention
            loaded = load_model(
                self.config.model, weights="meta", dtype=self.config.dtype, attn_implementation=attention
            )
        for method in {id(cell.method): cell.method for cell in self.cells}.values():
            fitting(loaded.adapter, method)

    def named(self, cell: CellSpec, number: int) -> Named:
        """What events call the cell that is begun as the ``number``-th."""
        return Named.cell(cell.config, number, len(self.cells), self.sizes[cell.config.task])

    def problem(self, cell: CellSpec) -> str:
        """Why a cell is not done; empty if it is."""
        size = self.sizes.get(cell.config.task, 0)  # 0: it was done before
        try:
            done = done_elsewhere(cell.config, size, self.store, self.before.get(cell.config.folder))
        except IncompleteError as error:
            return str(error)
        return "" if done else UNFINISHED

    def failure(self, cell: CellSpec) -> str:
        """What is to be said of a cell that is not done."""
        config = cell.config
        return f"{config.label} · {config.task} · seed {config.seed}: {self.problem(cell)}"


class Prepared:
    """Model and tasks of a sweep, each loaded when it is first needed."""

    def __init__(self, config: SweepConfig, report: Reporter) -> None:
        self.config, self.report = config, report
        self._tasks: dict[str, Task] = {}

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model."""
        loaded = load_model(self.config.model, **self.config.loading, protocol=self.config.asked)
        loaded.kept = self.config.kept
        return loaded

    def forget(self) -> None:
        """Free the model's memory."""
        for name in ("prompts", "loaded"):
            self.__dict__.pop(name, None)
        release()

    def tasks(self, names: Sequence[str]) -> dict[str, Task]:
        """Tasks by name."""
        config = self.config
        missing = [entry for entry in config.tasks if called(entry) in names and called(entry) not in self._tasks]
        loaded = load_tasks(missing, config.data, config.include_path, config.asked) if missing else []
        self._tasks |= {task.name: replace(task, kept=config.kept) for task in loaded}
        return {name: self._tasks[name] for name in names}

    def sizes(self, names: Collection[str]) -> dict[str, int]:
        """Questions to ask of each of these tasks."""
        tasks = self.tasks([name for name in map(called, self.config.tasks) if name in names])
        return {name: task.size(self.config.limit_of(name))[0] for name, task in tasks.items()}

    @cached_property
    def prompts(self) -> budget.Prompts:
        """What budgets are solved on: the first questions of every task; without weights, a typical prompt."""
        if self.config.weights == "meta":
            model = estimate.sizes(self.config)
            return budget.Planned(model, estimate.TEXT, typical(model.adapter))
        tasks = self.tasks([called(entry) for entry in self.config.tasks])
        return budget.Prompts.of(self.loaded, list(tasks.values()), batch_size=self.config.batch_size)

    def solve(self, name: str, options: Mapping[str, Any], target: Target) -> Method:
        """The method that meets the target."""
        solved = budget.solve(name, options, target, self.prompts)
        price = target.spell(self.prompts.price(target.kind, solved.method))
        self.report(Note(text=f"{name} {target}: {solved.method} gives {price} on {self.prompts.count} prompts"))
        return solved.method
