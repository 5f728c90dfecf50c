"""Workers in processes of this machine: ``--workers`` where Ray is not installed."""

import os
import pickle
import signal
import subprocess
import sys
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from ...errors import FOREIGN
from ...utils.interrupt import end_with
from ..sweeps.events import Reporter
from ..sweeps.executor import Job, Prepared
from .devices import environments
from .driver import SHARD, LostError, TaskError, drive
from .worker import Worker

DRIVER = "VISIBENCH_DRIVER"
"""Variable that tells a process which one it works for."""


@dataclass(frozen=True)
class Pool:
    """So many processes, each with a device of its own; cells of more than ``shard`` questions are cut."""

    workers: int
    shard: int = SHARD

    def run(self, job: Job, prepared: Prepared, report: Reporter) -> None:
        """Run a job; see :func:`~visibench.evals.workers.driver.drive`."""
        job.check()
        start = partial(_Process, environments(self.workers, job.config.device), job.config.model_dump_json())
        drive(job, prepared, report, start, workers=self.workers, shard=self.shard, here=True)


class _Process:
    """A process, which a thread asks one thing after the other. It ends when nobody asks any more."""

    def __init__(self, free: list[dict[str, str]], *arguments: str) -> None:
        self.free, self.variables, self.thread = free, free.pop(), ThreadPoolExecutor(1)
        ours = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), DRIVER: str(os.getpid())}
        environment = os.environ | self.variables | ours
        command = [sys.executable, "-c", "from visibench.evals.workers.pool import serve; serve()", *arguments]
        # Of its own session: a terminal's Ctrl-C reaches this process alone.
        self.process: Any = subprocess.Popen(command, stdin=-1, stdout=-1, env=environment, start_new_session=True)

    def call(self, name: str, *arguments: Any) -> Future:
        return self.thread.submit(self._ask, name, arguments)

    def kill(self) -> None:
        self.process.kill()
        self.thread.shutdown()
        with suppress(BrokenPipeError), self.process:
            self.free.append(self.variables)

    def _ask(self, *question: Any) -> Any:
        try:
            self.process.stdin.write(pickle.dumps(question))
            self.process.stdin.flush()
            answer, error = pickle.load(self.process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            code = self.process.wait()
            killed = f"was killed ({signal.Signals(-code).name})" if code < 0 else ""
            raise LostError(killed or f"has ended with exit code {code}") from None
        if error:
            raise error
        return answer


def serve() -> None:
    """The process: a worker that reads what it is asked, and writes what it answers, as long as its driver lives."""
    end_with(int(os.environ[DRIVER]))
    requests, answers, worker = sys.stdin.buffer, os.fdopen(os.dup(1), "wb"), Worker(*sys.argv[1:])
    os.dup2(2, 1)  # what libraries print must not come among the answers
    with suppress(EOFError, BrokenPipeError):
        for name, arguments in iter(partial(pickle.load, requests), None):
            try:
                answer: Any = getattr(worker, name)(*arguments), None
            except FOREIGN as error:
                answer = None, TaskError.of(error, traceback.format_exc())
            answers.write(pickle.dumps(answer))
            answers.flush()
