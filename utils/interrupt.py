"""Ctrl-C between batches: what runs is finished and stored first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stoppable(say: Callable[[str], Any]) -> Iterator[Callable[[], None]]:
    """Within: the first Ctrl-C is put off until the function that is yielded is called; the second stops at once.

    Outside the main thread, where no signals arrive, this does nothing.
    """
    pressed = False

    def note(number: int, frame: Any) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, before)
        say("Stopping after the batch that runs; Ctrl-C again stops at once.")

    def check() -> None:
        if pressed:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    before = signal.signal(signal.SIGINT, note) or signal.default_int_handler
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)
