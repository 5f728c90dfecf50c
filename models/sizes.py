"""Sizes that a checkpoint's files ask for, looked at before anything of these sizes is made.

A model of millions of layers takes for ever also where it has no weights, and a wide one fills the memory. The bounds
lie far above what exists: the largest models have some hundred layers, vocabularies of a quarter of a million entries,
and ten million positions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import DataError

MOST = (
    (re.compile(r"theta|seed"), None),
    (re.compile(r"layer|depth|blocks"), 2_000),
    (re.compile(r"^((image|crop|patch|tile)_)?size$|^(height|width)$"), 10_000),
    (re.compile(r""), 100_000_000),
)
"""The largest whole number of a key, by the first pattern that it matches; None: any."""
IMAGES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def check(name: str, source: str, content: Any) -> None:
    """Raise :class:`DataError` where model ``name`` asks for more than any model has; errors of its files pass.

    ``content``: that of its config.json.
    """
    _check(name, "config.json", content)
    for file in IMAGES:
        images: Any = None
        with suppress(OSError, ValueError):  # whoever reads it says what is wrong
            images = json.loads((Path(source) / file).read_text(encoding="utf-8"))
        _check(name, file, images)


def _check(name: str, file: str, content: Any) -> None:
    for key, value in _numbers("", content):
        most = next(most for pattern, most in MOST if pattern.search(key))
        if most is not None and abs(value) > most:
            digits = f"{value:,}" if abs(value) < 10**18 else f"a number of {len(str(abs(value)))} digits"
            raise DataError(
                f"cannot load model {name!r}: {key} is {digits} in its {file}, and no model has more than {most:,}. "
                f"Download it again, or correct its {file}"
            )


def _numbers(key: str, value: Any) -> Iterator[tuple[str, int]]:
    """Whole numbers with the key that they stand under, also in lists."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _numbers(str(name), inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(key, inner)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield key, value
