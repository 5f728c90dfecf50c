"""What a table shows, in plain words made from its numbers. Nothing is called better or worse that no test shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ..statistics.inference import ALPHA, DENSE, Contrast, Verdict
from ..store.records import CONTROL
from .columns.costs import compute_unit
from .tables import MethodRow, ResultTable
from .titles import task_title

_REFERENCES = {"dense": "dense", "random": "random tokens", "control": "random tokens at its own layers and counts"}


def lead(table: ResultTable) -> list[str]:
    """What was run, and the cheapest row that is on no task shown to be below the dense model."""
    return [_scope(table), *_cheapest(table)]


def by_group(table: ResultTable) -> list[tuple[str, str]]:
    """For each group of rows of similar T, its title and what it shows; nothing without a dense row."""
    if not any(row.method == DENSE for row in table.rows):
        return []
    return [(title, _group(table, rows)) for title, rows in table.grouped() if title]


def _scope(table: ResultTable) -> str:
    pruned = [row for row in table.rows if row.method not in (DENSE, CONTROL)]
    dense = next((row for row in table.rows if row.method == DENSE), None)
    number = sum(questions.asked for questions in table.questions.values())
    subset = ", a subset, so these are no full-set scores" if table.is_subset else ""
    what = f"{_counted(len(pruned), 'setting')} of {_counted(len({row.method for row in pruned}), 'method')}"
    where = (
        f"{table.facts['model']}, {_counted(number, 'question')} of {_counted(len(table.questions), 'task')}{subset}"
    )
    if dense is None:
        return f"{what} on {where}; the dense model was not run, so no share of its scores can be given."
    return f"{what} on {where}, compared with the dense model at {_cost(table, dense)}."


def _cheapest(table: ResultTable) -> list[str]:
    """Rows are compared on the headline metrics of all tasks; one that lacks a comparison cannot be the answer.

    Nor can a control, which runs its method as well.
    """
    if not any(row.method == DENSE for row in table.rows):
        return []
    settings = [row for row in table.rows if row.method != CONTROL]
    compared = [row for row in settings if len(_signs(table, row, "dense")) == len(table.questions)]
    if not compared:
        return ["No setting could be compared with the dense model on every task."]
    not_below = [row for row in compared if -1 not in _signs(table, row, "dense").values()]
    if not not_below:
        return [f"Each of the {len(compared)} settings compared is shown to score below dense on at least one task."]
    row = min(not_below, key=lambda row: row.macs)
    least = f"The setting of least compute that is shown below dense on no task is {_named(table, row)}, which keeps"
    return [
        f"{least} {_retained(row)} at {_cost(table, row)}.{_below_alone(table, row)} Not shown is not the same as "
        "equal: the notes of the table say which differences this many questions can show."
    ]


def _below_alone(table: ResultTable, row: MethodRow) -> str:
    """Where a test by itself, without the adjustment for the others, puts the row below dense."""
    contrasts = _contrasts(table, row, "dense").items()
    tasks = [task_title(task) for task, contrast in contrasts if contrast.verdict == Verdict.LOWER_ALONE]
    return f" Tests by themselves, not adjusted for their number, put it below on {', '.join(tasks)}." * bool(tasks)


def _group(table: ResultTable, rows: Sequence[MethodRow]) -> str:
    known = [row for row in rows if row.retained is not None and row.method != CONTROL]
    if not known:
        return "No row has all the scores that a share of the dense scores needs."
    first = max(known, key=lambda row: row.retained.mean if row.retained else 0.0)
    most = f", the highest figure of {len(known)} rows" if len(known) > 1 else ""
    parts = [f"{_named(table, first)} keeps {_retained(first)} at {_cost(table, first)}{most}."]
    for reference, words in _REFERENCES.items():
        signs = _signs(table, first, reference)
        shown = [
            f"{direction} {words} on {', '.join(tasks)}"
            for sign, direction in ((1, "above"), (-1, "below"))
            if (tasks := [task_title(task) for task, other in signs.items() if other == sign])
        ]
        not_shown = [task_title(task) for task, sign in signs.items() if sign == 0]
        parts += [f"It is shown {' and '.join(shown)}."] * bool(shown)
        parts += [f"No difference from {words} is shown on {', '.join(not_shown)}."] * bool(not_shown)
    return " ".join([*parts, _best(table, rows)]).strip()


def _best(table: ResultTable, rows: Sequence[MethodRow]) -> str:
    """Who is shown to be best of a group, by task; nobody is called so for a higher number alone."""
    if len(rows) < 2:
        return ""
    best = []
    for task, (score, *_) in table.metrics.items():
        shown = [row for row in rows if row.evidence.best.get(task, {}).get(score.key, 1) < ALPHA]
        best += [f"{_named(table, row)} on {task_title(task)}" for row in shown]
    return f"Shown best of all: {', '.join(best)}." if best else "No row is shown to be the best on any task."


def verdicts(table: ResultTable) -> str:
    """How many rows × tasks are shown above, below, or not to differ from dense; empty without any."""
    signs = Counter(sign for row in table.rows for sign in _signs(table, row, "dense").values())
    if not signs:
        return ""
    return (
        f"Of {signs.total()} comparisons with dense (settings × tasks, headline scores), {signs[-1]} show a lower "
        f"score, {signs[1]} a higher one, and {signs[0]} no difference."
    )


def _signs(table: ResultTable, row: MethodRow, reference: str) -> dict[str, int]:
    """How the row's headline scores compare: 1 shown higher, -1 shown lower, 0 no difference shown."""
    return {task: contrast.sign for task, contrast in _contrasts(table, row, reference).items()}


def _contrasts(table: ResultTable, row: MethodRow, reference: str) -> dict[str, Contrast]:
    """The row's headline scores against the reference, where they can be compared."""
    against = row.evidence.against.get(reference, {})
    return {
        task: contrast
        for task, (score, *_) in table.metrics.items()
        if (contrast := against.get(task, {}).get(score.key)) is not None
    }


def _named(table: ResultTable, row: MethodRow) -> str:
    return table.titles[row.label]


def _retained(row: MethodRow) -> str:
    if row.retained is None:
        return "an unknown share of the dense scores"
    interval = row.evidence.retained
    known = interval is not None and interval.half_width == interval.half_width
    spread = f" (95 % interval {100 * interval.low:.1f} to {100 * interval.high:.1f})" if interval and known else ""
    return f"{row.retained.mean:.1f} % of the dense scores{spread}"


def _cost(table: ResultTable, row: MethodRow) -> str:
    unit, name = compute_unit(table)
    return f"T = {row.tokens.mean:.1f} visual tokens and {row.macs / unit:#.3g} {name}"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
