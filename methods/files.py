"""Methods in single files, without packaging: FILE.py:NAME stands where the name of a registered method would.

A file is imported once for each content; what it registers is known under its file alone. Instances travel to other
processes by file, hash and options, and are refused where the file is missing or another one.
"""

from __future__ import annotations

import copyreg
import dataclasses
import hashlib
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ..engine.contract import Method
from ..errors import FOREIGN, DataError, UnknownNameError, VisibenchError, said, suggest
from ..utils.files import read
from .registry import collecting, get, list_methods


@dataclass(frozen=True)
class MethodFile:
    """Where a method was read: its ``path``, absolute, and the hash of its content, 16 hex digits."""

    path: str
    digest: str


_loaded: dict[MethodFile, dict[str, type[Method]]] = {}


def find(reference: str) -> type[Method]:
    """The method class that a name, ``FILE.py:NAME`` or, of a file with one method, ``FILE.py`` refers to.

    Raises :class:`UnknownNameError` for a name that is not known or not in the file, :class:`DataError` for a file
    that cannot be read, and :class:`VisibenchError` for one that fails when it is imported or registers no method.
    """
    file, name = divided(reference)
    if not file:
        return get(name)
    methods = load_file(file)
    if not name and len(methods) == 1:
        return next(iter(methods.values()))
    if name not in methods:
        wanted = f"no method {name!r} in" if name else "several methods in"
        raise UnknownNameError(f"{wanted} {file}: name one, {file}:NAME; {suggest(name, methods)}")
    return methods[name]


def divided(reference: str) -> tuple[str, str]:
    """File and name of a reference; the file is empty for a registered name."""
    file, colon, name = reference.rpartition(":")
    if colon and file.endswith(".py"):
        return file, name
    return (reference, "") if reference.endswith(".py") else ("", reference)


def load_file(path: str) -> dict[str, type[Method]]:
    """The methods that a Python file registers, by name."""
    try:
        content = read(path)
    except OSError as error:
        raise DataError(f"no method in {path} ({error.strerror}): give a Python file that is there") from error
    file = MethodFile(str(Path(path).resolve()), hashlib.sha256(content).hexdigest()[:16])
    if file not in _loaded:
        _loaded[file] = _imported(path, content, file)
        for cls in _loaded[file].values():
            copyreg.pickle(cls, _reduce)
    return _loaded[file]


def file_of(cls: type[Method]) -> MethodFile | None:
    """The file that a method was read from; None for registered ones."""
    return next((file for file, methods in _loaded.items() if methods.get(cls.name) is cls), None)


def _imported(path: str, content: bytes, file: MethodFile) -> dict[str, type[Method]]:
    module = ModuleType(f"visibench_method_file_{len(_loaded)}")
    module.__file__ = file.path
    sys.modules[module.__name__] = module  # where dataclasses and type hints look names up
    list_methods()  # plug-ins, too, are registered before: no file may take a name of theirs
    try:
        with collecting() as methods:
            exec(compile(content, path, "exec"), vars(module))
    except FOREIGN as error:  # a file can fail in any way
        del sys.modules[module.__name__]
        frames = reversed(traceback.extract_tb(error.__traceback__))
        line = next((f" (line {frame.lineno})" for frame in frames if frame.filename == path), "")
        raise VisibenchError(f"{path} cannot be imported{line}: {said(error)}", foreign=True) from error
    if not methods:
        raise VisibenchError(f"{path} registers no method: decorate its class with @register(NAME, TITLE)")
    return methods


def _reduce(method: Method) -> tuple[Any, ...]:
    file = file_of(type(method))
    options = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    return _again, (file, method.name, options)


def _again(file: MethodFile, name: str, options: dict[str, Any]) -> Method:
    """The method in another process, from the same file."""
    methods = load_file(file.path)
    if file not in _loaded:
        raise DataError(f"{file.path} is not the file it was when this run began: run the same command again")
    return methods[name](**options)
