"""Sending to Weights & Biases while a sweep runs: by a process of its own, which the sweep never waits for.

The sweep only says that a cell is done: a byte into a pipe that never blocks. What has not arrived in the end, for
whatever reason, is one line of warning; the run folder has it all, and ``visibench wandb sync`` sends the rest.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ..errors import OptionError, suggest
from ..results.store import disk
from .wandb import FAILED, SENT, destination_of, sync_command

if TYPE_CHECKING:
    from ..evals.sweeps.events import Reporter
    from ..reports.wandb.sink import Destination

WAIT, SHORT = 120.0, 5.0
"""Seconds that the end of a sweep waits for what is still to be sent; after Ctrl-C, or once sending has failed."""
LOOK = 0.5
"""Seconds between looks at how that goes."""

WandbMode = Annotated[
    str,
    typer.Option(
        "--wandb",
        metavar="off|offline|online",
        show_default=False,
        help="Send cells to W&B as they finish. (default: off)",
    ),
]
WandbProject = Annotated[str | None, typer.Option("--wandb-project", metavar="NAME", help="(default: visibench)")]
WandbEntity = Annotated[str | None, typer.Option("--wandb-entity", metavar="NAME", help="(default: the account's)")]
WandbGroup = Annotated[
    str | None, typer.Option("--wandb-group", metavar="NAME", help="(default: the run folder's name)")
]
WandbTags = Annotated[str | None, typer.Option("--wandb-tags", metavar="A,B", help="Tags of every run.")]


class Live:
    """A process that sends the finished cells of ``folder``, each time it is told that there is a new one.

    It starts with the first: until then the sweep may be refused, which must leave the folder as it is.
    """

    def __init__(self, folder: Path, destination: Destination) -> None:
        self.folder, self.destination = folder, destination
        self.log = folder / "wandb" / "sync.log"

    def __call__(self) -> None:
        """There is a new cell."""
        pipe = self.pipe.fileno()
        with suppress(OSError):  # gone or stuck: the end will tell
            os.write(pipe, b"\n")

    @property
    def started(self) -> bool:
        """Whether there has been a cell."""
        return "process" in vars(self)

    @cached_property
    def process(self) -> subprocess.Popen[bytes]:
        """The process, started when it is first asked for."""
        ours = [sys.executable, "-m", "visibench"]
        command = [*ours, "wandb", "sync", str(self.folder), "--follow", *self.destination.options()]
        with disk.writing(self.log):
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("w") as log:
                # Of its own session: Ctrl-C goes to the sweep alone.
                return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True)

    @cached_property
    def pipe(self) -> IO[bytes]:
        """To the process; it never blocks."""
        assert self.process.stdin is not None
        os.set_blocking(self.process.stdin.fileno(), False)
        return self.process.stdin

    def close(self, seconds: float) -> str:
        """Let it finish, for so many seconds at most, or until Ctrl-C. Returns why it did not, or nothing.

        From the first failure on, it has :data:`SHORT` seconds left.
        """
        with suppress(OSError):
            self.pipe.close()
        try:
            code = self._wait(seconds)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            return self.trouble() or ("interrupted" if isinstance(error, KeyboardInterrupt) else "not finished in time")
        lines = self._lines()
        return "" if code == 0 else lines[-1].removeprefix("error: ") if lines else f"exit code {code}"

    def trouble(self) -> str:
        """Why the last try to send failed; empty if it did not."""
        told = (line for line in reversed(self._lines()) if line.startswith((SENT, FAILED)))
        last = next(told, SENT)
        return last.removeprefix(FAILED) if last.startswith(FAILED) else ""

    def _wait(self, seconds: float) -> int:
        end = time.monotonic() + seconds
        while True:
            if self.trouble():
                return self.process.wait(min(SHORT, max(end - time.monotonic(), 0)))
            with suppress(subprocess.TimeoutExpired):
                return self.process.wait(min(LOOK, max(end - time.monotonic(), 0)))
            if time.monotonic() >= end:
                raise subprocess.TimeoutExpired(self.process.args, seconds)

    def _lines(self) -> list[str]:
        return self.log.read_text(errors="replace").strip().splitlines() if self.log.is_file() else []


def destination_asked(
    folder: Path, mode: str, project: str | None, entity: str | None, group: str | None, tags: str | None
) -> Destination | None:
    """Where cells go as they finish; None if ``mode`` is ``off``.

    Raises :class:`OptionError`, before anything runs, for options that cannot be and where a key is missing.
    """
    if mode == "off":
        given = {"project": project, "entity": entity, "group": group, "tags": tags}
        stray = [name for name, value in given.items() if value is not None]
        if stray:
            raise OptionError(f"--wandb-{stray[0]} needs --wandb online or --wandb offline")
        return None
    if mode not in ("online", "offline"):
        raise OptionError(f"--wandb: {suggest(mode, ('off', 'offline', 'online'))}")
    destination = destination_of(folder, mode, project, entity, group, tags)
    destination.check()
    return destination


@contextmanager
def sending(folder: Path, destination: Destination | None, *, quiet: bool = False) -> Iterator[Live | None]:
    """A process that sends what is stored meanwhile to ``destination``; the end waits for it and says so.

    ``quiet``: it does not say so.

    Whatever becomes of it, the sweep's own outcome stays.
    """
    if destination is None:
        yield None
        return
    live, wait = Live(folder, destination), WAIT
    try:
        yield live
        live()  # the cells of earlier runs, if there are no others
    except KeyboardInterrupt:
        wait = SHORT
        raise
    finally:
        if live.started:
            _finish(live, destination, wait, quiet)


def _finish(live: Live, destination: Destination, wait: float, quiet: bool) -> None:
    """Wait until it is all sent, and say so."""
    folder, later = live.folder, sync_command(live.folder, destination)
    wait = SHORT if live.trouble() else wait
    if not quiet and live.process.poll() is None:
        _say(f"Sending the rest to W&B, up to {wait:g} s; Ctrl-C leaves it for `{later}`.")
    problem = live.close(wait)
    if problem:
        told = f"not all is in W&B ({problem}); results are complete in {folder}, and `{later}` sends the rest"
        _say(f"warning: {told}")


def _say(text: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True, markup=False).print(text)


def listening(report: Reporter | None, live: Live | None) -> Reporter | None:
    """``report``, or what a sweep reports with by itself, that tells ``live`` of finished cells as well."""
    if live is None:
        return report
    from ..evals.sweeps.events import Listening, reporter

    return Listening(report or reporter(Console(stderr=True)), live)
