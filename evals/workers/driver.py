"""Hands cells, and shards of large ones, to workers, and puts the files that they return into the run folder.

    while cells, tasks or running workers are left:
        an idle worker gets the next task; where there is none, the next cell is opened:
            the first that no other process has claimed, and whose dense cell is over
        wait for a worker: what one that is through returns is stored;
            behind its last shard a cell is one more task, which scores it
            what a lost one was at runs again, and a new worker starts in its place

So nothing waits for a machine that does not come back.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from ...errors import VisibenchError, reason
from ...results.store.records import Failure
from ...results.store.store import ANSWERS, DONE
from ...utils.interrupt import stoppable
from ..answers.cell_spec import CellSpec
from ..sweeps.events import Answered, CellFailed, CellFinished, CellStarted, Named, Note, Reporter, Stopwatch
from ..sweeps.executor import UNFINISHED, Job, Prepared
from .worker import Shard, WorkDone

RETRIES = 3
"""How often a task runs again whose worker was lost."""
LOOK = 1.0
"""Seconds between two looks at what other processes have finished."""
SHARD = 1000
"""Questions of a task at most, unless asked for otherwise."""


class LostError(Exception):
    """A worker has ended, or cannot be reached any more; the text says how."""


class TaskError(Exception):
    """An error on a worker: ``why`` and ``traceback`` as text, and itself if it is one that a user can fix."""

    def __init__(self, why: str, traceback: str, mendable: VisibenchError | None) -> None:
        super().__init__(why, traceback, mendable)  # by which it is pickled
        self.why, self.traceback, self.mendable = why, traceback, mendable

    @classmethod
    def of(cls, error: BaseException, traceback: str) -> TaskError:
        """Of what was raised there."""
        return cls(reason(error), traceback, error if isinstance(error, VisibenchError) else None)


class Handle(Protocol):
    """A :class:`~visibench.evals.workers.worker.Worker` somewhere else, as a driver sees it."""

    def call(self, name: str, *arguments: Any) -> Future:
        """What its method ``name`` returns; the future may raise the two above."""
        ...

    def kill(self) -> None:
        """End it, wherever it is."""
        ...


def drive(
    job: Job,
    prepared: Prepared,
    report: Reporter,
    start: Callable[[str], Handle],
    *,
    workers: int,
    shard: int,
    here: bool,
) -> None:
    """Run a job on so many workers, in tasks of at most ``shard`` questions.

    ``start``: begins a worker with this flag, see :class:`~visibench.evals.workers.worker.Worker`. ``here``: they are
    on this machine; then Ctrl-C waits for the batches that run, else it stops them at once. Raises the error of a task
    that could not even begin, such as a model that is not there.
    """
    prepared.forget()
    with TemporaryDirectory() as folder:
        flag = Path(folder) / "stop" if here else None
        driver = _Driver(job, report, partial(start, str(flag or "")), shard, flag)
        with stoppable(driver.stop) as check:
            try:
                driver.drive(workers)
            finally:
                driver.end()
            check()


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
    def __init__(self, job: Job, report: Reporter, start: Callable[[], Handle], shard: int, flag: Path | None) -> None:
        self.job, self.report, self.start, self.shard, self.flag = job, report, start, shard, flag
        self.starting: dict[Future, Handle] = {}
        self.idle: list[Handle] = []
        self.running: dict[Future, tuple[Handle, _Task]] = {}
        self.cells, self.tasks = deque(job.cells), deque[_Task]()
        self.opened: list[_Open] = []
        self.unsettled = {cell.config.folder for cell in job.cells}
        self.waiting = self.stopped = self.begun = False

    def drive(self, workers: int) -> None:
        """Run all cells."""
        for _ in range(workers):
            self._start()
        while self.running or ((self.cells or self.tasks) and not self.stopped):
            while self.idle and not self.stopped and (self.tasks or self._open_next()):
                if self.tasks:
                    self._hand_out()
            if self.running or not self.idle:
                self._look()
            elif self.cells:
                self._wait()
        for told in [worker.call("close") for worker in self.idle]:
            with suppress(LostError, TaskError):  # then there is nothing left
                self._say(told.result())

    def stop(self, text: str) -> None:
        """End behind the batches that run; at once where there are none, or workers cannot be told."""
        if self.flag is None or not self.running:
            raise KeyboardInterrupt
        self.stopped = True
        self.flag.touch()
        self.report(Note(text=text))

    def end(self) -> None:
        """Let go of all workers and cells."""
        for worker in [*self.idle, *self.starting.values(), *(worker for worker, _ in self.running.values())]:
            worker.kill()
        for state in self.opened:
            state.claim.close()

    def _say(self, notes: tuple[str, ...]) -> None:
        for text in notes:
            self.report(Note(text=text))

    # ---- workers ----------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        worker = self.start()
        self.starting[worker.call("up")] = worker

    def _look(self) -> None:
        """Wait for the next worker that is up, or done with its task."""
        # Idle workers wait for cells: of other processes, or for dense ones.
        timeout = LOOK if self.idle and self.cells else None
        ready, _ = wait([*self.running, *self.starting], timeout, FIRST_COMPLETED)
        for one in ready:
            if one in self.running:
                self._back(*self.running.pop(one), one)
            else:
                self._up(self.starting.pop(one), one)

    def _up(self, worker: Handle, up: Future) -> None:
        try:
            up.result()
        except (LostError, TaskError) as error:
            worker.kill()
            if not (self.idle or self.running or self.starting):
                if isinstance(error, TaskError) and error.mendable is not None:
                    raise error.mendable from None
                last = str(error.__cause__ or error).strip().splitlines()[-1]
                raise VisibenchError(f"no worker can start ({last}): repair its environment") from error
            return
        if not self.begun:
            self.begun = True
            self.job.begin()
        self.idle.append(worker)

    def _back(self, worker: Handle, task: _Task, returned: Future) -> None:
        """Take in what a task returned, or have it run again if its worker was lost.

        Errors that a user can fix end the sweep, as they do in one process; others are failures of the cell.
        """
        try:
            outcome = returned.result()
            self.idle.append(worker)
        except TaskError as error:
            self.idle.append(worker)
            if error.mendable is not None:
                raise error.mendable from None
            outcome = self._failed(task, error.why, error.traceback)
        except LostError as error:
            worker.kill()  # it may go on where it cannot be reached
            self._start()
            if task.lost < RETRIES:
                self.tasks.appendleft(replace(task, lost=task.lost + 1))
                self.report(Note(text=f"a worker {error}: its cell goes to the others"))
                return
            outcome = self._failed(task, f"its worker was lost {RETRIES + 1} times", str(error.__cause__ or error))
        self._take(task, outcome)

    def _failed(self, task: _Task, why: str, traceback: str) -> WorkDone:
        self.job.store.fail(task.state.cell.config, [Failure(doc_id=None, error=why, traceback=traceback)])
        return WorkDone({}, 0)

    # ---- cells ------------------------------------------------------------------------------------------------------

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
        name = self.job.named(cell, len(self.opened) + 1)
        parts = min(math.ceil(name.questions / self.shard), math.ceil(name.questions / cell.config.batch_size))
        state = _Open(cell, name, claim, parts if parts > 1 else 0)
        self.opened.append(state)
        self.report(CellStarted(cell=name))
        if self.job.problem(cell) != UNFINISHED:  # another process has been at it meanwhile
            self._end(state)
            return
        self.job.store.begin(cell.config)
        self.tasks.extend(_Task(state, (part, parts)) for part in range(state.left))
        if not state.left:
            self.tasks.append(_Task(state, None))

    def _hand_out(self) -> None:
        """Give the next task to an idle worker."""
        task = self.tasks.popleft()
        worker, store, cell, shard = self.idle.pop(), self.job.store, task.state.cell, task.shard
        answers = {file.name: file.read_bytes() for file in store.path(cell.config).glob(f"{ANSWERS}*.jsonl")}
        dense = store.find(cell.dense) if cell.dense is not None and shard is None else None
        reference = {file.name: file.read_bytes() for file in map(dense.path.joinpath, DONE)} if dense else {}
        self.running[worker.call("run", cell.config, cell.dense, shard, answers, reference)] = worker, task

    def _take(self, task: _Task, outcome: WorkDone) -> None:
        state = task.state
        self._say(outcome.notes)
        self.job.store.take(state.cell.config, outcome.files)
        if outcome.stopped:
            state.claim.close()
        elif task.shard is None:
            self._end(state)
        else:
            state.left -= 1
            state.answered += outcome.answered
            self.report(Answered(cell=state.name, answered=state.answered, seconds=state.clock()))
            if not state.left:
                self.tasks.appendleft(_Task(state, None))

    def _end(self, state: _Open) -> None:
        done = self.job.store.done(state.cell.config)
        if done:
            self.report(CellFinished.of(state.name, done.metrics, state.clock()))
        else:
            self.report(CellFailed(cell=state.name, problem=self.job.problem(state.cell), seconds=state.clock()))
        state.claim.close()
        self.unsettled.discard(state.cell.config.folder)
