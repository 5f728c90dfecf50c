"""How much memory this process may still take, and what to say where that is too little."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import psutil

from ..errors import NoRoomError

GROUPS = Path("/sys/fs/cgroup")
"""Where Linux shows the limits of containers and of jobs on a cluster."""


def available() -> int:
    """Bytes of the host's memory that are free, for the machine and for the container or job that this is part of."""
    return min([psutil.virtual_memory().available, *_left()])


def check_room(wanted: float, what: str, mend: str) -> None:
    """Raise :class:`NoRoomError` if ``wanted`` bytes are not there: Linux would kill the process without a word.

    ``what`` takes them, and ``mend`` says how to do with less.
    """
    free = available()
    if wanted > free:
        raise NoRoomError(f"{what} takes about {wanted / 2**30:.3g} GiB, and {free / 2**30:.3g} GiB are free: {mend}")


def _left() -> list[int]:
    """Bytes that each group of processes may still take which this process is in, and which has a limit."""
    left = []
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, kinds, path = line.split(":", 2)
        for folder in (GROUPS / path[1:], GROUPS) if not kinds else ():
            left += _room(folder, "memory.max", "memory.current", "inactive_file")
        for folder in (GROUPS / "memory" / path[1:], GROUPS / "memory") if kinds == "memory" else ():
            left += _room(folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    return left


def _room(folder: Path, limit: str, used: str, cached: str) -> list[int]:
    """What is left of a limit, if there is one; cached files give way."""
    with suppress(ValueError):  # "max", or no such file
        facts = dict(line.split(" ", 1) for line in _read(folder / "memory.stat").splitlines())
        return [int(_read(folder / limit)) - int(_read(folder / used)) + int(facts.get(cached, 0))]
    return []


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""
