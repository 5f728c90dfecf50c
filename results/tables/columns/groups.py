"""Columns of scores by difficulty: what a smaller image does to what the dense model answers right (VTC-Bench)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from ...statistics.inference import mean_of
from ...statistics.intervals import Estimate
from ..tables import MethodRow, ResultTable
from .column import MISSING, Column, TableEntry, TableLook, add_column, entry_of

GROUPS = {"A": "lost when smaller", "B": "right when smaller"}
_FIGURES: dict[str, Callable[[Estimate], float]] = {
    "": lambda estimate: estimate.value,
    ":low": lambda estimate: estimate.low,
    ":high": lambda estimate: estimate.high,
    ":questions": lambda estimate: estimate.questions,
}


@add_column
class DifficultyColumn(Column):
    """The mean score on one group of questions."""

    default = "nowhere"

    def __init__(self, table: ResultTable, group: str) -> None:
        super().__init__(table)
        self.group = group
        self.name = f"group_{group.lower()}"
        self.about = f"mean score on what the dense model answers right, group {group}: {GROUPS[group]}"

    @classmethod
    def of(cls, table: ResultTable) -> list[Column]:
        return [cls(table, group) for group in GROUPS]

    @property
    def title(self) -> str:
        return f"{self.group}: {GROUPS[self.group]}\n% (questions)"

    def show(self, row: MethodRow) -> TableEntry:
        """Mean over the tasks that have such questions, and in brackets how many there are."""
        estimates = [groups[self.group] for groups in row.evidence.groups.values() if self.group in groups]
        if not estimates:
            return MISSING
        mean = entry_of(mean_of(estimates), 1.0)
        return TableEntry(f"{mean.value} ({sum(estimate.questions for estimate in estimates)})", mean.spread)

    def figures(self, row: MethodRow) -> dict[str, Any]:
        by_task = {task: groups.get(self.group) for task, groups in row.evidence.groups.items()}
        return {
            f"{task}:{self.name}{suffix}": figure(estimate) if estimate else None
            for task, estimate in by_task.items()
            for suffix, figure in _FIGURES.items()
        }

    def json(self, row: MethodRow) -> dict[str, Any]:
        groups = {
            task: {self.group: asdict(by[self.group])} if self.group in by else {}
            for task, by in row.evidence.groups.items()
        }
        return {"difficulty": {"smaller_image": row.evidence.groups_by, "groups": groups}}

    def notes(self, shown: TableLook) -> list[str]:
        small = sorted({row.evidence.groups_by for row in self.table.rows if row.evidence.groups_by})
        if not small:
            return ["Groups of difficulty need rows of none and downsample."]
        return [
            "A and B: mean score over tasks, with the number of questions, on those that the dense model answers right "
            f"and {' or '.join(small)} (of downsample the row nearest in T) wrong (A) or right as well (B), as in "
            "VTC-Bench."
        ]
