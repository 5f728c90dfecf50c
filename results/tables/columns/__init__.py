"""Columns of a table, each one object in one place: scores, costs, times, groups. What one is says ``column``.

Beside the names of the columns, ``TASK:METRIC`` names a score and ``TASK`` all scores of a task.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from ....errors import OptionError, suggest
from ..tables import ResultTable
from .column import COLUMNS, Column, Mark, TableEntry, TableLook, add_column, spread

__all__ = [
    "COLUMNS",
    "Column",
    "Mark",
    "TableEntry",
    "TableLook",
    "add_column",
    "choose",
    "columns",
    "every",
    "listing",
    "spread",
]

for _module in ("scores", "controls", "costs", "times", "groups"):  # their columns stand in a table in this order
    import_module(f"{__name__}.{_module}")


def every(table: ResultTable) -> list[Column]:
    """All columns of a table, also those that no row has a value for."""
    return [column for kind in COLUMNS for column in kind.of(table)]


def columns(table: ResultTable, *, csv: bool = False) -> list[Column]:
    """The columns that a table, or its ``csv``, has where none are named."""
    wanted = ("everywhere", "csv") if csv else ("everywhere",)
    return [column for column in every(table) if column.known and column.default in wanted]


def brief(tables: Sequence[ResultTable]) -> list[list[Column]]:
    """The columns of each table that stand in its short form: a score a task, tokens, compute."""
    return [[column for column in columns(table) if column.brief] for table in tables]


def choose(tables: Sequence[ResultTable], names: Sequence[str] | None, *, csv: bool = False) -> list[list[Column]]:
    """The columns ``names`` of each table, in this order, by default those that it has by itself.

    Raises :class:`OptionError` for unknown ones.
    """
    if names is None:
        return [columns(table, csv=csv) for table in tables]
    known = [[column for column in every(table) if column.known] for table in tables]
    aliases = {alias for each in known for column in each for alias in _aliases(column)}
    for name in names:
        if not name:
            raise OptionError("a column has no name: give names, as in --columns method,gqa")
        if name not in aliases:
            raise OptionError(f"unknown column {name!r}; {suggest(name, aliases)}")
    return [[column for name in names for column in each if name in _aliases(column)] for each in known]


def listing(tables: Sequence[ResultTable]) -> list[tuple[str, str]]:
    """The names of all columns that the tables have, and what each shows."""
    named = {column.name: column for table in tables for column in every(table) if column.known}
    shown = {column.name for table in tables for column in columns(table)}
    return [(name, column.about + " (only where named)" * (name not in shown)) for name, column in named.items()]


def _aliases(column: Column) -> set[str]:
    return {column.name, column.name.partition(":")[0]}
