"""What defines a task: lmms-eval's own YAML by name, a YAML of one's own, or a file or folder of questions."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ...errors import DataError, OptionError, UnknownNameError, suggest
from ...utils import sources
from .known import TASKS
from .scorers import SCORERS

DATA = (".jsonl", ".parquet")
YAML = (".yaml", ".yml")
BUILDERS = ("json", "parquet", "csv", "arrow", "text", "imagefolder")


@dataclass(frozen=True)
class Definition:
    """A task by its ``name``, as tables call it. ``file``: its YAML, or its questions (``own``), to be scored so.

    ``place``: how it is found again, see :func:`visibench.results.store.code.of_task`.
    """

    name: str
    file: Path
    own: bool = False
    scorer: str = ""

    @property
    def stock(self) -> bool:
        """Whether it is one of lmms-eval's own."""
        return not self.own and self.file.is_relative_to(folder())

    @property
    def on_disk(self) -> bool:
        """Whether a YAML of one's own names a folder, or a way of ``datasets`` to read files that it names."""
        if self.own or self.stock:
            return False
        return self.dataset in BUILDERS or os.path.isdir(self.dataset)

    @property
    def dataset(self) -> str:
        """What its YAML, or the nearest that it includes, names as its data set."""
        return next(iter(sources.said_in(self.file, "dataset_path")), "")

    @property
    def place(self) -> str:
        file = str(self.file.relative_to(folder())) if self.stock else str(self.file)
        return f"{file}:{self.scorer}" if self.scorer else file


def called(entry: str) -> str:
    """The name of the task that an entry of ``--tasks`` names, whether or not there is one."""
    place, _ = _divided(entry)
    if not _is_path(place):
        return entry
    defined = _tasks_in(Path(place))
    return defined[0] if len(defined) == 1 else _stem(place)


def find(entry: str, include_path: str = "") -> Definition:
    """The task that an entry of ``--tasks`` names: a name, ``FILE.jsonl``, ``FILE.parquet`` or a folder of them, each
    also with ``:SCORER``, or a task's YAML. ``include_path``: a folder of such YAMLs, whose tasks have names as well.

    Does not import lmms-eval. Raises :class:`UnknownNameError`, :class:`OptionError` and :class:`DataError`.
    """
    place, scorer = _divided(entry)
    more = _included(include_path) if include_path else {}
    if not _is_path(place) and entry in {**more, **_stock()}:
        return _by_name(entry, more)
    path = Path(place)
    if path.suffix in YAML and os.path.isfile(path):
        names = _tasks_in(path)
        if len(names) != 1:
            raise DataError(f"{path} defines no task: give it one line `task: NAME`, as lmms-eval's own have")
        return _own_name(Definition(names[0], path.resolve()))
    if (path.suffix in DATA and os.path.isfile(path)) or os.path.isdir(path):
        if scorer and scorer not in SCORERS:
            raise OptionError(f"{entry}: unknown scorer {scorer!r}; {suggest(scorer, SCORERS)}")
        return _own_name(Definition(_stem(place), path.resolve(), own=True, scorer=scorer))
    if _is_path(place):
        known = ", ".join((*DATA, *YAML))
        raise DataError(f"no questions in {place!r}: give a file that is there ({known}), or a folder of such")
    raise UnknownNameError(f"unknown task {entry!r}; {_hint(entry, more)}")


def _divided(entry: str) -> tuple[str, str]:
    place, colon, scorer = entry.rpartition(":")
    return (place, scorer) if colon and _is_path(place) else (entry, "")


def _stem(place: str) -> str:
    """What questions in a file or folder are called, whatever the way to it; a link has a name of its own."""
    return Path(os.path.abspath(place)).stem


def _is_path(text: str) -> bool:
    return "/" in text or text.endswith((*DATA, *YAML)) or text in (".", "..")


def _by_name(name: str, more: dict[str, tuple[str, Path]]) -> Definition:
    kind, file = more.get(name) or _stock()[name]
    if kind != "task":
        raise OptionError(f"{name!r} is a {kind} of tasks ({file.parent.name}/{file.name}): name its tasks instead")
    return Definition(name, file)


def _own_name(definition: Definition) -> Definition:
    """Raise :class:`OptionError` for a name that lmms-eval's tasks have: tables would take one for the other."""
    if definition.name in _stock():
        raise OptionError(
            f"{definition.file} would be called {definition.name!r} in tables, as a task of lmms-eval is: rename it"
        )
    return definition


def _hint(name: str, more: Iterable[str]) -> str:
    hint = suggest(name, [*TASKS, *more]) + ", lmms-eval's tasks by name, and files of your own (.jsonl, .parquet)"
    return hint if hint.startswith("did") else suggest(name, _stock()).partition("Known:")[0] + hint


def folder() -> Path:
    """Where lmms-eval's own tasks are defined."""
    spec = importlib.util.find_spec("lmms_eval")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("lmms-eval is not installed: pip install 'lmms-eval>=0.7.3,<0.8'")
    return Path(spec.submodule_search_locations[0]) / "tasks"


@cache
def _stock() -> dict[str, tuple[str, Path]]:
    """lmms-eval's tasks, groups and tags: name → (kind, file)."""
    return _index(folder())


def _included(place: str) -> dict[str, tuple[str, Path]]:
    """The same of a folder of the user's."""
    root = Path(place)
    if not os.path.isdir(root):
        raise DataError(f"no folder {place!r}: give as include_path a folder of task YAMLs")
    found = _index(root.resolve())
    for name, (kind, file) in found.items():
        if kind == "task":
            _own_name(Definition(name, file))
    return found


def _index(root: Path) -> dict[str, tuple[str, Path]]:
    found: dict[str, tuple[str, Path]] = {}
    for file in sorted(file for suffix in YAML for file in root.rglob(f"*{suffix}") if os.path.isfile(file)):
        for kind, name in sources.defined_in(file):
            if kind == "task" or name not in found:
                found[name] = (kind, file)
    return found


def _tasks_in(file: Path) -> list[str]:
    """The tasks that a YAML defines; none in what is no YAML."""
    if file.suffix not in YAML or not os.path.isfile(file):
        return []
    return [name for kind, name in sources.defined_in(file) if kind == "task"]
