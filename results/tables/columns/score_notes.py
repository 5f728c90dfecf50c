"""What must be said next to scores: how intervals and marks came about, and what so many questions can show at all."""

from __future__ import annotations

import statistics

from ...statistics.inference import ALPHA
from ...store.records import ScoreRecord
from ..tables import MethodRow, ResultTable
from .column import TableLook, spell_score

REFERENCES = ("dense", "random", "control")


def of(table: ResultTable, shown: TableLook) -> list[str]:
    """All notes on what is ``shown`` of scores."""
    values = [*_marks(table, shown), *_detectable(table), *_lacking(table), *_best(table, shown.best)]
    return values if shown.brief else [*intervals(table), *values, *over_seeds(table)]


def intervals(table: ResultTable) -> list[str]:
    """What stands behind a value."""
    images = {task: e.images for row in table.rows for task, by in row.evidence.scores.items() for e in by.values()}
    if not images:
        return []
    counts = ", ".join(f"{task} {count}" for task, count in sorted(images.items()))
    interval = f"its 95 % interval, clustered by image ({counts} images); limits in CSV and JSON"
    return [f"± after a score or loyalty, or + and − where the sides differ by more than a quarter: {interval}."]


def over_seeds(table: ResultTable) -> list[str]:
    """What a standard deviation behind a score is about."""
    seeds = sorted({len(row.seeds) for row in table.rows} - {1})
    return [f"sd of scores and retained: standard deviation over {' or '.join(map(str, seeds))} seeds."] * bool(seeds)


def _marks(table: ResultTable, shown: TableLook) -> list[str]:
    contrasts = {
        name: [c for row in table.rows for by in row.evidence.against.get(name, {}).values() for c in by.values()]
        for name in REFERENCES
    }
    if shown.brief:  # an entry then has its first mark alone
        contrasts = dict([next((pair for pair in contrasts.items() if pair[1]), (REFERENCES[0], []))])
    notes = []
    if any(contrasts.values()):
        tests = " or ".join(sorted({c.comparison.test for against in contrasts.values() for c in against}))
        references = " and ".join(f"{name[0]} = {name}" for name, against in contrasts.items() if against)
        most = max(c.tests for against in contrasts.values() for c in against)
        notes.append(
            f"↑ higher, ↓ lower ({references}): same questions, {tests}, p < {ALPHA:g} after Holm over the rows, for "
            f"each score and reference apart (up to {most} test{'s' * (most > 1)}). ↗, ↘: p < {ALPHA:g} for this "
            "test alone, not after Holm. ·: no difference shown, which does not mean that there is none."
        )
    if table.margin is not None:
        notes.append(
            f"≈: differs by less than {100 * table.margin:g} % of the best possible score (two one-sided tests, p < "
            f"{ALPHA:g}, not adjusted), and no difference shown."
        )
    if contrasts.get("random"):
        unmatched = [row for row in table.rows if row.evidence.nearest and not _matched(row)]
        apart = f"; rows more than 10 % away from it in T: {len(unmatched)}" if unmatched else ""
        notes.append(f"Random is the random row with the nearest T, mean over its seeds{apart}.")
    return notes


def _detectable(table: ResultTable) -> list[str]:
    """Which differences from dense so many questions can show, by task, at the level that the marks use."""
    floors, blind = [], []
    for task, (score, *_) in table.metrics.items():
        contrasts = [c for row in table.rows if (c := row.evidence.against["dense"].get(task, {}).get(score.key))]
        known = [c.detectable for c in contrasts if c.detectable is not None]
        if known:
            floors.append(f"{task} {spell_score(statistics.median(known), score.maximum)}")
        elif contrasts:
            blind.append(f"{task} ({contrasts[0].comparison.images} images)")
    level = "at the strictest level of Holm that the marks use; median over rows"
    return [f"Smallest true difference from dense shown with 80 % power ({level}): {', '.join(floors)}."] * bool(
        floors
    ) + [f"Too few questions to show any: {', '.join(blind)}."] * bool(blind)


def _lacking(table: ResultTable) -> list[str]:
    """Scores that samples do not give again."""
    lacking = sorted(
        f"{task} {score.title}"
        for task, scores in table.metrics.items()
        for score in scores
        if _lacks(table, task, score)
    )
    names = ", ".join(lacking)
    return [f"No interval, no marks: {names} cannot be recomputed from single questions."] * bool(lacking)


def _best(table: ResultTable, bold: str) -> list[str]:
    """What marks the best, where a group has rows to compare."""
    if not any(row.evidence.best for row in table.rows):
        return []
    tested = f"p < {ALPHA:g} against each of them after Holm over the groups, for each score apart"
    return [f"{bold}: higher than all others of its group, same questions, {tested}."]


def _matched(row: MethodRow) -> bool:
    return abs(row.tokens.mean - (row.evidence.nearest or 0.0)) <= 0.1 * row.tokens.mean


def _lacks(table: ResultTable, task: str, score: ScoreRecord) -> bool:
    return any(task in row.scores and score.key not in row.evidence.scores.get(task, {}) for row in table.rows)
