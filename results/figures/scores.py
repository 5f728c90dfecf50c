"""Scores against what they cost, a panel a task: the front of those that no other beats, and a line a method."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ...errors import DataError
from ..statistics.inference import DENSE, RANDOM
from ..statistics.intervals import Estimate
from ..store.records import CONTROL, ScoreRecord
from ..tables.columns.costs import compute_unit
from ..tables.notes import origin, questions
from ..tables.tables import MethodRow, ResultTable
from .captions import counted, timed
from .series import Series, series
from .style import COLOURS, LINES, SCREEN, Look, caption, grid

_MARKERS = "osD^vPX<>hp"  # as many as share no divisor with the colours: 66 pairs


@dataclass(frozen=True)
class ScorePoint:
    """A row in a plane of cost and score. ``low`` and ``high``: its bar's ends, nan where there is none."""

    row: MethodRow
    x: float
    y: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class ScorePanel:
    """One task's points: a score in the unit of ``axis``."""

    title: str
    axis: str
    points: list[ScorePoint]


def against_compute(table: ResultTable, look: Look = SCREEN) -> Figure:
    """Scores against executed multiply-adds."""
    unit, name = compute_unit(table)
    return _plane(table, f"compute of a prefill, {name}", lambda row: row.macs / unit, counted(table), look)


def against_prefill(table: ResultTable, look: Look = SCREEN) -> Figure:
    """Scores against measured prefill times. Raises :class:`DataError` where nothing was timed."""
    if not any(row.prefill for row in table.rows):
        raise DataError("nothing was timed: run the sweep with timing, such as timing: {repeats: 20}")
    return _plane(table, "prefill, median ms", prefill_ms, timed(table), look)


def prefill_ms(row: MethodRow) -> float:
    """A row's median prefill time; nan where it was not timed."""
    return row.prefill.median if row.prefill else math.nan


def point_figures(table: ResultTable, name: str, cost: Callable[[MethodRow], float]) -> list[dict[str, Any]]:
    """The numbers of all panels, the cost under ``name``."""
    return [
        {"panel": p.title, "unit": p.axis, "method": q.row.label, name: q.x, "score": q.y, "low": q.low, "high": q.high}
        for p in panels_of(table, cost)
        for q in p.points
    ]


def _plane(table: ResultTable, axis: str, cost: Callable[[MethodRow], float], note: str, look: Look) -> Figure:
    """One panel a task, and one for the share of the dense scores that is retained over all of them."""
    panels = [panel for panel in panels_of(table, cost) if panel.points]
    if not panels:
        raise DataError("no row has both a score and a cost: nothing to plot")
    groups = series(table.rows)
    size = (4.2, 3.4) if len(panels) == 1 else (3.2, 2.7)
    figure, places = grid(len(panels), 3, size, look, beside=2.4, least=0.22 * (len(groups) + 1))
    for place, panel in zip(places, panels, strict=True):
        best, most = front(panel.points), max(p.x for p in panel.points)
        place.plot([*(p.x for p in best), most], [*(p.y for p in best), best[-1].y], **_FRONT, zorder=1)
        for index, group in enumerate(groups):
            _trace(place, [p for p in panel.points if any(p.row is row for row in group.rows)], _look(groups, index))
        place.set(title=look.task(panel.title), xlabel=look.axis(axis), ylabel=look.axis(panel.axis))
        place.margins(0.08)
    handles = [Line2D([], [], **_look(groups, index)) for index in range(len(groups))]
    for handle, group in zip(handles, groups, strict=True):
        handle.set_label(look.method(str(handle.get_label()), group.method, group.rows[0].title))
    where: dict[str, Any] = {"loc": "outside right upper", "handlelength": 3}
    if look.width is not None:
        where = {"loc": "outside upper center", "ncols": max(int(look.width / 1.4), 1), "handlelength": 2}
    figure.legend(handles=[*handles, Line2D([], [], **_FRONT)], **where)
    caption(figure, [questions(table), _bars(table, panels), note, origin(table)], look)
    return figure


_FRONT: dict[str, Any] = {
    "label": "Pareto front", "color": "#999999", "linewidth": 0.9, "drawstyle": "steps-post"
}  # fmt: skip


def _trace(place: Axes, points: Sequence[ScorePoint], look: dict[str, Any]) -> None:
    """A method's points, their bars, and a thin line from budget to budget."""
    points = sorted(points, key=lambda point: point.x)
    xs = [point.x for point in points]
    ends = [p.low for p in points], [p.high for p in points]
    # Random is drawn broad behind the methods, which often share its budgets and so its place.
    broad = bool(points) and points[0].row.method == RANDOM
    place.vlines(xs, *ends, color=look["color"], linewidth=3 if broad else 1, alpha=0.6)
    place.plot(xs, [point.y for point in points], **look)


def panels_of(table: ResultTable, cost: Callable[[MethodRow], float]) -> list[ScorePanel]:
    """The points of each task's headline metric, then those of the mean retained if there are several tasks."""
    panels = []
    for task, (score, *_) in table.metrics.items():
        scale = 100 if score.maximum == 1 else 1
        points = [
            _point(row, cost(row), scale * row.scores[task][score.key].mean, _interval(row, task, score), scale)
            for row in table.rows
            if score.key in row.scores.get(task, {})
        ]
        panels.append(ScorePanel(task, f"{score.title}, {_unit(score)}", _finite(points)))
    if len(panels) > 1:
        kept = [(row, row.retained) for row in table.rows if row.retained]
        points = [_point(row, cost(row), quantity.mean, row.evidence.retained, 100) for row, quantity in kept]
        panels.append(ScorePanel(f"mean over {len(panels)} tasks", "score retained, % of dense", _finite(points)))
    return panels


def front(points: Iterable[ScorePoint]) -> list[ScorePoint]:
    """Those that no other beats, the cheapest first: each scores more than all that cost as much or less."""
    best: list[ScorePoint] = []
    for point in sorted(points, key=lambda point: (point.x, -point.y)):
        if not best or point.y > best[-1].y:
            best.append(point)
    return best


def _interval(row: MethodRow, task: str, score: ScoreRecord) -> Estimate | None:
    return row.evidence.scores.get(task, {}).get(score.key)


def _point(row: MethodRow, x: float, y: float, interval: Estimate | None, scale: float) -> ScorePoint:
    """``y`` with the 95 % interval, which is still to be multiplied by ``scale``."""
    low, high = (interval.low, interval.high) if interval else (math.nan, math.nan)
    return ScorePoint(row, x, y, scale * low, scale * high)


def _unit(score: ScoreRecord) -> str:
    return "unit unknown" if score.maximum is None else "%" if score.maximum == 1 else f"of {score.maximum:g}"


def _finite(points: list[ScorePoint]) -> list[ScorePoint]:
    return [point for point in points if math.isfinite(point.x) and math.isfinite(point.y)]


def _look(groups: Sequence[Series], index: int) -> dict[str, Any]:
    """Colour, marker and line of a series; dense and random look alike in every figure, a control as its method."""
    fixed = {
        DENSE: {"color": "black", "marker": "*", "markersize": 10, "linestyle": "none"},
        RANDOM: {"color": "#777777", "marker": "x", "linestyle": LINES[2]},
    }
    group, turn = groups[index], sum(other.method not in (*fixed, CONTROL) for other in groups[:index])
    partner = [place for place, other in enumerate(groups) if group.label == f"{CONTROL} of {other.label}"]
    if group.method == CONTROL and partner:
        hollow = {"label": group.label, "markerfacecolor": "white", "linestyle": LINES[2]}
        return _look(groups, partner[0]) | hollow
    # A legend leaves out labels that begin with an underscore.
    label = f" {group.label}" if group.label.startswith("_") else group.label
    return {"label": label, "linewidth": 1, "markersize": 5.5} | fixed.get(
        group.method,
        {
            "color": COLOURS[turn % len(COLOURS)],
            "marker": _MARKERS[turn % len(_MARKERS)],
            "markerfacecolor": "white" if turn // len(_MARKERS) % 2 else COLOURS[turn % len(COLOURS)],
            "linestyle": LINES[turn % len(LINES)],
        },
    )


def _bars(table: ResultTable, panels: Sequence[ScorePanel]) -> str:
    """What the points and bars are, and what has none."""
    seeds = sorted({len(row.seeds) for row in table.rows} - {1})
    counts = ", ".join(f"{name} {n}" for name, n in sorted(_images(table).items()))
    parts = [f"Bars: 95 % interval clustered by image ({counts} images)."] if counts else []
    parts += [f"Points: mean over {' or '.join(map(str, seeds))} seeds where there are several."] if seeds else []
    # What is retained is relative to the dense model, which therefore has no interval there.
    bare = [p.title for p in panels if any(math.isnan(q.low) for q in p.points if q.row.method != DENSE)]
    parts += [f"No bar where no interval is known: {', '.join(bare)}."] if bare else []
    return " ".join([*parts, "The Pareto front takes scores as they are."])


def _images(table: ResultTable) -> dict[str, int]:
    return {task: e.images for row in table.rows for task, by in row.evidence.scores.items() for e in by.values()}
