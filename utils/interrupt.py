"""Ctrl-C and SIGTERM between batches: what runs is finished and stored first."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM, which Slurm and Kubernetes send before they kill: like Ctrl-C, with an exit code of its own."""


RAISED: dict[int, type[KeyboardInterrupt]] = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
"""What a signal to stop raises."""
_terminated = False


def code() -> int:
    """The exit code of a command that was interrupted: 128 and the number of the signal."""
    return 128 + (signal.SIGTERM if _terminated else signal.SIGINT)


def listen() -> None:
    """Have SIGTERM raise :class:`Terminated` in the main thread, from now on."""
    signal.signal(signal.SIGTERM, _raise)


@contextmanager
def as_before() -> Iterator[None]:
    """Within, code of others may answer signals to stop as it likes, such as by printing stacks; not behind it.

    Where it leaves with ``sys.exit(SIGTERM)``, that is :class:`Terminated`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {one: signal.getsignal(one) for one in RAISED}
    try:
        yield
    except SystemExit as stopped:
        if stopped.code == signal.SIGTERM:
            _raise(signal.SIGTERM, None)
        raise
    finally:
        for one, handler in before.items():
            if handler is not None:  # nothing that Python knows
                signal.signal(one, handler)


@contextmanager
def stoppable(say: Callable[[str], Any]) -> Iterator[Callable[[], None]]:
    """Within: the first signal to stop is put off until the function that is yielded is called; the second is not.

    Outside the main thread, where no signals arrive, this does nothing.
    """
    pressed: list[int] = []

    def note(number: int, frame: Any) -> None:
        pressed.append(number)
        restore()
        say("Stopping after the batch that runs; Ctrl-C again stops at once.")

    def restore() -> None:
        for one, handler in before.items():
            signal.signal(one, handler)

    def check() -> None:
        if pressed:
            _raise(pressed[0], None)

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    ignored: dict[int, Callable[..., Any]] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: _raise}
    before: dict[int, Any] = {one: signal.signal(one, note) or ignored[one] for one in RAISED}
    try:
        yield check
    except KeyboardInterrupt:  # raised behind the batches that ran: it is the signal that came
        check()
        raise
    finally:
        restore()


def end_with(parent: int) -> None:
    """Have this process end once its ``parent`` has, whatever it does then, from now on."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _raise(number: int, frame: Any) -> None:
    global _terminated
    _terminated = _terminated or number == signal.SIGTERM
    raise RAISED[number]
