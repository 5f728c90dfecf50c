"""Where numbers were made: the machine, and the commit of visibench's own code."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import OptionError

ROOT = Path(__file__).parent.parent


@lru_cache(maxsize=1)
def host() -> dict[str, Any]:
    """The machine: processor, cores that this process may use, memory in GiB, and the names of its GPUs."""
    import torch

    affinity = getattr(os, "sched_getaffinity", None)
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    cores = len(affinity(0)) if affinity else os.cpu_count()
    return {"processor": processor(), "cores": cores, "memory_gib": _memory(), "gpus": gpus}


def processor() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def ranks() -> int:
    """How many processes ``torchrun`` has started; 1 without it."""
    given = os.environ.get("WORLD_SIZE", "1")
    if not given.isdecimal() or not int(given):
        raise OptionError(f"WORLD_SIZE={given} is no number of processes: unset it, or use torchrun")
    return int(given)


def one_process() -> None:
    """Raise :class:`OptionError` on several ranks, each of which would do everything."""
    if ranks() > 1:
        raise OptionError(
            f"started on {ranks()} ranks, each of which would do the same: start one process, which `visibench sweep` "
            "shares out with --workers or --executor ray; torchrun is for lmms-eval's --model visibench (docs/scale.md)"
        )


@lru_cache
def version(package: str) -> str | None:
    """Version of an installed package; None if it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@lru_cache(maxsize=1)
def code() -> dict[str, Any]:
    """Commit of the checkout that visibench runs from, and whether code differs from it; empty for an installed one.

    Files that git does not know count if they are code, as a new method would be.
    """
    if not (ROOT / ".git").exists():
        return {}
    try:
        commit, status = (_git(*arguments) for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uall")))
    except (OSError, subprocess.SubprocessError):
        return {}
    dirty = any(not line.startswith("??") or line.endswith(".py") for line in status.splitlines())
    return {"commit": commit.strip(), "dirty": dirty}


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):  # no such question on this system
        return None
