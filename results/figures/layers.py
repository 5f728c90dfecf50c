"""Visual tokens by decoder layer, a panel a method."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..statistics.inference import DENSE
from ..store.records import CONTROL
from ..tables.notes import origin, questions
from ..tables.tables import MethodRow, ResultTable
from .series import series
from .style import COLOURS, LINES, SCREEN, SMALL, Look, caption, grid, wrap


def by_layer(table: ResultTable, look: Look = SCREEN) -> Figure:
    """One panel a method, its budgets labelled where their lines end; the dense model's line in all of them."""
    dense = next((row for row in table.rows if row.method == DENSE), None)
    groups = [one for one in series(table.rows) if one.method not in (DENSE, CONTROL)] or series(table.rows)
    figure, places = grid(len(groups), 3, (3.4, 2.1), look)
    most = max(max(row.tokens.per_layer) for row in table.rows)
    for place, group in zip(places, groups, strict=True):
        if dense is not None and dense not in group.rows:
            _staircase(place, dense, color="#AAAAAA", linestyle=LINES[2], label="dense")
        ends = _apart([row.tokens.last for row in group.rows], (0.11 if look.width is None else 0.19) * most)
        for index, (row, name, end) in enumerate(zip(group.rows, group.names, ends, strict=True)):
            line = {"color": COLOURS[index % len(COLOURS)], "linestyle": LINES[index % len(LINES)]}
            _staircase(place, row, **line, label=row.label)
            said = f"{name} (T {row.tokens.mean:.1f})" if name else f"T {row.tokens.mean:.1f}"
            text = "\n".join(textwrap.wrap(said, 30))
            place.annotate(
                text, (1.02, end), xycoords=("axes fraction", "data"), **SMALL, va="center", color=line["color"]
            )
        place.set(
            title=wrap(look.method(group.label, group.method, group.rows[0].title), 40),
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
            questions(table),
            origin(table),
        ],
        look,
    )
    return figure


def _staircase(place: Axes, row: MethodRow, **look: Any) -> None:
    counts = row.tokens.per_layer
    place.plot(range(len(counts)), counts, drawstyle="steps-mid", linewidth=1.6, **look)


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """The heights moved up as little as keeps ``gap`` between them, in their order."""
    moved, last = dict.fromkeys(range(len(heights)), 0.0), -math.inf
    for place in sorted(range(len(heights)), key=lambda i: heights[i]):
        moved[place] = last = max(heights[place], last + gap)
    return list(moved.values())


def layer_figures(table: ResultTable) -> list[dict[str, Any]]:
    """The numbers of all lines."""
    return [
        {"method": row.label, "layer": layer, "visual_tokens": tokens}
        for row in table.rows
        for layer, tokens in enumerate(row.tokens.per_layer)
    ]
