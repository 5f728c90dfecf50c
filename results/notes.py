"""What a reader must know next to the numbers of a table."""

from __future__ import annotations

import statistics

from .columns import number
from .inference import ALPHA
from .records import ScoreRecord
from .tables import DENSE, Row, Table


def heading(table: Table, place: int, count: int) -> list[str]:
    """Which of ``count`` tables this is and in what it differs; nothing for the only one."""
    if count == 1:
        return []
    differs = ", ".join(f"{key} = {value}" for key, value in table.differs.items()) or "limit"
    return [f"Table {place} of {count}, not to be compared with the others: {differs}"]


def notes(table: Table, *, bold: bool = False) -> list[str]:
    """Questions, statistics, units, timing and origin. ``bold``: also what bold scores are."""
    asked = ", ".join(f"{task} {q.asked} of {q.of} ({q.origin})" for task, q in table.questions.items())
    lines = [f"Questions: {asked}.{' SUBSET: these are no full-set scores.' if table.is_subset else ''}"]
    lines += [f"{task}: {q.note}." for task, q in table.questions.items() if q.note]
    lines += _inference(table)
    lines += _bold(table) if bold else []
    lines.append(
        f"Retained: mean over tasks of score / dense score{_over_seeds(table)}. Visual tokens: T = mean over "
        f"decoder-layer inputs, and at the last layer's, of {table.rows[0].tokens.prompt:g} in the prompt. FLOPs: one "
        "multiply-add = 1, all that a prefill executed, mean over questions."
    )
    missed = sorted(
        task for row in table.rows if row.method == DENSE for task in row.scores if not _headline(table, row, task)
    )
    if missed:
        lines.append(f"Retained leaves out {', '.join(missed)}: the dense score is 0.")
    timing, timed = table.facts["timing"], [row.prefill.n for row in table.rows if row.prefill]
    if timing and timed:
        repeats = f"{timing['repeats']} runs a task and seed after {timing['warmup']} to warm up"
        lines.append(f"Prefill: batch {timing['batch_size']}, median ± interquartile range, {repeats}.")
    return [*lines, origin(table)]


def _inference(table: Table) -> list[str]:
    """How intervals and marks came about, and what this many questions can show at all."""
    rows, lines = table.rows, []
    images = {task: e.images for row in rows for task, by in row.evidence.scores.items() for e in by.values()}
    if images:
        counts = ", ".join(f"{task} {count}" for task, count in sorted(images.items()))
        interval = f"half of its 95 % interval, clustered by image ({counts} images); limits in CSV and JSON"
        lines.append(f"± after a score or loyalty: {interval}.")
    verdicts = {
        name: [v for row in rows for by in row.evidence.against[name].values() for v in by.values()]
        for name in ("dense", "random")
    }
    count = sum(map(len, verdicts.values()))
    if count:
        tests = " or ".join(sorted({v.comparison.test for found in verdicts.values() for v in found}))
        references = " and ".join(f"{name[0]} = {name}" for name, found in verdicts.items() if found)
        lines.append(
            f"↑ higher, ↓ lower, = tied (no difference shown), {references}: same questions, {tests}, p < {ALPHA:g} "
            f"after Holm over the {count} comparisons of this table."
        )
    unmatched = [row for row in rows if row.evidence.nearest and not _matched(row)]
    if verdicts["random"]:
        apart = f"; rows more than 10 % away from it in T: {len(unmatched)}" if unmatched else ""
        lines.append(f"Random is the random row with the nearest T, mean over its seeds{apart}.")
    floors = [f"{task} {floor}" for task in table.columns if (floor := _detectable(table, task))]
    if floors:
        lines.append(
            f"Smallest difference from dense found with 80 % power (one test at α = {ALPHA:g}, before Holm; median "
            f"over rows): {', '.join(floors)}."
        )
    if any(row.evidence.loyalty for row in rows):
        lines.append("Loyalty: mean over tasks of the share of answers that equal the dense model's.")
    lacking = sorted(
        {
            f"{task} {score.title}"
            for task, scores in table.columns.items()
            for score in scores
            if _lacks(table, task, score)
        }
    )
    if lacking:
        lines.append(f"No interval, no marks: {', '.join(lacking)} cannot be recomputed from single questions.")
    return lines


def _bold(table: Table) -> list[str]:
    """What the groups are and what bold is, where a group has rows to compare."""
    count = sum(len(by) for row in table.rows for by in row.evidence.best.values())
    tested = f"p < {ALPHA:g} against each of them, after Holm over {count} best scores"
    bold = [f"Bold: higher than all others of its group, same questions, {tested}."] if count else []
    return ["Groups: rows whose T differ by a quarter at most.", *bold]


def _matched(row: Row) -> bool:
    return abs(row.tokens.mean - (row.evidence.nearest or 0.0)) <= 0.1 * row.tokens.mean


def _detectable(table: Table, task: str) -> str:
    score = table.columns[task][0]
    verdicts = [row.evidence.against["dense"].get(task, {}).get(score.key) for row in table.rows]
    found = [v.comparison.detectable for v in verdicts if v and v.comparison.detectable is not None]
    return number(statistics.median(found), score.maximum) if found else ""


def _lacks(table: Table, task: str, score: ScoreRecord) -> bool:
    return any(task in row.scores and score.key not in row.evidence.scores.get(task, {}) for row in table.rows)


def _over_seeds(table: Table) -> str:
    counts = sorted({row.retained.n for row in table.rows if row.retained} - {1})
    return f", ± standard deviation over {' or '.join(map(str, counts))} seeds" if counts else ""


def _headline(table: Table, row: Row, task: str) -> float:
    return row.scores[task][table.columns[task][0].key].mean


def origin(table: Table) -> str:
    """Model, machine and versions in one line."""
    model, versions = table.facts["environment"]["model"], table.facts["environment"]["versions"]
    named = ("visibench", "lmms-eval", "transformers", "torch")
    packages = ", ".join(f"{name} {versions[name]}" for name in named if name in versions)
    return (
        f"Model {table.facts['model']}: {model.get('dtype')}, {model.get('attention')} attention, "
        f"{model.get('image_processor')}, {model.get('device')} ({model.get('hardware')}, "
        f"{model.get('threads')} threads); {packages}."
    )
