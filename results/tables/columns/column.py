"""What a column of a table is: one object that knows its name, its title, how it is shown and what it needs said."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from ...statistics.intervals import Estimate
from ..tables import MethodRow, ResultTable

SIDES = 1.25
"""How many times the other one side of an interval may be for ± to stand for both."""


@dataclass(frozen=True)
class Mark:
    """How a score compares with a ``reference`` such as dense: an ``arrow``, and what that means in words."""

    arrow: str
    reference: str
    meaning: str

    def __str__(self) -> str:
        return self.arrow + self.reference[0]


@dataclass(frozen=True)
class TableLook:
    """How a table is shown: what marks the ``best``; ``brief``: one mark a value and no interval; with ``notes``."""

    best: str
    brief: bool = False
    notes: bool = True


@dataclass(frozen=True)
class TableEntry:
    """What stands in a row. ``spread``: what follows the value, such as ``± 3.1`` or, of unequal sides, ``+0.9 −4.4``.

    ``sd``: a standard deviation, over seeds or questions; ``best``: shown to be the best of its group.
    """

    value: str
    spread: str = ""
    sd: str = ""
    marks: tuple[Mark, ...] = ()
    best: bool = False

    @property
    def behind(self) -> list[str]:
        """What follows the value: its spread, and in brackets its standard deviation."""
        return [self.spread] * bool(self.spread) + [f"(sd {self.sd})"] * bool(self.sd)

    def text(self, bold: str) -> str:
        """The entry in one line; ``bold`` with the value in place of {} where it is the best."""
        return " ".join([bold.format(self.value) if self.best else self.value, *self.behind, *map(str, self.marks)])

    def brief(self, bold: str) -> str:
        """The value with its first mark."""
        return " ".join([bold.format(self.value) if self.best else self.value, *map(str, self.marks[:1])])

    def stacked(self, bold: str) -> str:
        """The same in two lines, for narrow columns: value and marks, and what stands behind below."""
        value = bold.format(self.value) if self.best else self.value
        lines = [" ".join([value, *map(str, self.marks)]), " ".join(self.behind)]
        return "\n".join(filter(None, lines))


MISSING = TableEntry("–")


class Column(ABC):
    """A column of one ``table``. A subclass under :func:`add_column` is all that a new one takes.

    ``name``: what ``--columns`` calls it, and ``about`` what ``--columns list`` says of it. ``default``: where it
    stands if no columns are named: in every form of the table, in the figures of CSV alone, or nowhere. ``words``: it
    holds words, which stand on the left. ``brief``: it stands in the short tables of terminals and papers too.
    """

    name: str
    about: str
    default: ClassVar[Literal["everywhere", "csv", "nowhere"]] = "everywhere"
    words: ClassVar[bool] = False
    brief: bool = False

    def __init__(self, table: ResultTable) -> None:
        self.table = table

    @classmethod
    def of(cls, table: ResultTable) -> list[Column]:
        """The columns of this kind that a table has."""
        return [cls(table)]

    @property
    def known(self) -> bool:
        """Whether some row of the table has this; else the column is there for JSON alone."""
        return True

    @property
    @abstractmethod
    def title(self) -> str:
        """One or two lines."""

    @abstractmethod
    def show(self, row: MethodRow) -> TableEntry:
        """What stands in a row."""

    @abstractmethod
    def figures(self, row: MethodRow) -> dict[str, Any]:
        """A row's figures with full precision, by their names in CSV, which say what they count."""

    def json(self, row: MethodRow) -> dict[str, Any]:
        """The column's part of the row in JSON; nested objects of several columns are joined."""
        return self.figures(row)

    def notes(self, shown: TableLook) -> list[str]:
        """What a reader must know next to what is ``shown`` of it; what several columns say stands there once."""
        return []


COLUMNS: list[type[Column]] = []
"""All kinds of columns, in the order in which they stand in a table."""
AnyColumn = TypeVar("AnyColumn", bound=type[Column])


def add_column(kind: AnyColumn) -> AnyColumn:
    """Make a kind of column one that tables have, behind those before it."""
    COLUMNS.append(kind)
    return kind


# ---- spelling -----------------------------------------------------------------------------------------------------


def spell_score(value: float, maximum: float | None) -> str:
    """As percent if the maximum is 1, with four digits if it is not known."""
    return f"{value:.4g}" if maximum is None else f"{value * (100.0 if maximum == 1 else 1.0):.1f}"


def entry_of(estimate: Estimate | None, maximum: float | None) -> TableEntry:
    """A value with its interval."""
    if estimate is None:
        return MISSING
    return TableEntry(spell_score(estimate.value, maximum), spread(estimate, lambda width: spell_score(width, maximum)))


def spread(estimate: Estimate, spelled: Callable[[float], str]) -> str:
    """An interval as what it adds to the value and takes from it, in one figure where these are about the same."""
    below, above = estimate.value - estimate.low, estimate.high - estimate.value
    if math.isnan(below) or math.isnan(above):
        return ""
    below, above = max(below, 0.0), max(above, 0.0)  # at the end of a scale, rounding may put a limit behind the value
    if max(below, above) <= SIDES * min(below, above):
        return f"± {spelled((below + above) / 2)}"
    return f"+{spelled(above)} −{spelled(below)}"
