"""Rows of a table that belong together in a figure: one method at several settings."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..statistics.inference import DENSE
from ..tables.tables import MethodRow

_KNOBS = {"keep", "tokens"}


@dataclass(frozen=True)
class Series:
    """One method's rows, the least compute first. ``names``: what tells each row from the others of its method."""

    label: str
    method: str
    rows: list[MethodRow]
    names: list[str]


def series(rows: Iterable[MethodRow]) -> list[Series]:
    """The rows by method and label, in their order.

    What a label says after its name (``fastv:keep=0.5``, ``ours keep=0.5``) does not count. Where ``keep`` or
    ``tokens`` varies, rows that differ in other options as well are series of their own.
    """
    stems: dict[tuple[str, str], list[MethodRow]] = defaultdict(list)
    for row in rows:
        stems[row.method, _stem(row.label)].append(row)
    return [one for (method, stem), members in stems.items() for one in _split(method, stem, members)]


def _split(method: str, stem: str, rows: list[MethodRow]) -> list[Series]:
    varying = [key for key in rows[0].options if key != "seed" and len({str(row.options.get(key)) for row in rows}) > 1]
    apart = [key for key in varying if key not in _KNOBS] if _KNOBS & set(varying) else []
    groups: dict[str, list[MethodRow]] = defaultdict(list)
    for row in rows:
        groups[" ".join([stem, _spell(row, apart)]).strip()].append(row)
    parts = []
    for label, members in groups.items():
        members.sort(key=lambda row: row.macs)
        names = [_spell(row, [key for key in varying if key not in apart]) for row in members]
        parts.append(Series("dense" if label == DENSE else label, method, members, names))
    return parts


def _stem(label: str) -> str:
    return re.split(r"[: ](?=\S+=)", label)[0]


def _spell(row: MethodRow, keys: list[str]) -> str:
    values: dict[str, Any] = {key: row.options.get(key) for key in keys}
    return ", ".join(f"{key}={value}" for key, value in values.items() if value is not None)
