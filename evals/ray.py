"""Cells, and shards of large ones, on the workers of a Ray cluster.

A worker is a Ray actor with a GPU, or with a CPU where there are none, and keeps its model. It needs nothing of this
machine but what it is handed: it works in a folder of its own and returns the files that it wrote there, which this
process puts into the run folder. So workers need not see the run folder; they need visibench in the same versions, and
the model and data under the same names. A shard returns its answers, which the cell's last task is handed and scores.
A worker that is lost is started again, and what it was at runs again.
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
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import DataError, IncompleteError, OptionError, VisibenchError
from ..results.records import CellConfig, Failure
from ..results.store import ANSWERS, DONE, Store
from .answering import answer
from .cell import run_cell
from .config import SweepConfig
from .executors import UNFINISHED, Job
from .plan import Plan, fingerprint
from .progress import Answered, CellFailed, CellFinished, CellStarted, Named, Note, Reporter, Stopwatch

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
            actor = ray.remote(max_restarts=-1, max_task_retries=RETRIES, **needs)(Worker)
            text = job.config.model_dump_json()
            team = [actor.remote(text) for _ in range(min(self.workers or most, most))]
            _Driver(job, report, ray, team, self.shard).drive()
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
    """What a task returns: files of the cell's folder that are new, by name, and how many questions it answered."""

    files: dict[str, bytes]
    answered: int


class Worker:
    """Works for one model, which it loads with its first task. ``config``: of the sweep, as JSON."""

    def __init__(self, config: str) -> None:
        from .sweep import Prepared

        self.prepared = Prepared(SweepConfig.model_validate_json(config), Reporter())

    def run(self, cell: Plan, shard: Shard | None, files: dict[str, bytes], dense: dict[str, bytes]) -> Outcome:
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
            for name, content in files.items():
                (folder / name).write_bytes(content)
            answered: list[int] = []
            if shard is None:
                with suppress(IncompleteError):  # its file of failures says the same
                    run_cell(prepared.loaded, cell.method, task, config, store, dense=cell.dense)
            else:
                answer(prepared.loaded, cell.method, task, config, folder, shard=shard, on_batch=answered.append)
            found = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
        new = {name: content for name, content in found.items() if files.get(name) != content}
        return Outcome(new, sum(answered))


# ---- here -----------------------------------------------------------------------------------------------------------


@dataclass
class _Open:
    """A cell that is being worked on, claimed by this process. ``left``: shards that are not answered yet."""

    cell: Plan
    name: Named
    claim: ExitStack
    left: int
    clock: Stopwatch = field(default_factory=Stopwatch)
    answered: int = 0


class _Driver:
    """Hands tasks to a team of workers and takes in what they return."""

    def __init__(self, job: Job, report: Reporter, ray: Any, team: list[Any], shard: int) -> None:
        self.job, self.report, self.ray, self.shard = job, report, ray, shard
        self.idle, self.cells = list(team), deque(job.cells)
        self.tasks: deque[tuple[_Open, Shard | None]] = deque()
        self.running: dict[Any, tuple[Any, _Open, Shard | None]] = {}
        self.opened, self.waiting = 0, False
        self.unsettled = {cell.config.folder for cell in job.cells}

    def drive(self) -> None:
        """Run all cells."""
        try:
            while self.cells or self.tasks or self.running:
                while self.idle and (self.tasks or self._open_next()):
                    if self.tasks:
                        self._hand_out()
                if self.running:
                    # Idle workers wait for cells: of other processes, or for dense ones.
                    ready, _ = self.ray.wait(list(self.running), timeout=LOOK if self.idle and self.cells else None)
                    for task in ready:
                        worker, state, shard = self.running.pop(task)
                        self.idle.append(worker)
                        self._take(state, shard, task)
                elif self.cells:
                    self._wait()
        finally:
            for state in {id(state): state for _, state, _ in self.running.values()}.values():
                state.claim.close()

    def _hand_out(self) -> None:
        """Give the next task to an idle worker."""
        state, shard = self.tasks.popleft()
        worker, store, cell = self.idle.pop(), self.job.store, state.cell
        folder = store.path(cell.config)
        files = {file.name: file.read_bytes() for file in folder.glob(f"{ANSWERS}*.jsonl")}
        dense = store.found(cell.dense) if cell.dense is not None and shard is None else None
        reference = {file.name: file.read_bytes() for file in map(dense.path.joinpath, DONE)} if dense else {}
        self.running[worker.run.remote(cell, shard, files, reference)] = worker, state, shard

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

    def _open(self, cell: Plan, claim: ExitStack) -> None:
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
        self.tasks.extend((state, (part, parts)) for part in range(state.left))
        if not state.left:
            self.tasks.append((state, None))

    def _take(self, state: _Open, shard: Shard | None, ready: Any) -> None:
        config, store = state.cell.config, self.job.store
        outcome = self._outcome(config, ready)
        store.take(config, outcome.files)
        if shard is not None:
            state.left -= 1
            state.answered += outcome.answered
            self.report(Answered(cell=state.name, answered=state.answered, seconds=state.clock()))
            if not state.left:
                self.tasks.appendleft((state, None))
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

    def _outcome(self, config: CellConfig, ready: Any) -> Outcome:
        """What a task returned. One whose worker was lost time and again returns a failure."""
        errors = self.ray.exceptions
        try:
            return self.ray.get(ready)
        except errors.RayTaskError as error:
            raise error.cause if isinstance(error.cause, VisibenchError) else error from None
        except errors.RayError as error:
            lost = Failure(doc_id=None, error=f"its worker was lost {RETRIES + 1} times", traceback=str(error))
            self.job.store.fail(config, [lost])
            return Outcome({}, 0)
