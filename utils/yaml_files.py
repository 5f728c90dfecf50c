"""YAML that users write."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import Composer

from ..errors import DataError, OptionError
from .files import read
from .output import unwritable

LARGEST = 100_000
"""Values in a document at most."""


class _Loader(yaml.SafeLoader):
    """YAML without two values for one key, one of which would be lost, and without texts that no file can hold."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value]
        for number, key in enumerate(keys):
            if any((key.tag, key.value) == (other.tag, other.value) for other in keys[:number]):
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value} stands twice", problem_mark=key.start_mark
                )
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        text = super().construct_scalar(node)
        if odd := unwritable(str(text)):
            raise yaml.constructor.ConstructorError(problem=odd, problem_mark=node.start_mark)
        return text


_Nodes: type[yaml.SafeLoader] | type[yaml.CSafeLoader] = yaml.SafeLoader
if yaml.__with_libyaml__:

    class _Nodes(Composer, yaml.CSafeLoader):  # type: ignore[no-redef]
        """What libyaml reads, in a seventh of the time; composed in Python, since it crashes on what nests deep."""

        def __init__(self, text: str) -> None:
            yaml.CSafeLoader.__init__(self, text)
            Composer.__init__(self)


def parse(text: str) -> Any:
    """What a text says; raises :class:`yaml.YAMLError`, also for a key that stands twice, and for what is too large."""
    with _loader(_Loader, text) as loader:
        node = _node(loader)
        return None if node is None else loader.construct_document(node)


def composed(text: str) -> yaml.Node | None:
    """The same before tags are looked at, which may be anybody's."""
    with _loader(_Nodes, text) as loader:
        return _node(loader)


@contextmanager
def _loader(kind: Any, text: str) -> Iterator[Any]:
    loader = None
    try:
        loader = kind(text)
        yield loader
    except RecursionError:
        raise yaml.YAMLError("nested too deeply, or in itself") from None
    except (ValueError, OverflowError) as error:  # of a date or number that is none
        raise yaml.YAMLError(str(error)) from error
    finally:
        if loader is not None:
            loader.dispose()


def _node(loader: Any) -> yaml.Node | None:
    node = loader.get_single_node()
    if node is not None and _size(node, {}) > LARGEST:
        raise yaml.YAMLError(f"more than {LARGEST:,} values, aliases written out")
    return node


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Values in a node, aliases written out, which the largest of these documents hold in a few lines."""
    if id(node) not in known:
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for one in inner for part in (one if isinstance(one, tuple) else (one,))]
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]


def mapping(path: Path, expected: str) -> dict[str, Any]:
    """The content of a file that holds a mapping, with ``expected`` keys.

    Raises :class:`DataError` for what is no YAML, and :class:`OptionError` for what is no mapping.
    """
    try:
        content = parse(read(path).decode("utf-8-sig"))
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror or error}): fix that, or give another file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise OptionError(f"{path}: expected a mapping with {expected}")
    return content
