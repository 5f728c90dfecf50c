"""Compute against kept answers of every setting that a calibration measured, with the chosen ones marked."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from ..store.calibration_records import CalibratedPoint, CalibrationRecord
from .style import COLOURS, LINES, caption, styled

_MARKERS = ("o", "s", "^", "D", "v", "P")


def frontier(points: list[CalibratedPoint]) -> list[CalibratedPoint]:
    """Complete points that no other beats in both multiply-adds and least agreement, by multiply-adds."""
    best: list[CalibratedPoint] = []
    for point in sorted((p for p in points if p.complete), key=lambda p: (p.macs, -p.least.share)):
        if not best or point.least.share > best[-1].least.share:
            best.append(point)
    return best


def draw(record: CalibrationRecord) -> Figure:
    """A point a setting; lines join those of a method that no other setting of it beats."""
    with styled():
        figure = Figure(figsize=(7.6, 5.0), layout="constrained")
        place = figure.subplots()
        for number, chosen in enumerate(record.chosen):
            look: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "marker": _MARKERS[number % len(_MARKERS)]}
            of_method = [p for p in record.points if p.method == chosen.method and not p.confirmed]
            for point in of_method:
                alpha = 0.55 if point.complete else 0.2
                place.plot(point.macs * 1e-9, 100 * point.least.share, markersize=4, alpha=alpha, linestyle="", **look)
            best = frontier(of_method)
            line: dict[str, Any] = {"color": look["color"], "linestyle": LINES[number % len(LINES)], "linewidth": 1.2}
            place.plot([p.macs * 1e-9 for p in best], [100 * p.least.share for p in best], label=chosen.method, **line)
            if chosen.point is not None:
                least = chosen.point.least
                reach = [[100 * (least.share - least.low)], [100 * (least.high - least.share)]]
                at = (chosen.point.macs * 1e-9, 100 * least.share)
                place.errorbar(*at, yerr=reach, markersize=9, markeredgecolor="black", capsize=3, **look)
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
        f"Small: settings on {record.searched} questions of each of {', '.join(record.tasks)}; pale: not asked on all "
        f"tasks, since one missed the target ({record.target:.0%}, line). Large, black edge: chosen ones on "
        f"{record.confirmed} other questions of each, with 95 % intervals by image. Seed {record.seed}; "
        f"{facts.model.get('dtype')}, {facts.model.get('hardware')}, visibench {facts.versions.get('visibench')}."
    )
