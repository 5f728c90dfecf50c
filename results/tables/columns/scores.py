"""Columns of what methods score: the method, a column for each score, the share of the dense scores, and loyalty."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from ...statistics.inference import ALPHA, DENSE, Contrast, Verdict
from ...store.records import ScoreRecord
from ..tables import MethodRow, ResultTable
from . import score_notes
from .column import MISSING, Column, Mark, TableEntry, TableLook, add_column, entry_of, spell_score, spread


@add_column
class MethodColumn(Column):
    """Which method a row is of, with its options."""

    name, title, words, brief = "method", "method", True, True
    about = "the method with its options, as the sweep calls it"

    def show(self, row: MethodRow) -> TableEntry:
        return TableEntry(row.label)

    def figures(self, row: MethodRow) -> dict[str, Any]:
        return {"method": row.label, "budget_group": row.evidence.budget_group, "seeds": len(row.seeds)}

    def json(self, row: MethodRow) -> dict[str, Any]:
        named = {"label": row.label, "method": row.method, "options": row.options, "seeds": row.seeds}
        return named | {"budget_group": row.evidence.budget_group, "reused_images": _reused_images(row)}

    def notes(self, shown: TableLook) -> list[str]:
        groups = len({row.evidence.budget_group for row in self.table.rows} - {None})
        return ["Groups: rows whose T differ by a quarter at most."] if groups > 1 else []


@add_column
class ScoreColumn(Column):
    """One metric of one task, with its interval and how it compares with dense and random."""

    def __init__(self, table: ResultTable, task: str, score: ScoreRecord) -> None:
        super().__init__(table)
        self.task, self.score = task, score
        self.name = f"{task}:{score.key}"
        self.about = f"{score.title} of {task} by lmms-eval, its interval, and how it compares with dense and random"
        self.brief = score is table.metrics[task][0]

    @classmethod
    def of(cls, table: ResultTable) -> list[Column]:
        return [cls(table, task, score) for task, scores in table.metrics.items() for score in scores]

    @property
    def title(self) -> str:
        maximum = self.score.maximum
        unit = "" if maximum is None else " %" if maximum == 1 else f" /{maximum:g}"
        return f"{self.task}\n{self.score.title}{unit}"

    def show(self, row: MethodRow) -> TableEntry:
        task, key, maximum = self.task, self.score.key, self.score.maximum
        mean = row.scores.get(task, {}).get(key)
        if mean is None or math.isnan(mean.mean):
            return MISSING
        interval = row.evidence.scores.get(task, {}).get(key)
        entry = entry_of(interval, maximum) if interval else TableEntry(spell_score(mean.mean, maximum))
        marks = tuple(mark_of(name, contrast) for name, contrast in self._contrasts(row).items() if contrast)
        best = row.evidence.best.get(task, {}).get(key, 1.0) < ALPHA
        return TableEntry(
            entry.value, entry.spread, spell_score(mean.sd, maximum) if mean.sd is not None else "", marks, best
        )

    def figures(self, row: MethodRow) -> dict[str, Any]:
        """Score, sd over seeds, the ends of its interval and what that counts, and p-values with and without Holm."""
        task, key, name = self.task, self.score.key, self.name
        mean, interval = row.scores.get(task, {}).get(key), row.evidence.scores.get(task, {}).get(key)
        contrasts = self._contrasts(row)
        return {
            name: mean.mean if mean else None,
            f"{name}:sd": mean.sd if mean else None,
            f"{name}:low": interval.low if interval else None,
            f"{name}:high": interval.high if interval else None,
            f"{name}:questions": interval.questions if interval else None,
            f"{name}:images": interval.images if interval else None,
            f"{name}:p_best": row.evidence.best.get(task, {}).get(key),
            **{f"{name}:p_{other}": contrast.p_holm if contrast else None for other, contrast in contrasts.items()},
            **{
                f"{name}:p_{other}_raw": verdict.comparison.p if verdict else None
                for other, verdict in contrasts.items()
            },
        }

    def json(self, row: MethodRow) -> dict[str, Any]:
        """A score over seeds, its interval over questions (None: not known), and the comparisons."""
        task, key = self.task, self.score.key
        if key not in row.scores.get(task, {}):
            return {"scores": {}}
        interval = row.evidence.scores.get(task, {}).get(key)
        told = asdict(row.scores[task][key]) | {
            "interval": asdict(interval) if interval else None,
            "best_p_holm": row.evidence.best.get(task, {}).get(key),
            "against": {name: _contrast_json(c) if c else None for name, c in self._contrasts(row).items()},
        }
        return {"scores": {task: {key: told}}}

    def notes(self, shown: TableLook) -> list[str]:
        return score_notes.of(self.table, shown)

    def _contrasts(self, row: MethodRow) -> dict[str, Contrast | None]:
        return {name: by.get(self.task, {}).get(self.score.key) for name, by in row.evidence.against.items()}


def _contrast_json(contrast: Contrast) -> dict[str, Any]:
    return {
        "reference": contrast.reference,
        **asdict(contrast.comparison),
        "p_holm": contrast.p_holm,
        "detectable_holm": contrast.detectable,
        "tests": contrast.tests,
        "p_equivalent": contrast.p_equivalent,
        "sign": contrast.sign,
        "verdict": contrast.verdict,
    }


_MARKS = {
    Verdict.HIGHER: ("↑", "shown higher than {}"),
    Verdict.LOWER: ("↓", "shown lower than {}"),
    Verdict.HIGHER_ALONE: ("↗", "higher than {} by this test alone, not shown after Holm"),
    Verdict.LOWER_ALONE: ("↘", "lower than {} by this test alone, not shown after Holm"),
    Verdict.EQUIVALENT: ("≈", "shown to differ from {} by less than the margin"),
    Verdict.NOT_SHOWN: ("·", "no difference from {} shown"),
}


def mark_of(reference: str, contrast: Contrast) -> Mark:
    """How a score compares with that of ``reference``."""
    arrow, meaning = _MARKS[contrast.verdict]
    return Mark(arrow, reference, meaning.format(reference))


@add_column
class RetainedColumn(Column):
    """The share of the dense model's scores that is left, mean over tasks."""

    name, title, brief = "retained", "retained\n%", True
    about = "score / dense score, mean over tasks, with its interval"

    def show(self, row: MethodRow) -> TableEntry:
        if row.retained is None:
            return MISSING
        interval, sd = row.evidence.retained, row.retained.sd
        behind = spread(interval, lambda width: f"{100 * width:.1f}") if interval else ""
        return TableEntry(f"{row.retained.mean:.1f}", behind, f"{sd:.1f}" if sd is not None else "")

    def figures(self, row: MethodRow) -> dict[str, Any]:
        interval = row.evidence.retained
        return {
            "retained_percent": row.retained.mean if row.retained else None,
            "retained_percent_sd": row.retained.sd if row.retained else None,
            "retained_percent_low": 100 * interval.low if interval else None,
            "retained_percent_high": 100 * interval.high if interval else None,
        }

    def json(self, row: MethodRow) -> dict[str, Any]:
        interval = row.evidence.retained
        limits = {"low": 100 * interval.low, "high": 100 * interval.high} if interval else {"low": None, "high": None}
        return {"retained_percent": asdict(row.retained) | limits if row.retained else None}

    def notes(self, shown: TableLook) -> list[str]:
        """What is averaged, and which tasks it leaves out since the dense model scores 0."""
        rows = self.table.rows
        if not any(row.retained for row in rows):
            return []
        interval = (
            " ± its 95 % interval (paired and clustered by image: delta method, for metrics that are no means the "
            "jackknife; tasks taken as independent)"
            if any(row.evidence.retained for row in rows) and not shown.brief
            else ""
        )
        zero = sorted(
            task
            for row in rows
            if row.method == DENSE
            for task in row.scores
            if not row.scores[task][self.table.metrics[task][0].key].mean
        )
        left_out = f" It leaves out {', '.join(zero)}: the dense score is 0." if zero else ""
        told = f"Retained: mean over tasks of score / dense score{interval}.{left_out}"
        return [told, *score_notes.over_seeds(self.table)[: not shown.brief]]


@add_column
class LoyaltyColumn(Column):
    """The share of answers that equal the dense model's."""

    name, title = "loyalty", "loyalty\n%"
    about = "share of answers that equal the dense model's, mean over tasks, with its interval"

    def show(self, row: MethodRow) -> TableEntry:
        return entry_of(row.evidence.loyalty_mean, 1.0)

    def figures(self, row: MethodRow) -> dict[str, Any]:
        loyalty = row.evidence.loyalty_mean
        return {
            "loyalty_percent": 100 * loyalty.value if loyalty else None,
            "loyalty_percent_low": 100 * loyalty.low if loyalty else None,
            "loyalty_percent_high": 100 * loyalty.high if loyalty else None,
        }

    def json(self, row: MethodRow) -> dict[str, Any]:
        mean = row.evidence.loyalty_mean
        by_task = {task: asdict(share) for task, share in row.evidence.loyalty.items()}
        return {"loyalty": by_task, "loyalty_mean": asdict(mean) if mean else None}

    def notes(self, shown: TableLook) -> list[str]:
        if not any(row.evidence.loyalty for row in self.table.rows):
            return []
        told = "Loyalty: mean over tasks of the share of answers that equal the dense model's."
        return [*score_notes.intervals(self.table)[: not shown.brief], told]


def _reused_images(row: MethodRow) -> dict[str, dict[int, int]]:
    """By task and seed, images whose vision features were there before."""
    counts: dict[str, dict[int, int]] = {}
    for cell in row.cells:
        counts.setdefault(cell.config.task, {})[cell.config.seed] = cell.metrics.reused_images
    return counts
