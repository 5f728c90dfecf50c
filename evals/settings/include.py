"""Configurations before they are checked: what they include, and what the command line sets in them.

``include: quick`` or ``include: [base.yaml, gpu.yaml]`` starts from other configurations: paths relative to the
including file, or names from the package. Later keys win, whole: those of a later file over an earlier one's, those of
the including file over both. ``add: {methods: […], tasks: […]}`` appends to lists instead of replacing them.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from ...errors import DataError, OptionError, suggest
from ...utils import yaml_files
from . import method_spec

PACKAGED = Path(__file__).parents[2] / "configs"
DEEPEST = 50
"""Files of which each includes the next at most."""
# Keys that stand for each other: the later one replaces the earlier one.
_INSTEAD = {"model": "models", "models": "model"}


def read(name: str) -> tuple[dict[str, Any], Path]:
    """Content and path of a configuration of any kind, by path or by name from those in the package.

    Raises :class:`DataError` if it, or one that it includes, is not there or not YAML, and :class:`OptionError` if it
    is no mapping or includes itself.
    """
    path = _find(name, Path())
    return _load(path, ()), path


def override(content: dict[str, Any], settings: Iterable[str], known: Iterable[str]) -> dict[str, Any]:
    """A copy of ``content`` with ``settings`` KEY=VALUE, later ones last; VALUE as in YAML.

    ``known``: the keys there may be. Dots lead into mappings (``timing.repeats=5``), and into the entries of a method,
    by name or label (``methods.fastv.keep=0.5``), where an option takes the place of its grid. Raises
    :class:`OptionError` for a key given twice, and for one as a whole behind a part of it, which would be lost.
    """
    content = copy.deepcopy(content)
    given: dict[tuple[str, ...], str] = {}
    for text in settings:
        keys = _set(content, text, known)
        lost = next((other for before, other in given.items() if before[: len(keys)] == keys), None)
        if lost is not None:
            raise OptionError(f"{'.'.join(keys)} is given twice, as {lost} and {text}: leave one of them out")
        given[keys] = text
    return content


# ---- include --------------------------------------------------------------------------------------------------------


def _find(name: str, folder: Path, asking: str = "") -> Path:
    packaged = {file.stem: file for file in PACKAGED.glob("*.yaml")}
    if os.path.isfile(folder / name):
        return folder / name
    if name not in packaged:
        complaint = f"no configuration {name!r}: neither a file nor one of the package"
        raise DataError(f"{asking}{complaint}; {suggest(name, packaged)}")
    return packaged[name]


def _load(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """The content of a file over all that it includes; ``above``: the files that led to it."""
    if len(above) > DEEPEST:
        raise OptionError(f"{above[0]} includes files over more than {DEEPEST} steps: include them directly")
    if path.resolve() in above:
        chain = " includes ".join(map(str, (*above, path.resolve())))
        raise OptionError(f"a configuration cannot include itself, but {chain}: remove one of these includes")
    stated = yaml_files.mapping(path, "model, methods and so on")
    names, additions = stated.pop("include", []), stated.pop("add", {})
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise OptionError(f"{path}: include: expected a configuration by path or name, or a list of them")
    content: dict[str, Any] = {}
    for name in names:
        _update(content, _load(_find(name, path.parent, f"{path}: include: "), (*above, path.resolve())))
    _update(content, stated)
    if not isinstance(additions, dict):
        raise OptionError(f"{path}: add: expected lists to append, such as add: {{methods: [vtw]}}")
    for key, more in additions.items():
        if not isinstance(more, list) or not isinstance(content.get(key, []), list):
            raise OptionError(f"{path}: add.{key}: only lists can be added to lists; set {key} itself instead")
        content[key] = content.get(key, []) + more
    return content


def _update(content: dict[str, Any], later: dict[str, Any]) -> None:
    for key in later:
        content.pop(_INSTEAD.get(key, key), None)
    content.update(later)


# ---- --set ----------------------------------------------------------------------------------------------------------


def _set(content: dict[str, Any], text: str, known: Iterable[str]) -> tuple[str, ...]:
    """Set what ``text`` says, and return the keys that lead there."""
    key, equals, value = text.partition("=")
    first, *rest = (part.strip() for part in key.split("."))
    if not equals or not all((first, *rest)):
        raise OptionError(f"--set {text}: expected KEY=VALUE, such as limit=20 or methods.fastv.keep=0.5")
    if first not in known:
        raise OptionError(f"--set {text}: unknown key {first!r}; {suggest(first, known)}")
    if first == "methods" and rest:
        return _set_option(content, text)
    if not rest:
        _update(content, {first: _value(value, text)})
        return (min(first, _INSTEAD.get(first, first)),)
    _put(content, [first, *rest], _value(value, text), text)
    return (first, *rest)


def _set_option(content: dict[str, Any], text: str) -> tuple[str, ...]:
    """Set an option of all entries of a method. Names and labels may hold dots and equals signs."""
    given = content.get("methods")
    entries = given if isinstance(given, list) else []
    rest = text.removeprefix("methods.")
    names = {name for entry in entries for name in _names(entry)}
    name = max((name for name in names if rest.startswith(f"{name}.")), key=len, default=None)
    if name is None:
        unknown = rest.partition("=")[0].partition(".")[0]
        raise OptionError(
            f"--set {text}: expected methods.NAME.OPTION=VALUE with the name or label of a method of the "
            f"configuration, not {unknown!r}; {suggest(unknown, names)}"
        )
    path, _, value = rest.removeprefix(f"{name}.").partition("=")
    parts = [part.strip() for part in path.split(".")]
    content["methods"] = [
        _changed(entry, parts, _value(value, text), text) if name in _names(entry) else entry for entry in entries
    ]
    return ("methods", name, *parts)


def _names(entry: Any) -> set[str]:
    """How an entry of a method may be called; whether it is a usable one is checked later."""
    if isinstance(entry, str):
        return {method_spec.name_of(entry), entry.strip()}
    called = (entry.get("name"), entry.get("label")) if isinstance(entry, dict) else ()
    return {name for name in called if isinstance(name, str)}


def _changed(entry: str | dict[str, Any], parts: Sequence[str], value: Any, text: str) -> dict[str, Any]:
    if isinstance(entry, str):
        name, options = method_spec.split(entry)
        entry = {"name": name, **options}
    if isinstance(entry.get("grid"), dict):
        entry["grid"] = {key: values for key, values in entry["grid"].items() if key != parts[0]}
    if parts[0] == "grid" and len(parts) > 1:
        entry.pop(parts[1], None)
    _put(entry, parts, value, text)
    return entry


def _put(mapping: dict[str, Any], parts: Sequence[str], value: Any, text: str) -> None:
    for part in parts[:-1]:
        inner = {} if mapping.get(part) is None else mapping[part]
        if not isinstance(inner, dict):
            raise OptionError(f"--set {text}: {part} is {inner!r}, which has no keys: set {part} as a whole")
        mapping[part] = inner
        mapping = inner
    mapping[parts[-1]] = value


def _value(text: str, setting: str) -> Any:
    if not text.strip():
        raise OptionError(f"--set {setting}: no value; write null for none")
    try:
        return yaml_files.parse(text)
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise OptionError(f"--set {setting}: the value is not valid YAML: {problem}") from error


def chosen(values: Iterable[str], known: Container[str]) -> list[str]:
    """Names from texts A,B,C; one that is a known name as a whole, commas and all, stays so."""
    return [
        name for value in values for name in ([value] if value in known else map(str.strip, value.split(","))) if name
    ]
