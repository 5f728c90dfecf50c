"""A paper's figures beside our runs of its settings: the gap with its interval, and what that says.

    reproduced         0 lies in the interval of the gap, which is narrow enough to say so
    not reproduced     the interval leaves 0 out
    cannot be told     too few questions for either, or the paper does not say what its figure is

The interval is that of our score, by image, widened by the rounding of the printed figure. Prompts, precision and
software differ from the paper's; no interval knows of that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from ..statistics.inference import MethodRuns
from ..statistics.intervals import Estimate, estimate
from ..store.store import Cell
from . import Figure, Paper, figures, papers
from .matching import Ours, agreement, alike, departures, mean_of, published_name

NARROW = 0.02
"""Half a gap's interval may be so wide, as a share of the best score, for a figure to count as reproduced."""
Verdict = Literal["reproduced within error", "not reproduced", "cannot be told"]


@dataclass(frozen=True)
class Reproduced:
    """Our value of a printed figure, in its unit; ``low`` and ``high``: of the gap, None where no interval is known."""

    ours: Ours
    figure: Figure
    value: float
    low: float | None
    high: float | None
    verdict: Verdict
    why: str

    @property
    def gap(self) -> float:
        """Ours - printed."""
        return self.value - float(self.figure.value)  # type: ignore[arg-type]  # ranges are left out


def paper_of(name: str) -> Paper:
    """The paper of a file of printed figures."""
    return next(paper for paper, file in papers_by_file() if file == name)


def papers_by_file() -> list[tuple[Paper, str]]:
    """All papers with the names of their files."""
    from . import FOLDER, VOCABULARY

    names = [file.stem for file in sorted(FOLDER.glob("*.yaml")) if file.name != VOCABULARY]
    return list(zip(papers(), names, strict=True))


def reproduced(cells: Iterable[Cell], paper: Paper) -> list[Reproduced]:
    """All figures of a paper whose settings some of our cells have."""
    return [one for group in alike(cells) for one in _of_group(group, paper)]


def _of_group(cells: Sequence[Cell], paper: Paper) -> Iterator[Reproduced]:
    ours, model = mean_of(cells), published_name(cells[0].config.model)
    if model is None:
        return
    measured = MethodRuns(cells).measured
    for figure in figures(model):
        row, quantity = figure.row, figure.quantity
        if figure.paper is not paper or (row.method, quantity.task) != (ours.method, ours.task):
            continue
        if isinstance(figure.value, tuple) or row.fine_tuned or not agreement(ours, figure) or departures(ours, figure):
            continue
        keys = quantity.keys or [cells[0].metrics.scores[0].key]
        scale = 100.0 if quantity.unit == "%" else 1.0
        value = scale * sum(ours.metrics.get(key, math.nan) for key in keys)
        if math.isnan(value):  # none of its questions was asked
            continue
        known = measured.get((ours.task, keys[0])) if len(keys) == 1 else None
        interval = None if known is None else estimate(known)
        yield _judged(ours, figure, value, interval, scale)


def _judged(ours: Ours, figure: Figure, value: float, interval: Estimate | None, scale: float) -> Reproduced:
    printed, rounding = float(figure.value), _rounding(figure)  # type: ignore[arg-type]  # no range
    n = f"{ours.questions} of {ours.total} questions"
    if interval is None or math.isnan(interval.low):
        return Reproduced(ours, figure, value, None, None, "cannot be told", f"no interval is known for it; {n}")
    low, high = scale * interval.low - printed - rounding, scale * interval.high - printed + rounding
    best = {"%": 100.0}.get(figure.quantity.unit, 2000.0)
    verdict: Verdict
    if figure.quantity.apart:
        verdict, why = "cannot be told", figure.quantity.apart
    elif low > 0 or high < 0:
        verdict, why = "not reproduced", f"the interval of the gap leaves 0 out; {n}"
    elif (high - low) / 2 > NARROW * best:
        verdict, why = "cannot be told", f"too few questions: {n}"
    else:
        verdict, why = "reproduced within error", n
    return Reproduced(ours, figure, value, low, high, verdict, why)


def _rounding(figure: Figure) -> float:
    digits = len(figure.printed.partition(".")[2])
    return 0.5 * 10.0**-digits
