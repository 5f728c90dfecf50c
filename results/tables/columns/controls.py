"""Columns of what a method's choice is worth: its score minus that of random tokens at its own layers and counts."""

from __future__ import annotations

from typing import Any

from ...statistics.inference import Contrast
from ...store.records import CONTROL, ScoreRecord
from ..tables import MethodRow, ResultTable
from .column import MISSING, Column, TableEntry, TableLook, add_column, spell_score


@add_column
class ControlColumn(Column):
    """The headline score of one task, minus that of the control."""

    def __init__(self, table: ResultTable, task: str, score: ScoreRecord) -> None:
        super().__init__(table)
        self.task, self.score = task, score
        self.name = f"control_{task}"
        self.brief = True
        self.about = f"{score.title} of {task} minus that of random tokens at the method's own layers and counts"

    @classmethod
    def of(cls, table: ResultTable) -> list[Column]:
        return [cls(table, task, scores[0]) for task, scores in table.metrics.items()]

    @property
    def known(self) -> bool:
        return any(self._contrast(row) for row in self.table.rows)

    @property
    def title(self) -> str:
        return f"{self.task}\n− control"

    def show(self, row: MethodRow) -> TableEntry:
        contrast = self._contrast(row)
        if contrast is None:
            return MISSING
        one = contrast.comparison
        low, high = (spell_score(limit, self.score.maximum) for limit in (one.low, one.high))
        value = spell_score(one.difference, self.score.maximum)
        return TableEntry(value if value.startswith("-") else f"+{value}", f"[{low}, {high}] p {one.p:.2g}")

    def figures(self, row: MethodRow) -> dict[str, Any]:
        contrast = self._contrast(row)
        one = contrast.comparison if contrast else None
        return {
            self.name: one.difference if one else None,
            f"{self.name}:low": one.low if one else None,
            f"{self.name}:high": one.high if one else None,
            f"{self.name}:p": one.p if one else None,
        }

    def json(self, row: MethodRow) -> dict[str, Any]:
        return {}  # stands among what the score is compared with

    def notes(self, shown: TableLook) -> list[str]:
        seeds = sorted({len(row.seeds) for row in self.table.rows if row.method == CONTROL})
        over = " or ".join(map(str, seeds))
        test = "; [95 % interval, clustered by image] and p of that one test, not adjusted" * (not shown.brief)
        return [
            "− control: the score minus that of random tokens at the same layers, as many for each question, mean over "
            f"{over} seeds{test}. Near 0, the schedule does the work, not the choice."
        ]

    def _contrast(self, row: MethodRow) -> Contrast | None:
        return row.evidence.against.get("control", {}).get(self.task, {}).get(self.score.key)
