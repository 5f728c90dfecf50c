"""Who runs the cells of a model: this process, several on this machine (here), or a Ray cluster (:mod:`.ray`).

Several processes share the run folder. Each works through all cells and takes those that nobody else has claimed; a
claim ends with its process, so that the cells of one that is killed go to the others.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING
from unittest.mock import patch

import torch

from ...errors import IncompleteError, OptionError, VisibenchError
from ...models import load_model
from ...results.store.store import Store
from ..answers.cell_spec import CellSpec
from .claims import done_elsewhere
from .config import SweepConfig
from .events import Event, Note, Reporter

if TYPE_CHECKING:
    from .sweep import Prepared


UNFINISHED = "not finished"


@dataclass(frozen=True)
class Job:
    """Cells of one model to run: all of ``cells`` with ``sizes`` questions by task, since ``began`` (epoch seconds)."""

    config: SweepConfig
    cells: list[CellSpec]
    sizes: Mapping[str, int]
    store: Store
    began: float

    def check(self) -> None:
        """Raise :class:`OptionError` for methods that cannot act on the model, without loading its weights."""
        geometry = load_model(self.config.model, weights="meta").geometry
        for cell in self.cells:
            cell.method.check(geometry)

    def problem(self, cell: CellSpec) -> str:
        """Why a cell is not done; empty if it is."""
        try:
            done = done_elsewhere(cell.config, self.sizes[cell.config.task], self.store, self.began)
        except IncompleteError as error:
            return str(error)
        return "" if done else UNFINISHED

    def failed(self) -> list[str]:
        """What is to be said of the cells that are not done, a line each."""
        problems = ((cell.config, self.problem(cell)) for cell in self.cells)
        return [f"{one.label} · {one.task} · seed {one.seed}: {problem}" for one, problem in problems if problem]


Executor = Callable[[Job, "Prepared", Reporter], list[str]]
"""Runs a job and returns what is to be said of the cells that failed; may use what is loaded already, or drop it."""


# ---- processes on this machine --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Processes:
    """So many processes on this machine, each with a device of its own: GPUs in turn, or a share of the threads."""

    workers: int

    def __call__(self, job: Job, prepared: Prepared, report: Reporter) -> list[str]:
        """Run a job; :class:`VisibenchError` if no worker is left."""
        prepared.forget()
        job.check()
        environments = self.environments(job.config.device)
        team: list[_Worker] = []
        try:
            with _held():
                team += [_start(number, job, environment) for number, environment in enumerate(environments, start=1)]
            problems = _follow(team, _Relay(report))
        finally:
            for worker in team:
                worker.process.kill()
                worker.process.join()
        if len(problems) == len(team):
            raise VisibenchError(problems[0])
        return job.failed()

    def environments(self, device: str) -> list[dict[str, str]]:
        """Variables that give each worker its device. Raises :class:`OptionError` if there are too few."""
        return [_environment(number, self.workers, device) for number in range(self.workers)]


@dataclass
class _Worker:
    number: int
    process: BaseProcess
    events: Connection
    said: str = ""
    begun: bool = False

    def stop(self) -> None:
        """Have it stop behind the batch that runs; at once if it has no cell yet, and may still be loading."""
        if self.begun:
            with suppress(ProcessLookupError):
                os.kill(self.process.pid or 0, signal.SIGINT)
        else:
            self.process.kill()

    def problem(self) -> str:
        """Why it ended, empty if it had done all that there was to do."""
        self.process.join()
        code = self.process.exitcode or 0
        how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"stopped with exit code {code}"
        return f"worker {self.number} {how}: run the same command again for what it left" if code else ""


def _environment(number: int, workers: int, device: str) -> dict[str, str]:
    """Variables that give a worker its device."""
    name, _, index = device.partition(":")
    if index:
        raise OptionError(f"--workers gives each worker a device of its own: give device {name}, not {device}")
    if name == "cpu" or not torch.cuda.is_available():
        return {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // workers))}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    devices = visible.split(",")
    if workers > len(devices):
        raise OptionError(
            f"--workers {workers}, but there are {len(devices)} CUDA devices: at most one worker for each"
        )
    return {"CUDA_VISIBLE_DEVICES": devices[number]}


def _start(number: int, job: Job, environment: dict[str, str]) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(job, theirs), daemon=True)
    # A spawned process imports torch, which reads these, before it gets to anything of ours.
    with patch.dict(os.environ, environment):
        process.start()
    theirs.close()
    return _Worker(number, process, ours)


@contextmanager
def _held() -> Iterator[None]:
    """Ctrl-C waits for the end of this; processes that are started within do not hear it until they ask for it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # It would end this when it starts; and warns of what killed processes leave behind, which it clears away.
    with patch.dict(os.environ, PYTHONWARNINGS="ignore:resource_tracker:UserWarning"):
        resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _follow(team: list[_Worker], relay: _Relay) -> list[str]:
    """Relay events until all workers have ended; why those ended that did not get to their end.

    The first Ctrl-C is passed on to them, and raised once they have stopped; the second is raised at once.
    """
    running = {worker.events: worker for worker in team}
    problems, interrupted = [], False
    while running:
        try:
            for events in wait(list(running)):
                problems += _next(running, events, relay, interrupted)  # type: ignore[arg-type]
        except KeyboardInterrupt:
            if interrupted:
                raise
            interrupted = True
            for worker in running.values():
                worker.stop()
    if interrupted:
        raise KeyboardInterrupt
    return problems


def _next(running: dict[Connection, _Worker], events: Connection, relay: _Relay, interrupted: bool) -> list[str]:
    """Relay the next event of a worker; if there is none any more, why it ended, unless all is well."""
    try:
        message = events.recv()
    except (EOFError, OSError):  # none, or a torn one
        worker = running.pop(events)
        problem = worker.problem()
        if problem and running and not interrupted:
            relay.report(Note(text=f"{problem.partition(':')[0]}: its cell goes to the others"))
        return [worker.said or problem] if problem else []
    if isinstance(message, str):
        running[events].said = message
    else:
        running[events].begun |= message.event == "cell_started"
        relay(message)
    return []


def _work(job: Job, events: Connection) -> None:
    """A worker: the ordinary loop over all cells, which alone listens to Ctrl-C."""
    from .sweep import Prepared, local

    atexit.register(gc.freeze)  # or the collector goes through all that was imported once more, for a second
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # a terminal's Ctrl-C reaches the parent alone, which passes it on
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    report = _Sender(events)
    try:
        local(job, Prepared(job.config, report), report)
    except KeyboardInterrupt:
        sys.exit(130)
    except VisibenchError as error:
        report.send(str(error))
        sys.exit(error.exit_code)


class _Sender(Reporter):
    """Passes events to the parent; ends the worker when there is none any more."""

    def __init__(self, events: Connection) -> None:
        self.events = events

    def __call__(self, event: Event) -> None:
        self.send(event)

    def send(self, message: Event | str) -> None:
        try:
            self.events.send(message)
        except BrokenPipeError:
            sys.exit(1)


@dataclass
class _Relay:
    """Tells of the cells of all workers as of those of one: counted through, each at its end once; and notes once."""

    report: Reporter
    numbers: dict[str, int] = field(default_factory=dict)
    over: set[str] = field(default_factory=set)
    notes: list[Event] = field(default_factory=list)

    def __call__(self, event: Event) -> None:
        cell = getattr(event, "cell", None)
        if cell is None and event not in self.notes:
            self.notes.append(event)
            self.report(event)
        elif cell is not None and cell.folder not in self.over:
            number = self.numbers.setdefault(cell.folder, len(self.numbers) + 1)
            if event.event in ("cell_finished", "cell_failed"):
                self.over.add(cell.folder)
            self.report(event.model_copy(update={"cell": cell.model_copy(update={"number": number})}))
