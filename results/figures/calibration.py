"""Compute against kept answers of every setting that a calibration measured, with the chosen ones marked."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from ..store.calibration_records import CalibrationRecord
from .style import COLOURS, LINES, caption, styled

_MARKERS = ("o", "s", "^", "D", "v", "P")


def draw(record: CalibrationRecord) -> Figure:
    """A point a setting that was asked everything; lines join those of a method that no other of it beats."""
    with styled():
        figure = Figure(figsize=(7.6, 5.0), layout="constrained")
        place = figure.subplots()
        for number, chosen in enumerate(record.chosen):
            look: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "marker": _MARKERS[number % len(_MARKERS)]}
            for point in record.searched_of(chosen.method):
                place.plot(point.macs * 1e-9, 100 * point.least.share, markersize=4, alpha=0.55, linestyle="", **look)
            best = record.frontier(chosen.method)
            line: dict[str, Any] = {"color": look["color"], "linestyle": LINES[number % len(LINES)], "linewidth": 1.2}
            place.plot([p.macs * 1e-9 for p in best], [100 * p.least.share for p in best], label=chosen.method, **line)
            shown = chosen.point or chosen.nearest
            if shown is not None:
                least, edge = shown.least, "black" if chosen.point else "none"
                reach = [[100 * (least.share - least.low)], [100 * (least.high - least.share)]]
                at = (shown.macs * 1e-9, 100 * least.share)
                place.errorbar(*at, yerr=reach, markersize=9, markeredgecolor=edge, capsize=3, **look)
        place.axvline(record.dense_macs * 1e-9, color="#888888", linewidth=1, linestyle=LINES[2])
        place.annotate("dense", (record.dense_macs * 1e-9, place.get_ylim()[0]), fontsize=8, ha="right", va="bottom")
        place.axhline(100 * record.target, color="#888888", linewidth=1)
        place.set(
            xlabel="GFLOPs of a prefill (multiply-adds executed, vision included)",
            ylabel="answers as dense, %, of the task where fewest are",
            title=f"Settings on {record.model}",
        )
        place.legend(loc="lower right")
        caption(figure, [_about(record)])
    return figure


def _about(record: CalibrationRecord) -> str:
    facts = record.environment
    return (
        f"Small: settings on {record.searched} questions of each of {', '.join(record.tasks)}; without the "
        f"{sum(record.given_up.values())} that were given up; line: the target, {record.target:.0%}. "
        f"Large: on {record.confirmed} other questions of each, with 95 % intervals by image; black edge: chosen, "
        f"none: the nearest of a method without a setting. Seed {record.seed}; "
        f"{facts.model.get('dtype')}, {facts.model.get('hardware')}, visibench {facts.versions.get('visibench')}."
    )
