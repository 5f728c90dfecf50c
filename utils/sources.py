"""What code a number comes from: hashes of Python sources that change with what they do, not with what they say.

Lines of comment, docstrings and blank lines do not count. Nothing is imported.
"""

from __future__ import annotations

import ast
import glob
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache, partial
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import yaml

from . import yaml_files
from .machine import version

QUESTIONS = (".jsonl", ".parquet")
_NAME = re.compile(r"[\w.+-]+")
WHOLE_FILE, EDGE = 32 << 20, 64 << 10
Find = Callable[[str], Path | None]
"""Where the module of a dotted name lies; None for one that does not count."""


@lru_cache(maxsize=1024)  # what runs is what was imported, whatever becomes of its file
def of_module(name: str, inside: str = "") -> str:
    """Distribution, version and hash of a module and of what it imports, directly or not, of its distribution.

    ``inside``: only of this package. Empty if the module is not there.
    """
    top = name.partition(".")[0]
    distributions = [top] if inside else _distributions().get(top, [])
    own = {top} if inside else {key for key, value in _distributions().items() if {*value} & {*distributions}}

    def find(dotted: str) -> Path | None:
        counts = dotted.startswith(f"{inside}.") if inside else dotted.partition(".")[0] in own
        return _module_file(dotted) if counts else None

    file = _module_file(name)
    if file is None:
        return ""
    named = [f"{one} {version(one)}" for one in distributions[:1] if version(one)]
    return " · ".join([*named, _hashed(_closure(file, name, find))])


@lru_cache(maxsize=1)
def _distributions() -> Mapping[str, list[str]]:
    """Installed distributions by the names of what they let import; they do not change while a process runs."""
    return packages_distributions()


def of_file(file: Path) -> str:
    """Hash of a Python file and of what it imports, directly or not, from the folder that it lies in."""

    def find(dotted: str) -> Path | None:
        return _below(file.parent, dotted)

    return _hashed(_closure(file, file.stem, find)) if file.is_file() else ""


def of_files(files: Iterable[Path]) -> str:
    """Hash of these files, by their contents."""
    return _hashed(set(files))


def of_questions(place: Path) -> str:
    """Hash of a file or folder of questions, and of the images that they name by path; of large files the ends."""
    files = [place] if place.is_file() else sorted(file for file in place.glob("*") if file.suffix in QUESTIONS)
    return _of_contents(one for file in files for one in [file, *_images(file)]) if files else ""


def of_data(place: str) -> str:
    """Hash of data on this disk: of all files in the folders, and of the files, that the lines of ``place`` name.

    Lines may be patterns. What ``datasets`` keeps among its data does not count. Empty where there is nothing.
    """
    named = [Path(found) for line in place.splitlines() for found in sorted(glob.glob(line, recursive=True))]
    found = {file for one in named for file in (one.rglob("*") if one.is_dir() else [one])}
    files = sorted(file for file in found if os.path.isfile(file) and not file.name.startswith(("cache-", "tmp")))
    return _of_contents(files) if files else ""


def _of_contents(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with suppress(OSError):
            digest.update(f":{file.stat().st_size}:".encode() + ends(file))
    return digest.hexdigest()[:16]


def _images(file: Path) -> list[Path]:
    """The images that a file of questions names by path."""
    named: dict[Path, None] = {}
    for image in _of_parquet(file) if file.suffix == ".parquet" else _of_lines(file):
        for one in image if isinstance(image, list) else [image]:
            path = one.get("path") if isinstance(one, dict) else one
            named |= {file.parent / path: None} if isinstance(path, str) else {}
    return [path for path in named if os.path.isfile(path)]  # no pipe, which might never end; False for any text


def _of_lines(file: Path) -> Iterator[Any]:
    for line in file.read_text(encoding="utf-8-sig", errors="replace").splitlines():
        with suppress(ValueError, AttributeError, RecursionError):
            yield json.loads(line).get("image")


def _of_parquet(file: Path) -> list[Any]:
    """What stands in the column of images, but for the bytes of images."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with suppress(pa.ArrowException, OSError), pq.ParquetFile(file) as parquet:
        columns = [parquet.schema.column(number) for number in range(len(parquet.schema.names))]
        texts = [one.path for one in columns if one.path.split(".")[0] == "image" and str(one.logical_type) == "String"]
        return parquet.read(columns=texts)["image"].to_pylist() if texts else []
    return []


def ends(file: Path) -> bytes:
    """The content of a file; of one above 32 MiB both ends."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= WHOLE_FILE:
            return stream.read()
        start = stream.read(EDGE)
        stream.seek(-EDGE, os.SEEK_END)
        return start + stream.read()


def _module_file(name: str) -> Path | None:
    top, _, rest = name.partition(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    origin = Path(spec.origin)
    if not rest:
        return origin
    return _below(origin.parent, rest) if spec.submodule_search_locations else None


def _below(folder: Path, dotted: str) -> Path | None:
    place = folder.joinpath(*dotted.split("."))
    return next((file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()), None)


def _closure(file: Path, name: str, find: Find) -> set[Path]:
    """The file of the module ``name`` and all that ``find`` knows of what it imports, directly or not."""
    seen, todo = {file}, [(file, name)]
    while todo:
        source, called = todo.pop()
        for dotted in _imported(source, called, source.stat().st_mtime_ns):
            found = find(dotted)
            if found is not None and found not in seen:
                seen.add(found)
                todo.append((found, dotted))
    return seen


@lru_cache(maxsize=1024)
def _imported(file: Path, name: str, changed: int) -> set[str]:
    """Dotted names that a module may import, also inside functions."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    names: set[str] = set()
    for node in ast.walk(_parsed(file.read_text(encoding="utf-8", errors="replace"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join(filter(None, [*parents, node.module or ""]))
            names |= {base, *(f"{base}.{alias.name}".removeprefix(".") for alias in node.names)}
    return names - {""}


def _parsed(text: str) -> ast.Module:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # whoever imports it says what is wrong
        return ast.Module([], [])


def _hashed(files: set[Path]) -> str:
    # Neither place nor name of a file counts.
    contents = sorted(_content(file, file.stat().st_mtime_ns) for file in files)
    return hashlib.sha256(repr(contents).encode()).hexdigest()[:16]


@lru_cache(maxsize=1024)
def _content(file: Path, changed: int) -> str:
    text = file.read_text(encoding="utf-8", errors="surrogateescape")
    return bare(text) if file.suffix == ".py" else text


def bare(text: str) -> str:
    """Python source without lines of comment, strings that are statements of their own, and blank lines."""
    lines, held, said = text.splitlines(), set(), set()
    for node in _long(_parsed(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            if not lines[node.lineno - 1][: node.col_offset].strip():
                end = node.end_lineno or node.lineno
                lines[node.lineno - 1 : end] = [""] * (end - node.lineno + 1)
                said.add(node.value)
        elif isinstance(node, ast.Constant | ast.JoinedStr) and node not in said:
            held |= {*range(node.lineno, node.end_lineno or node.lineno)}  # lines behind the first, by their index
    return "\n".join(
        line.rstrip()
        for place, line in enumerate(lines)
        if place in held or (line.strip() and not line.lstrip().startswith("#"))
    )


def _long(tree: ast.Module) -> Iterator[ast.AST]:
    """Nodes, each before what is in it, but nothing that is in a node of one line: no line of its own ends there."""
    left: list[ast.AST] = [tree]
    while left:
        node = left.pop()
        yield node
        if getattr(node, "lineno", None) != getattr(node, "end_lineno", 0):
            left += ast.iter_child_nodes(node)


def of_yaml(file: Path) -> str:
    """Hash of a task's YAML file, the files that it includes, and the Python files beside it that they name."""
    found = set(_included(file))
    for one in [*found]:
        functions = [node.value.rpartition(".")[0] for _, node in _scalars(one) if node.tag == "!function"]
        for dotted in functions:
            find = partial(_below, one.parent)
            module = find(dotted)
            found |= _closure(module, dotted, find) if module else set()
    return _hashed(found)


def said_in(file: Path, *keys: str) -> list[str]:
    """What a task's YAML says below these keys, at any depth; what the files say that it includes comes last."""
    return [node.value for one in _included(file) for path, node in _scalars(one) if {*keys} & {*path}]


def defined_in(file: Path) -> list[tuple[str, str]]:
    """(kind, name) of what a task's YAML defines: a task, a group of those that it lists, or tags that it has."""
    node, found = _node(file), []
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        listed = key.value == "tag" and isinstance(value, yaml.SequenceNode)
        if key.value in ("task", "group", "tag"):
            found += [(key.value, one.value) for one in (value.value if listed else [value]) if _is_name(one)]
    return found


def _is_name(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and bool(_NAME.fullmatch(node.value))


def _node(file: Path) -> yaml.Node | None:
    """None where it is no YAML."""
    with suppress(yaml.YAMLError):
        return yaml_files.composed(file.read_text(encoding="utf-8-sig", errors="replace"))
    return None


def _included(file: Path) -> list[Path]:
    """A task's YAML, and those that it includes, directly or not."""
    found = [file]
    for one in found:
        places = [one.parent / node.value for path, node in _scalars(one) if path[-1:] == ("include",)]
        found += [place for place in dict.fromkeys(places) if os.path.isfile(place) and place not in found]
    return found


Scalars = list[tuple[tuple[str, ...], yaml.ScalarNode]]


def _scalars(file: Path) -> Scalars:
    return _scalars_of(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=1024)
def _scalars_of(file: Path, changed: int) -> Scalars:
    """The values in a YAML file, each with the keys that lead to it; none where it is no YAML."""
    found: Scalars = []
    todo: list[tuple[tuple[str, ...], Any]] = [((), _node(file))]
    while todo:
        keys, node = todo.pop()
        if isinstance(node, yaml.ScalarNode):
            found.append((keys, node))
        elif isinstance(node, yaml.SequenceNode):
            todo += [(keys, value) for value in reversed(node.value)]
        elif isinstance(node, yaml.MappingNode):
            todo += [((*keys, str(key.value)), value) for key, value in reversed(node.value)]
    return found
