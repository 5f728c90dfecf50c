"""Figures of a table: scores against compute and time, visual tokens by decoder layer, compute by component.

Told apart by shape and line style as well as colour, in the palette of Okabe and Ito (2008). The same table gives the
same file, byte for byte.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ...errors import DataError, OptionError, suggest
from ..statistics.inference import DENSE, RANDOM
from ..statistics.intervals import Estimate
from ..store.records import ScoreRecord
from ..tables.columns import compute_unit
from ..tables.notes import origin
from ..tables.tables import Row, Table
from .series import Series, series

FORMATS = ("png", "svg")
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "osD^vPX<>hp"  # as many as share no divisor with the colours: 66 pairs
_LINES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
# Title, colour and hatch of each component of compute; the lightest lie between the darkest.
_COMPONENTS = {
    "vision_tower": ("vision tower", "#0072B2", ""),
    "projector": ("projector", "#F0E442", "xxxx"),
    "projections": ("Q, K, V, O projections", "#56B4E9", "////"),
    "ffn": ("FFN", "#D55E00", ""),
    "attention": ("attention", "#E69F00", "...."),
    "lm_head": ("LM head", "#009E73", "\\\\\\\\"),
    "scoring": ("scoring by the method", "#000000", ""),
}
_STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
    "svg.hashsalt": "visibench",
    "text.parse_math": False,  # a label may hold a $
}


@dataclass(frozen=True)
class Point:
    """A row in a plane of cost and score. ``low`` and ``high``: its bar's ends, nan where there is none."""

    row: Row
    x: float
    y: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Panel:
    """One task's points: a score in the unit of ``axis``."""

    title: str
    axis: str
    points: list[Point]


def draw(table: Table, kind: str) -> Figure:
    """The figure ``kind`` (one of :data:`KINDS`). Raises :class:`DataError` if the table does not hold its numbers."""
    if kind not in KINDS:
        raise OptionError(f"unknown kind of plot {kind!r}; {suggest(kind, KINDS)}")
    with styled():
        return KINDS[kind](table)


def styled() -> AbstractContextManager[None]:
    """Within: figures are drawn and written in the style of this module."""
    return matplotlib.style.context(["default", _STYLE])


def save(figure: Figure, file: Path) -> None:
    """Write the figure as PNG or SVG, by the file's name, without a date."""
    form = file.suffix[1:].lower()
    if form not in FORMATS:
        raise OptionError(f"cannot write {str(file)!r}: its name must end in .png or .svg")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with styled():
            figure.savefig(file, format=form, dpi=200, metadata={"Date": None} if form == "svg" else None)
    except OSError as error:
        raise DataError(f"cannot write {file}: {error.strerror or error}") from error


# ---- scores against cost ------------------------------------------------------------------------------------------


def _pareto(table: Table) -> Figure:
    unit, name = compute_unit(table)
    return _plane(table, f"compute of a prefill, {name}", lambda row: row.macs / unit, _counted(table))


def _latency(table: Table) -> Figure:
    if not any(row.prefill for row in table.rows):
        raise DataError("nothing was timed: run the sweep with timing, such as timing: {repeats: 20}")
    return _plane(
        table, "prefill, median ms", lambda row: row.prefill.median if row.prefill else math.nan, _timed(table)
    )


def _plane(table: Table, axis: str, cost: Callable[[Row], float], note: str) -> Figure:
    """One panel a task, and one for the share of the dense scores that is retained over all of them."""
    panels = [panel for panel in panels_of(table, cost) if panel.points]
    if not panels:
        raise DataError("no row has both a score and a cost: nothing to plot")
    groups = series(table.rows)
    size = (4.2, 3.4) if len(panels) == 1 else (3.2, 2.7)
    figure, places = grid(len(panels), most=3, size=size, beside=2.4, least=0.22 * (len(groups) + 1))
    for place, panel in zip(places, panels, strict=True):
        best, most = front(panel.points), max(p.x for p in panel.points)
        place.plot([*(p.x for p in best), most], [*(p.y for p in best), best[-1].y], **_FRONT, zorder=1)
        for number, group in enumerate(groups):
            _trace(place, [p for p in panel.points if any(p.row is row for row in group.rows)], _look(groups, number))
        place.set(title=panel.title, xlabel=axis, ylabel=panel.axis)
        place.margins(0.08)
    handles = [Line2D([], [], **_look(groups, number)) for number in range(len(groups))]
    figure.legend(handles=[*handles, Line2D([], [], **_FRONT)], loc="outside right upper", handlelength=3)
    caption(figure, [_questions(table), _bars(table, panels), note, origin(table)])
    return figure


_FRONT: dict[str, Any] = {
    "label": "Pareto front", "color": "#F0E442", "linewidth": 4.5, "drawstyle": "steps-post", "solid_capstyle": "round"
}  # fmt: skip


def _trace(place: Axes, points: Sequence[Point], look: dict[str, Any]) -> None:
    """A method's points, their bars, and a thin line from budget to budget."""
    points = sorted(points, key=lambda point: point.x)
    xs = [point.x for point in points]
    ends = [p.low for p in points], [p.high for p in points]
    # Random is drawn broad behind the methods, which often share its budgets and so its place.
    broad = bool(points) and points[0].row.method == RANDOM
    place.vlines(xs, *ends, color=look["color"], linewidth=3 if broad else 1, alpha=0.6)
    place.plot(xs, [point.y for point in points], **look)


def panels_of(table: Table, cost: Callable[[Row], float]) -> list[Panel]:
    """The points of each task's headline metric, then those of the mean retained if there are several tasks."""
    panels = []
    for task, (score, *_) in table.columns.items():
        scale = 100 if score.maximum == 1 else 1
        points = [
            _point(row, cost(row), scale * row.scores[task][score.key].mean, _interval(row, task, score), scale)
            for row in table.rows
            if score.key in row.scores.get(task, {})
        ]
        panels.append(Panel(task, f"{score.title}, {_unit(score)}", _finite(points)))
    if len(panels) > 1:
        kept = [(row, row.retained) for row in table.rows if row.retained]
        points = [_point(row, cost(row), quantity.mean, row.evidence.retained, 100) for row, quantity in kept]
        panels.append(Panel(f"mean over {len(panels)} tasks", "score retained, % of dense", _finite(points)))
    return panels


def front(points: Iterable[Point]) -> list[Point]:
    """Those that no other beats, the cheapest first: each scores more than all that cost as much or less."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, -point.y)):
        if not best or point.y > best[-1].y:
            best.append(point)
    return best


def _interval(row: Row, task: str, score: ScoreRecord) -> Estimate | None:
    return row.evidence.scores.get(task, {}).get(score.key)


def _point(row: Row, x: float, y: float, interval: Estimate | None, scale: float) -> Point:
    """``y`` with the 95 % interval, which is still to be multiplied by ``scale``."""
    low, high = (interval.low, interval.high) if interval else (math.nan, math.nan)
    return Point(row, x, y, scale * low, scale * high)


def _unit(score: ScoreRecord) -> str:
    return "unit unknown" if score.maximum is None else "%" if score.maximum == 1 else f"of {score.maximum:g}"


def _finite(points: list[Point]) -> list[Point]:
    return [point for point in points if math.isfinite(point.x) and math.isfinite(point.y)]


def _look(groups: Sequence[Series], number: int) -> dict[str, Any]:
    """Colour, marker and line of a series; dense and random look alike in every figure."""
    fixed = {
        DENSE: {"color": "black", "marker": "*", "markersize": 10, "linestyle": "none"},
        RANDOM: {"color": "#777777", "marker": "x", "linestyle": _LINES[2]},
    }
    group, own = groups[number], sum(other.method not in fixed for other in groups[:number])
    # A legend leaves out labels that begin with an underscore.
    label = f" {group.label}" if group.label.startswith("_") else group.label
    return {"label": label, "linewidth": 1, "markersize": 5.5} | fixed.get(
        group.method,
        {
            "color": _COLOURS[own % len(_COLOURS)],
            "marker": _MARKERS[own % len(_MARKERS)],
            "markerfacecolor": "white" if own // len(_MARKERS) % 2 else _COLOURS[own % len(_COLOURS)],
            "linestyle": _LINES[own % len(_LINES)],
        },
    )


# ---- visual tokens by layer ---------------------------------------------------------------------------------------


def _tokens(table: Table) -> Figure:
    """One panel a method, its budgets labelled where their lines end; the dense model's line in all of them."""
    dense = next((row for row in table.rows if row.method == DENSE), None)
    groups = [group for group in series(table.rows) if group.method != DENSE] or series(table.rows)
    figure, places = grid(len(groups), most=3, size=(3.4, 2.1))
    most = max(max(row.tokens.per_layer) for row in table.rows)
    for place, group in zip(places, groups, strict=True):
        if dense is not None and dense not in group.rows:
            _staircase(place, dense, color="#AAAAAA", linestyle=_LINES[2], label="dense")
        ends = _apart([row.tokens.last for row in group.rows], 0.11 * most)
        for number, (row, name, end) in enumerate(zip(group.rows, group.names, ends, strict=True)):
            look = {"color": _COLOURS[number % len(_COLOURS)], "linestyle": _LINES[number % len(_LINES)]}
            _staircase(place, row, **look, label=row.label)
            said = f"{name} (T {row.tokens.mean:.1f})" if name else f"T {row.tokens.mean:.1f}"
            text = "\n".join(textwrap.wrap(said, 30))
            place.annotate(
                text, (1.02, end), xycoords=("axes fraction", "data"), **SMALL, va="center", color=look["color"]
            )
        place.set(
            title=wrap(group.label, 40),
            xlabel="decoder layer",
            ylabel="visual tokens",
            ylim=(-0.04 * most, 1.06 * most),
        )
        place.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    dotted = "Dotted grey: the dense model. " if dense is not None else ""
    caption(
        figure,
        [
            f"{dotted}At the input of each decoder layer, mean over questions and tasks; T: mean over layers.",
            _questions(table),
            origin(table),
        ],
    )
    return figure


def _staircase(place: Axes, row: Row, **look: Any) -> None:
    counts = row.tokens.per_layer
    place.plot(range(len(counts)), counts, drawstyle="steps-mid", linewidth=1.6, **look)


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """The heights moved up as little as keeps ``gap`` between them, in their order."""
    moved, last = dict.fromkeys(range(len(heights)), 0.0), -math.inf
    for place in sorted(range(len(heights)), key=lambda i: heights[i]):
        moved[place] = last = max(heights[place], last + gap)
    return list(moved.values())


# ---- compute by component -----------------------------------------------------------------------------------------


def _stages(table: Table) -> Figure:
    """A bar for each row, in its components; beside it, where something was timed, the prefill's time."""
    unit, name = compute_unit(table)
    timed = any(row.prefill for row in table.rows)
    labels = [wrap("dense" if row.label == DENSE else row.label.replace(",", ", "), 34) for row in table.rows]
    lines = sum(1 + 0.5 * label.count("\n") for label in labels)
    figure = Figure(figsize=(9.6 if timed else 6.8, 2.2 + 0.3 * lines), layout="constrained")
    places = figure.subplots(1, 1 + timed, sharey=True, squeeze=False, width_ratios=[3, 2][: 1 + timed])[0]
    heights, ends = np.arange(len(labels)), np.zeros(len(labels))
    for part in dict.fromkeys(part for row in table.rows for part in row.components):
        title, colour, hatch = _COMPONENTS.get(part, (part, "#BBBBBB", "++++"))
        sizes = np.array([row.components.get(part, 0.0) / unit for row in table.rows])
        if sizes.any():
            bars: dict[str, Any] = {"color": colour, "hatch": hatch, "edgecolor": "white" if not hatch else "black"}
            places[0].barh(heights, sizes, left=ends, height=0.7, linewidth=0.4, label=title, **bars)
        ends += sizes
    for height, row in zip(heights, table.rows, strict=True):
        places[0].annotate(f"{row.macs / unit:#.3g}", (ends[height], height), **BESIDE, **SMALL)
    places[0].set(yticks=heights, yticklabels=labels, xlabel=f"compute of a prefill, {name}")
    places[0].set(xlim=(0, 1.14 * ends.max()), ylim=(len(labels) - 0.4, -0.6))
    if timed:
        _times(places[1], table.rows)
    for place in places:
        place.grid(axis="y", visible=False)
    figure.legend(loc="outside upper center", ncols=4)
    caption(figure, [_questions(table), _counted(table), _timed(table), origin(table)])
    return figure


def _times(place: Axes, rows: Sequence[Row]) -> None:
    for height, row in enumerate(rows):
        if row.prefill is None:
            place.annotate("not timed", (0, height), **BESIDE, **SMALL)
            continue
        place.barh(height, row.prefill.median, height=0.7, color="#CCCCCC")
        place.hlines(height, row.prefill.lower, row.prefill.upper, color="black", linewidth=1.2)
        place.annotate(
            f"{row.prefill.median:.1f}", (max(row.prefill.upper, row.prefill.median), height), **BESIDE, **SMALL
        )
    most = max(max(row.prefill.upper, row.prefill.median) for row in rows if row.prefill)
    place.set(xlabel="prefill, median and quartiles, ms", xlim=(0, 1.2 * most))


# ---- layout and captions ------------------------------------------------------------------------------------------

KINDS: dict[str, Callable[[Table], Figure]] = {
    "pareto": _pareto, "latency": _latency, "tokens": _tokens, "stages": _stages
}  # fmt: skip
SMALL: dict[str, Any] = {"fontsize": 7.5}
BESIDE: dict[str, Any] = {"xytext": (3, 0), "textcoords": "offset points", "va": "center"}


def grid(
    count: int, most: int, size: tuple[float, float], beside: float = 0.0, least: float = 0.0
) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` places of ``size`` inches, ``most`` a row, room ``beside``, and ``least`` high."""
    columns = min(count, most)
    rows = -(-count // columns)
    figure = Figure(
        figsize=(max(columns * size[0] + beside, 5.6), max(rows * size[1], least) + 1.0), layout="constrained"
    )
    places = figure.subplots(rows, columns, squeeze=False).ravel()
    for place in places[count:]:
        place.remove()
    return figure, list(places[:count])


def caption(figure: Figure, parts: Iterable[str]) -> None:
    """Notes below the figure, as wide as it is."""
    lines = [line for part in parts if part for line in textwrap.wrap(part, int(15.5 * figure.get_figwidth()))]
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=7.5, color="#333333")


def wrap(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width, break_on_hyphens=False)) or "–"


def _questions(table: Table) -> str:
    asked = ", ".join(f"{task} {q.asked} of {q.of} ({q.origin})" for task, q in table.questions.items())
    return f"Questions: {asked}.{' SUBSET: these are no full-set scores.' if table.is_subset else ''}"


def _bars(table: Table, panels: Sequence[Panel]) -> str:
    """What the points and bars are, and what has none."""
    seeds = sorted({len(row.seeds) for row in table.rows} - {1})
    counts = ", ".join(f"{name} {n}" for name, n in sorted(_images(table).items()))
    parts = [f"Bars: 95 % interval clustered by image ({counts} images)."] if counts else []
    parts += [f"Points: mean over {' or '.join(map(str, seeds))} seeds where there are several."] if seeds else []
    # What is retained is relative to the dense model, which therefore has no interval there.
    bare = [p.title for p in panels if any(math.isnan(q.low) for q in p.points if q.row.method != DENSE)]
    parts += [f"No bar where no interval is known: {', '.join(bare)}."] if bare else []
    return " ".join([*parts, "The Pareto front takes scores as they are."])


def _images(table: Table) -> dict[str, int]:
    return {task: e.images for row in table.rows for task, by in row.evidence.scores.items() for e in by.values()}


def _counted(table: Table) -> str:
    over = f" and {len(table.questions)} tasks" if len(table.questions) > 1 else ""
    return f"Compute: all that a prefill executed, one multiply-add = 1, mean over questions{over}."


def _timed(table: Table) -> str:
    timing, missing = table.facts["timing"], [row.label for row in table.rows if not row.prefill]
    if not timing or len(missing) == len(table.rows):
        return ""
    without = f" Not timed: {', '.join(missing)}." if missing else ""
    return f"Prefill: batch {timing['batch_size']}, {timing['repeats']} runs a task and seed.{without}"
