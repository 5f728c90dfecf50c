"""Compute by component, a bar a row, and beside it the prefill's time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..statistics.inference import DENSE
from ..tables.columns.costs import compute_unit
from ..tables.notes import origin, questions
from ..tables.tables import MethodRow, ResultTable
from .captions import counted, timed
from .style import BESIDE, SCREEN, SMALL, Look, caption, wrap

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


def by_component(table: ResultTable, look: Look = SCREEN) -> Figure:
    """A bar for each row, in its components; beside it, where something was timed, the prefill's time."""
    unit, name = compute_unit(table)
    was_timed = any(row.prefill for row in table.rows)
    titles = table.titles if look.titled else {DENSE: "dense"}
    named = [titles.get(row.label, row.label) for row in table.rows]
    labels = [wrap(name.replace(",", ", ").replace("  ", " "), 24 if look.narrow else 34) for name in named]
    lines = sum(1 + 0.5 * label.count("\n") for label in labels)
    wide, high = look.width or (9.6 if was_timed else 6.8), (2.2 + 0.3 * lines) * (0.7 if look.width else 1)
    figure = Figure(figsize=(wide, high * (1 + (was_timed and look.narrow))), layout="constrained")
    if look.narrow:
        places = figure.subplots(1 + was_timed, 1, squeeze=False)[:, 0]
    else:
        places = figure.subplots(1, 1 + was_timed, sharey=True, squeeze=False, width_ratios=[3, 2][: 1 + was_timed])[0]
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
    places[0].set(xlabel=f"compute of a prefill, {name}", xlim=(0, 1.14 * ends.max()))
    if was_timed:
        _times(places[1], table.rows)
    for place in places:
        place.set(yticks=heights, yticklabels=labels, ylim=(len(labels) - 0.4, -0.6))
        if not look.narrow:
            place.label_outer()
        place.grid(axis="y", visible=False)
    figure.legend(loc="outside upper center", ncols=2 if look.narrow else 4)
    caption(figure, [questions(table), counted(table), timed(table), origin(table)], look)
    return figure


def _times(place: Axes, rows: Sequence[MethodRow]) -> None:
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


def component_figures(table: ResultTable) -> list[dict[str, Any]]:
    """The numbers of all bars of compute."""
    return [
        {"method": row.label, "component": name, "gflops": macs * 1e-9}
        for row in table.rows
        for name, macs in row.components.items()
    ]
