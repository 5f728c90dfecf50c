"""Whether cells were made by the code that is here now."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable, Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import TypeVar

from ...utils import sources
from ...utils.machine import ROOT, version

ENGINE = ("engine", "models", "evals/answers", "evals/tasks")
"""Folders of this package that every number depends on, beside its method and its task."""
SYNTHETIC = ROOT / "synthetic" / "manifest.json"
T = TypeVar("T")


@lru_cache(maxsize=1)
def engine() -> str:
    """Version and hash of the code that runs all methods on all tasks."""
    files = (file for folder in ENGINE for file in (ROOT / folder).rglob("*.py"))
    return f"visibench {version('visibench')} · {sources.of_files(files)}"


def of_method(where: str) -> str:
    """Version and hash of a method, from its module's name or its file; empty if that is not there."""
    if where.endswith(".py"):
        return sources.of_file(Path(where))
    inside = "visibench.methods" if where.startswith("visibench.methods.") else ""
    return sources.of_module(where, inside=inside)


def of_data(where: str) -> str:
    """Hash of a task's data on this disk, from where they lie; empty if they are not there."""
    return sources.of_data(where)


def of_task(where: str) -> str:
    """Version and hash of a task's definition and prompts, from its YAML; empty if that is not there.

    ``where``: a file, or its place among lmms-eval's own tasks; a plus sign behind it: on the embedded data.
    """
    embedded = where.endswith("+") and not os.path.isabs(where)
    place = where.removesuffix("+") if embedded else where
    file = Path(place)
    if file.is_absolute() and file.suffix not in (".yaml", ".yml"):
        return _of_questions(place)
    stock = not file.is_absolute()
    if stock:
        spec = importlib.util.find_spec("lmms_eval")
        if spec is None or spec.origin is None:
            return ""
        file = Path(spec.origin).parent / "tasks" / place
    if not file.is_file():
        return ""
    read = sources.of_yaml(file)
    parts = [f"lmms-eval {version('lmms-eval')}"] * stock + [read] + [sources.of_files([SYNTHETIC])] * embedded
    return " · ".join(parts)


def _of_questions(place: str) -> str:
    """Hash of questions of one's own, and the scorer that is named behind them."""
    file, _, scorer = place.rpartition(":") if not Path(place).exists() else (place, "", "")
    read = sources.of_questions(Path(file)) if Path(file).exists() else ""
    return " · ".join(filter(None, [read, scorer])) if read else ""


class Here:
    """The code that is here now. Each piece is looked up once: cells that are read together share one."""

    def __init__(self) -> None:
        self.method, self.task, self.data = cache(of_method), cache(of_task), cache(of_data)

    def changed(self, code: Mapping[str, str], where: Mapping[str, str]) -> list[str]:
        """Which of ``method``, ``task``, ``data`` and ``engine`` have changed; what is not here is not told."""
        now: dict[str, Callable[[], str]] = {
            "method": lambda: self.method(where.get("method", "")),
            "task": lambda: self.task(where.get("task", "")),
            "data": lambda: self.data(where.get("data", "")),
            "engine": engine,
        }
        return [part for part, before in code.items() if part in now and now[part]() not in ("", before)]


def present(cells: Iterable[T], name: Callable[[T], str], other: Callable[[T], bool]) -> list[T]:
    """Of cells of one name, those that are not of ``other`` code, if there are any."""
    cells = list(cells)
    named = {name(cell) for cell in cells if not other(cell)}
    return [cell for cell in cells if name(cell) not in named or not other(cell)]
