"""Cells, and shards of large ones, on the workers of a Ray cluster.

A worker is a Ray actor with a GPU, or with a CPU where there are none, and keeps its model. It needs nothing of this
machine but what it is handed: it works in a folder of its own and returns the files that it wrote there, which this
process puts into the run folder. So workers need not see the run folder; they need visibench in the same versions, and
the model and data under the same names. A shard returns its answers, which the cell's last task is handed and scores.
What a lost worker was at runs again on another one, and a new one comes in its place where the cluster has room: so
nothing waits for a machine that does not come back. Each worker keeps what the vision tower computes for all that it
runs.
"""

from __future__ import annotations

import logging
import math
import os
import platform
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.text import Text

from ...engine.features import FeatureStore
from ...errors import DataError, IncompleteError, OptionError, StorageError, VisibenchError
from ...results.store.records import Failure
from ...results.store.store import ANSWERS, DONE, Store
from ..answers.cell import run_cell
from ..answers.cell_spec import CellSpec
from ..answers.generate import answer, failure
from ..tasks.tasks import reason
from .cells import fingerprint
from .config import SweepConfig
from .events import Answered, CellFailed, CellFinished, CellStarted, Named, Note, Reporter, Stopwatch
from .feature_sharing import feature_store
from .processes import UNFINISHED, Job

if TYPE_CHECKING:
    from .sweep import Prepared

RETRIES = 3
"""How often a task runs again whose worker was lost."""
LOOK = 1.0
"""Seconds between two looks at what other processes have finished."""
SHARD = 1000
"""Questions of a task at most, unless asked for otherwise."""
Shard = tuple[int, int]


@dataclass(frozen=True)
class Ray:
    """A Ray cluster at ``address``; None: one of its own on this machine.

    ``workers``: how many at most, by default one for each GPU, or for each CPU. ``shard``: questions of a task at most;
    cells with more are cut.
    """

    address: str | None = None
    workers: int | None = None
    shard: int = SHARD

    def __call__(self, job: Job, prepared: Prepared, report: Reporter) -> list[str]:
        """Run a job; raises the error of a task that could not even begin, such as a model that is not there."""
        prepared.forget()
        job.check()
        with _cluster(self.address, self.workers) as ray:
            needs, most = _needs(job.config.device, ray.cluster_resources())
            actor = ray.remote(**needs)(Worker)
            start = partial(actor.remote, job.config.model_dump_json())
            _Driver(job, report, ray, start, self.shard).drive(min(self.workers or most, most))
        return job.failed()


@contextmanager
def _cluster(address: str | None, workers: int | None) -> Iterator[Any]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise OptionError("--executor ray needs Ray: pip install visibench[ray]") from error
    options: dict[str, Any] = {"address": address or "local", "log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        options |= {"num_cpus": workers, "include_dashboard": False}
    try:
        ray.init(**options)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        where = f"no Ray cluster at {address}" if address else "no Ray cluster can be started here"
        raise OptionError(f"{where} ({reason}): `ray start --head` starts one, and --address auto finds it") from error
    try:
        # Ray tells of lost workers on standard output, which may carry JSON.
        with redirect_stdout(sys.stderr):
            yield ray
    finally:
        ray.shutdown()


def _needs(device: str, resources: Mapping[str, float]) -> tuple[dict[str, int], int]:
    """What a worker needs of the cluster, and how many have that at once."""
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    name, _, index = device.partition(":")
    if index:
        raise OptionError(f"Ray gives each worker a device of its own: give device {name}, not {device}")
    if name == "cuda" and not gpus:
        raise OptionError("the Ray cluster has no GPU: give device cpu, or start its nodes with --num-gpus")
    return ({"num_gpus": 1}, gpus) if name != "cpu" and gpus else ({"num_cpus": 1}, max(cpus, 1))


# ---- on a worker ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a task returns: new files of the cell's folder by name, how many questions it answered, and what to say."""

    files: dict[str, bytes]
    answered: int
    notes: tuple[str, ...] = ()


class Worker:
    """Works for one model, which it loads with its first task. ``config``: of the sweep, as JSON."""

    def __init__(self, config: str) -> None:
        from .sweep import Prepared

        self.prepared = Prepared(SweepConfig.model_validate_json(config), Reporter())
        self._notes: list[str] = []
        self._features: FeatureStore | None = None

    @property
    def features(self) -> FeatureStore:
        """What its cells and shards share."""
        if self._features is None:
            self._features = feature_store(self.prepared.loaded, self.prepared.config, self._notes.append)
        return self._features

    def close(self) -> tuple[str, ...]:
        """Free what is shared; returns what to say of that."""
        if self._features is not None:
            self._features.close()
        return self._told()

    def _told(self) -> tuple[str, ...]:
        told = tuple(self._notes)
        self._notes.clear()
        return told

    def run(self, cell: CellSpec, shard: Shard | None, files: dict[str, bytes], dense: dict[str, bytes]) -> Outcome:
        """Answer a shard, or with all that is answered in ``files`` what is left, and score and time the cell.

        ``dense``: files of its dense cell, if that is done.
        """
        config, prepared = cell.config, self.prepared
        if fingerprint(config.model) != config.checkpoint:
            raise DataError(f"model {config.model!r} is another one on {platform.node()}: copy the folder there")
        task = prepared.tasks([config.task])[config.task]
        with tempfile.TemporaryDirectory() as scratch:
            store = Store(scratch)
            if cell.dense is not None:
                store.take(cell.dense, dense)
            folder = store.begin(config)
            store.take(config, files)
            answered: list[int] = []
            if shard is None:
                with suppress(IncompleteError):  # its file of failures says the same
                    run_cell(prepared.loaded, cell, task, store, features=self.features)
            else:
                try:
                    ask = partial(answer, prepared.loaded, cell, task, folder, features=self.features)
                    ask(shard=shard, on_batch=answered.append)
                except StorageError:
                    raise
                except VisibenchError as error:  # the cell's own, as in `run_cell`, which meets it again at the end
                    store.fail(config, [failure(error)])
            found = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
        new = {name: content for name, content in found.items() if files.get(name) != content}
        return Outcome(new, sum(answered), self._told())


# ---- here -----------------------------------------------------------------------------------------------------------


@dataclass
class _Open:
    """A cell that is being worked on, claimed by this process. ``left``: shards that are not answered yet."""

    cell: CellSpec
    name: Named
    claim: ExitStack
    left: int
    clock: Stopwatch = field(default_factory=Stopwatch)
    answered: int = 0


@dataclass(frozen=True)
class _Task:
    """A cell, or a shard of it, for a worker. ``lost``: how many workers were lost over it."""

    state: _Open
    shard: Shard | None
    lost: int = 0


class _Driver:
    """Hands tasks to workers that are up, and takes in what they return."""

    def __init__(self, job: Job, report: Reporter, ray: Any, start: Callable[[], Any], shard: int) -> None:
        self.job, self.report, self.ray, self.start, self.shard = job, report, ray, start, shard
        self.idle: list[Any] = []
        self.starting: dict[Any, Any] = {}
        self.cells, self.tasks = deque(job.cells), deque[_Task]()
        self.running: dict[Any, tuple[Any, _Task]] = {}
        self.opened, self.waiting = 0, False
        self.unsettled = {cell.config.folder for cell in job.cells}

    def drive(self, workers: int) -> None:
        """Run all cells."""
        for _ in range(workers):
            self._start()
        try:
            while self.cells or self.tasks or self.running:
                while self.idle and (self.tasks or self._open_next()):
                    if self.tasks:
                        self._hand_out()
                if self.running or not self.idle:
                    self._look()
                elif self.cells:
                    self._wait()
            self._close()
        finally:
            for task in [*self.tasks, *(task for _, task in self.running.values())]:
                task.state.claim.close()

    def _close(self) -> None:
        for told in [worker.close.remote() for worker in self.idle]:
            with suppress(self.ray.exceptions.RayError):  # a lost one has nothing left
                self._say(self.ray.get(told))

    def _say(self, notes: tuple[str, ...]) -> None:
        for text in notes:
            self.report(Note(text=text))

    def _start(self) -> None:
        worker = self.start()
        self.starting[worker.__ray_ready__.remote()] = worker

    def _look(self) -> None:
        """Wait for the next worker that is up, or done with its task."""
        # Idle workers wait for cells: of other processes, or for dense ones.
        timeout = LOOK if self.idle and self.cells else None
        ready, _ = self.ray.wait([*self.running, *self.starting], timeout=timeout)
        for one in ready:
            if one in self.running:
                self._back(*self.running.pop(one), one)
            else:
                self._up(self.starting.pop(one), one)

    def _up(self, worker: Any, ready: Any) -> None:
        try:
            self.ray.get(ready)
            self.idle.append(worker)
        except self.ray.exceptions.RayError as error:
            if not (self.idle or self.running or self.starting):
                reason = str(error).strip().splitlines()[-1]
                raise VisibenchError(
                    f"no worker of the Ray cluster can start ({reason}): mend its environment"
                ) from error

    def _back(self, worker: Any, task: _Task, ready: Any) -> None:
        """Take in what a task returned, or have it run again if its worker was lost.

        Errors that a user can mend end the sweep, as they do in one process; others are failures of the cell.
        """
        errors = self.ray.exceptions
        try:
            outcome = self.ray.get(ready)
            self.idle.append(worker)
        except errors.RayTaskError as error:
            if isinstance(error.cause, VisibenchError):
                raise error.cause from None
            self.idle.append(worker)
            outcome = self._failed(task, reason(error.cause), error)
        except errors.RayError as error:
            self.ray.kill(worker)  # it may go on where it cannot be reached
            self._start()
            if task.lost < RETRIES:
                self.tasks.appendleft(replace(task, lost=task.lost + 1))
                return
            outcome = self._failed(task, f"its worker was lost {RETRIES + 1} times", error)
        self._take(task, outcome)

    def _failed(self, task: _Task, why: str, error: Exception) -> Outcome:
        # Ray colours what it tells.
        failed = Failure(doc_id=None, error=why, traceback=Text.from_ansi(str(error)).plain)
        self.job.store.fail(task.state.cell.config, [failed])
        return Outcome({}, 0)

    def _hand_out(self) -> None:
        """Give the next task to an idle worker."""
        task = self.tasks.popleft()
        worker, store, cell, shard = self.idle.pop(), self.job.store, task.state.cell, task.shard
        folder = store.path(cell.config)
        files = {file.name: file.read_bytes() for file in folder.glob(f"{ANSWERS}*.jsonl")}
        dense = store.found(cell.dense) if cell.dense is not None and shard is None else None
        reference = {file.name: file.read_bytes() for file in map(dense.path.joinpath, DONE)} if dense else {}
        self.running[worker.run.remote(cell, shard, files, reference)] = worker, task

    def _open_next(self) -> bool:
        """Open the first cell that no other process works on, and whose dense cell is over."""
        for cell in self.cells:
            if cell.dense not in (None, cell.config) and cell.dense.folder in self.unsettled:
                continue
            claim = ExitStack()
            if claim.enter_context(self.job.store.claim(cell.config)):
                self.cells.remove(cell)
                self._open(cell, claim)
                return True
            claim.close()
        return False

    def _wait(self) -> None:
        """For other processes, which have all that is left."""
        if not self.waiting:
            self.waiting = True
            self.report(Note(text=f"Waiting for cells of {self.job.store.root} that another process works on."))
        time.sleep(LOOK)

    def _open(self, cell: CellSpec, claim: ExitStack) -> None:
        store, size = self.job.store, self.job.sizes[cell.config.task]
        self.opened += 1
        parts = min(math.ceil(size / self.shard), math.ceil(size / cell.config.batch_size))
        name = Named.cell(cell.config, self.opened, len(self.job.cells), size)
        state = _Open(cell, name, claim, parts if parts > 1 else 0)
        self.report(CellStarted(cell=name))
        if self.job.problem(cell) != UNFINISHED:  # another process has been at it meanwhile
            self._end(state)
            return
        store.begin(cell.config)
        self.tasks.extend(_Task(state, (part, parts)) for part in range(state.left))
        if not state.left:
            self.tasks.append(_Task(state, None))

    def _take(self, task: _Task, outcome: Outcome) -> None:
        state = task.state
        self._say(outcome.notes)
        self.job.store.take(state.cell.config, outcome.files)
        if task.shard is not None:
            state.left -= 1
            state.answered += outcome.answered
            self.report(Answered(cell=state.name, answered=state.answered, seconds=state.clock()))
            if not state.left:
                self.tasks.appendleft(_Task(state, None))
            return
        self._end(state)

    def _end(self, state: _Open) -> None:
        found = self.job.store.done(state.cell.config)
        if found:
            self.report(CellFinished.of(state.name, found.metrics, state.clock()))
        else:
            self.report(CellFailed(cell=state.name, problem=self.job.problem(state.cell), seconds=state.clock()))
        state.claim.close()
        self.unsettled.discard(state.cell.config.folder)
