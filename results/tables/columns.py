"""Columns of a table: what each shows of a row, and the figures behind it.

Beside the names here, ``TASK:METRIC`` names a score and ``TASK`` all scores of a task.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ...errors import OptionError, suggest
from ..statistics.inference import ALPHA, Contrast, mean_of
from ..statistics.intervals import Estimate
from ..store.records import ScoreRecord
from .tables import Row, Table

SIDES = 1.25
"""How many times the other one side of an interval may be for ± to stand for both."""
GROUPS = {"A": "lost when smaller", "B": "right when smaller"}
"""Groups of difficulty, by what a smaller image does to what the dense model answers right."""
_UNITS = ((1e12, "TFLOPs"), (1e9, "GFLOPs"), (1e6, "MFLOPs"))


@dataclass(frozen=True)
class Shown:
    """An entry of a table. ``spread``: what follows the value, such as ``± 3.1`` or, of unequal sides, ``+0.9 −4.4``.

    ``sd``: a standard deviation, over seeds or questions; ``marks``: ``↑d`` and the like; ``best``: shown to be the
    best of its budget.
    """

    value: str
    spread: str = ""
    sd: str = ""
    marks: tuple[str, ...] = ()
    best: bool = False

    @property
    def behind(self) -> list[str]:
        """What follows the value: its spread, and in brackets its standard deviation."""
        return [self.spread] * bool(self.spread) + [f"(sd {self.sd})"] * bool(self.sd)

    def text(self, bold: str) -> str:
        """The entry in one line; ``bold`` with the value in place of {} where it is the best."""
        return " ".join([bold.format(self.value) if self.best else self.value, *self.behind, *self.marks])


@dataclass(frozen=True)
class Column:
    """``title``: one or two lines. ``figures``: a row's figures with full precision, by their names in CSV.

    ``asked``: shown only where it is named.
    """

    name: str
    title: str
    show: Callable[[Row], Shown]
    figures: Callable[[Row], dict[str, Any]]
    asked: bool = False


def columns(table: Table) -> list[Column]:
    """The columns that a table has by itself, those of time only where something was timed."""
    return [column for column in every(table) if not column.asked]


def every(table: Table) -> list[Column]:
    """All columns that can be shown."""
    unit, name = compute_unit(table)
    found = [Column("method", "method", lambda row: Shown(row.label), _identity)]
    found += [_score_column(task, score) for task, scores in table.columns.items() for score in scores]
    found += [
        Column("retained", "retained\n%", _retained, _retained_figures),
        Column("loyalty", "loyalty\n%", lambda row: _estimate(row.evidence.loyalty_mean, 1.0), _loyalty_figures),
        Column("tokens", "visual\ntokens T", _tokens, _tokens_figures),
        Column("last", "at the\nlast layer", lambda row: Shown(f"{row.tokens.last:.1f}"), _last_figures),
        Column("compute", f"compute\n{name}", lambda row: _compute(row, unit), _compute_figures),
    ]
    if any(row.prefill for row in table.rows):
        found.append(Column("prefill", "prefill\nms", _prefill, _prefill_figures))
    found.append(Column("latency", "latency\nms (questions)", _latency, _latency_figures, asked=True))
    for name, which in GROUPS.items():
        show, figures = partial(_group, name=name), partial(_group_figures, name=name)
        found.append(Column(f"group_{name.lower()}", f"{name}: {which}\n% (questions)", show, figures, asked=True))
    return found


def choose(tables: Sequence[Table], names: Sequence[str] | None) -> list[list[Column]]:
    """The columns ``names`` of each table, in this order, by default those that it has by itself.

    Raises :class:`OptionError` for unknown ones.
    """
    if names is None:
        return [columns(table) for table in tables]
    found = [every(table) for table in tables]
    known = {alias for each in found for column in each for alias in _aliases(column)}
    for name in names:
        if not name:
            raise OptionError("a column has no name: give names, as in --columns method,gqa")
        if name not in known:
            raise OptionError(f"unknown column {name!r}; {suggest(name, known)}")
    return [[column for name in names for column in each if name in _aliases(column)] for each in found]


def compute_unit(table: Table) -> tuple[float, str]:
    """The unit in which this table's compute reads well: its size in MACs, and its name."""
    most = max(row.macs for row in table.rows)
    return next(((unit, name) for unit, name in _UNITS if most >= unit / 10), _UNITS[-1])


def number(value: float, maximum: float | None) -> str:
    """As percent if the maximum is 1, with four digits if it is not known."""
    return f"{value:.4g}" if maximum is None else f"{value * (100.0 if maximum == 1 else 1.0):.1f}"


def _aliases(column: Column) -> set[str]:
    return {column.name, column.name.partition(":")[0]}


def _score_column(task: str, score: ScoreRecord) -> Column:
    unit = "" if score.maximum is None else " %" if score.maximum == 1 else f" /{score.maximum:g}"
    return Column(
        f"{task}:{score.key}",
        f"{task}\n{score.title}{unit}",
        lambda row: _score(row, task, score),
        lambda row: _score_figures(row, task, score.key),
    )


def _score(row: Row, task: str, score: ScoreRecord) -> Shown:
    """Value ± half its interval, and how it compares with dense and random."""
    quantity = row.scores.get(task, {}).get(score.key)
    if quantity is None or math.isnan(quantity.mean):
        return Shown("–")
    interval = row.evidence.scores.get(task, {}).get(score.key)
    shown = _estimate(interval, score.maximum) if interval else Shown(number(quantity.mean, score.maximum))
    marks = [_mark(name, by.get(task, {}).get(score.key)) for name, by in row.evidence.against.items()]
    best = row.evidence.best.get(task, {}).get(score.key, 1.0) < ALPHA
    sd = number(quantity.sd, score.maximum) if quantity.sd is not None else ""
    return Shown(shown.value, shown.spread, sd, tuple(filter(None, marks)), best)


def _mark(name: str, verdict: Contrast | None) -> str:
    return {1: "↑", -1: "↓", 0: "="}[verdict.sign] + name[0] if verdict else ""


def _estimate(estimate: Estimate | None, maximum: float | None) -> Shown:
    if estimate is None:
        return Shown("–")
    return Shown(number(estimate.value, maximum), spread(estimate, lambda width: number(width, maximum)))


def spread(estimate: Estimate, spelled: Callable[[float], str]) -> str:
    """An interval as what it adds to the value and takes from it, in one figure where these are about the same."""
    below, above = estimate.value - estimate.low, estimate.high - estimate.value
    if math.isnan(below) or math.isnan(above):
        return ""
    below, above = max(below, 0.0), max(above, 0.0)  # at the end of a scale, rounding may put a limit behind the value
    if max(below, above) <= SIDES * min(below, above):
        return f"± {spelled((below + above) / 2)}"
    return f"+{spelled(above)} −{spelled(below)}"


def _retained(row: Row) -> Shown:
    if row.retained is None:
        return Shown("–")
    interval = row.evidence.retained
    behind = spread(interval, lambda width: f"{100 * width:.1f}") if interval else ""
    return Shown(f"{row.retained.mean:.1f}", behind, f"{row.retained.sd:.1f}" if row.retained.sd is not None else "")


def _group(row: Row, name: str) -> Shown:
    """Mean over the tasks that have such questions, and in brackets how many there are."""
    found = [groups[name] for groups in row.evidence.groups.values() if name in groups]
    if not found:
        return Shown("–")
    shown = _estimate(mean_of(found), 1.0)
    return Shown(f"{shown.value} ({sum(e.questions for e in found)})", shown.spread)


def _tokens(row: Row) -> Shown:
    return Shown(f"{row.tokens.mean:.1f}", sd=f"{row.evidence.spread.tokens:.1f}" if row.evidence.spread else "")


def _compute(row: Row, unit: float) -> Shown:
    sd = f"{row.evidence.spread.macs / unit:#.2g}" if row.evidence.spread else ""
    return Shown(f"{row.macs / unit:#.3g}", sd=sd)


def _prefill(row: Row) -> Shown:
    return Shown(f"{row.prefill.median:.1f}", f"± {row.prefill.iqr:.1f}") if row.prefill else Shown("–")


def _latency(row: Row) -> Shown:
    found = row.latency
    return Shown(f"{found.median:.1f} ({found.questions})") if found else Shown("–")


# ---- figures for CSV ----------------------------------------------------------------------------------------------


def _identity(row: Row) -> dict[str, Any]:
    return {"method": row.label, "budget": row.evidence.budget, "seeds": len(row.seeds)}


def _score_figures(row: Row, task: str, key: str) -> dict[str, Any]:
    quantity, interval = row.scores.get(task, {}).get(key), row.evidence.scores.get(task, {}).get(key)
    verdicts = {name: by.get(task, {}).get(key) for name, by in row.evidence.against.items()}
    return {
        f"{task}:{key}": quantity.mean if quantity else None,
        f"{task}:{key}:sd": quantity.sd if quantity else None,
        f"{task}:{key}:low": interval.low if interval else None,
        f"{task}:{key}:high": interval.high if interval else None,
        f"{task}:{key}:questions": interval.questions if interval else None,
        f"{task}:{key}:images": interval.images if interval else None,
        f"{task}:{key}:p_best": row.evidence.best.get(task, {}).get(key),
        **{f"{task}:{key}:p_{name}": verdict.p_holm if verdict else None for name, verdict in verdicts.items()},
    }


def _retained_figures(row: Row) -> dict[str, Any]:
    interval = row.evidence.retained
    return {
        "retained_percent": row.retained.mean if row.retained else None,
        "retained_percent_sd": row.retained.sd if row.retained else None,
        "retained_percent_low": 100 * interval.low if interval else None,
        "retained_percent_high": 100 * interval.high if interval else None,
    }


def _group_figures(row: Row, name: str) -> dict[str, Any]:
    found = {task: groups.get(name) for task, groups in row.evidence.groups.items()}
    return {
        f"{task}:group_{name.lower()}{key}": value(estimate) if estimate else None
        for task, estimate in found.items()
        for key, value in _OF_GROUPS.items()
    }


_OF_GROUPS: dict[str, Callable[[Estimate], float]] = {
    "": lambda estimate: estimate.value,
    ":low": lambda estimate: estimate.low,
    ":high": lambda estimate: estimate.high,
    ":questions": lambda estimate: estimate.questions,
}


def _loyalty_figures(row: Row) -> dict[str, Any]:
    loyalty = row.evidence.loyalty_mean
    return {
        "loyalty_percent": 100 * loyalty.value if loyalty else None,
        "loyalty_percent_low": 100 * loyalty.low if loyalty else None,
        "loyalty_percent_high": 100 * loyalty.high if loyalty else None,
    }


def _tokens_figures(row: Row) -> dict[str, Any]:
    spread = row.evidence.spread
    return {"visual_tokens_mean": row.tokens.mean, "visual_tokens_mean_sd": spread.tokens if spread else None}


def _last_figures(row: Row) -> dict[str, Any]:
    return {"visual_tokens_last": row.tokens.last}


def _compute_figures(row: Row) -> dict[str, Any]:
    spread = row.evidence.spread
    return {"executed_tflops": row.macs * 1e-12, "executed_tflops_sd": spread.macs * 1e-12 if spread else None}


def _prefill_figures(row: Row) -> dict[str, Any]:
    return {
        "prefill_ms_median": row.prefill.median if row.prefill else None,
        "prefill_ms_iqr": row.prefill.iqr if row.prefill else None,
    }


def _latency_figures(row: Row) -> dict[str, Any]:
    found = row.latency
    return {
        "latency_ms_median": found.median if found else None,
        "latency_questions": found.questions if found else None,
        "latency_batch_questions_median": found.batch if found else None,
    }
