"""YAML that users write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ...errors import DataError, OptionError


class _Loader(yaml.SafeLoader):
    """YAML without two values for one key, of which the first would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value]
        for number, key in enumerate(keys):
            if any((key.tag, key.value) == (other.tag, other.value) for other in keys[:number]):
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value} stands twice", problem_mark=key.start_mark
                )
        return super().construct_mapping(node, deep)


def parse(text: str) -> Any:
    """What a text says; raises :class:`yaml.YAMLError`, also for a key that stands twice."""
    return yaml.load(text, _Loader)


def mapping(path: Path, expected: str) -> dict[str, Any]:
    """The content of a file that holds a mapping, with ``expected`` keys.

    Raises :class:`DataError` for what is no YAML, and :class:`OptionError` for what is no mapping.
    """
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise OptionError(f"{path}: expected a mapping with {expected}")
    return content
