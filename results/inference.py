"""What the answers behind a table show: intervals, differences from dense and from random, loyalty, difficulty groups.

Random tokens and smaller images serve as references at the budget nearest to a row's own: of several such rows the one
whose mean visual tokens T are nearest.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import pandas as pd

from .metrics import Measured, answers, difficulty, loyalty, measure, reproduces
from .stats import FLIPS, Comparison, Estimate, compare, estimate, holm
from .store import Cell

DENSE, RANDOM, DOWNSAMPLE = "none", "random", "downsample"
ALPHA = 0.05


@dataclass(frozen=True)
class Verdict:
    """A row against a ``reference`` row on one metric; ``p_holm`` is adjusted over all comparisons of the table."""

    reference: str
    comparison: Comparison
    p_holm: float

    @property
    def sign(self) -> int:
        """1 higher, -1 lower, 0 tied: no difference shown."""
        return int(math.copysign(1, self.comparison.difference)) if self.p_holm < ALPHA else 0


@dataclass
class Evidence:
    """What one row's answers show, by task and there by metric or group.

    ``scores`` leaves out metrics that samples do not reproduce. ``against``: first by ``dense`` and ``random``.
    ``loyalty``: share of answers equal to the dense model's. ``groups``: mean score by difficulty, against the row
    ``groups_by`` of smaller images. ``nearest``: the T of the random row compared with. ``budget``: the rows of
    similar T (:func:`budgets`); None for dense. ``best``: where the row leads its budget, p of the claim that it is
    higher than every other row there, adjusted over all such claims.
    """

    scores: dict[str, dict[str, Estimate]] = field(default_factory=lambda: defaultdict(dict))
    against: dict[str, dict[str, dict[str, Verdict]]] = field(
        default_factory=lambda: {"dense": defaultdict(dict), "random": defaultdict(dict)}
    )
    loyalty: dict[str, Estimate] = field(default_factory=dict)
    loyalty_mean: Estimate | None = None
    groups: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    groups_by: str | None = None
    nearest: float | None = None
    budget: int | None = None
    best: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))


class Entrant:
    """The cells of one row: all tasks and seeds of a method."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.label, self.method = cells[0].config.label, cells[0].config.method
        self.tokens = statistics.fmean(cell.metrics.visual_tokens.mean for cell in cells)
        self.cells: dict[str, list[Cell]] = defaultdict(list)
        for cell in sorted(cells, key=lambda cell: (cell.config.task, cell.config.seed)):
            self.cells[cell.config.task].append(cell)

    @cached_property
    def runs(self) -> dict[str, list[pd.DataFrame]]:
        """The samples of each task, one frame a seed."""
        return {task: [answers(cell) for cell in cells] for task, cells in self.cells.items()}

    @cached_property
    def measured(self) -> dict[tuple[str, str], Measured]:
        """The task's metrics that its samples reproduce."""
        found = {}
        for task, cells in self.cells.items():
            for score in cells[0].metrics.scores:
                stored = [{s.key: s.value for s in cell.metrics.scores}[score.key] for cell in cells]
                if all(reproduces(score.key, run, value) for run, value in zip(self.runs[task], stored, strict=True)):
                    found[task, score.key] = measure(score.key, self.runs[task], score.maximum)
        return found


def budgets(means: Sequence[float]) -> list[int]:
    """The budget of each T: 0 for the largest and all down to 4/5 of it, 1 for the next largest and so on.

    T stands for what was spent in all layers; the number after the last cut would put a method that cuts late beside
    one that cuts early.
    """
    found, start, budget = [0] * len(means), math.inf, -1
    for place in sorted(range(len(means)), key=lambda place: -means[place]):
        if means[place] < 0.8 * start * (1 - 1e-9):
            start, budget = means[place], budget + 1
        found[place] = budget
    return found


def weigh(rows: Sequence[Sequence[Cell]]) -> list[Evidence]:
    """Evidence for each row of a table. All rows hold cells that can be compared."""
    entrants = [Entrant(cells) for cells in rows]
    found = []
    for entrant in entrants:
        evidence = Evidence()
        for (task, key), measured in entrant.measured.items():
            evidence.scores[task][key] = estimate(measured)
        found.append(evidence)
    _compare(entrants, found)
    _rank(entrants, found)
    dense = _only(entrants, DENSE)
    if dense is not None:
        for entrant, evidence in zip(entrants, found, strict=True):
            if entrant is not dense:
                _agree(entrant, dense, evidence)
            _sort_by_difficulty(entrant, dense, _nearest(entrants, DOWNSAMPLE, entrant), evidence)
    return found


def _compare(entrants: list[Entrant], found: list[Evidence]) -> None:
    """Fill in ``against``: every row with the dense one, and every method with the random row nearest in T."""
    dense, pairs = _only(entrants, DENSE), []
    for entrant, evidence in zip(entrants, found, strict=True):
        random = _nearest(entrants, RANDOM, entrant) if entrant.method not in (DENSE, RANDOM) else None
        evidence.nearest = random.tokens if random else None
        for name, reference in (("dense", dense), ("random", random)):
            if reference is None or reference is entrant:
                continue
            common = [metric for metric in entrant.measured if metric in reference.measured]
            pairs += [(entrant, reference, evidence.against[name], metric) for metric in common]
    # Adjusted p-values must be able to fall below α, however many comparisons there are.
    flips = max(FLIPS, 40 * len(pairs))
    compared = [compare(one.measured[metric], other.measured[metric], flips) for one, other, _, metric in pairs]
    for (_, reference, verdicts, (task, key)), comparison, p in zip(
        pairs, compared, holm([comparison.p for comparison in compared]), strict=True
    ):
        verdicts[task][key] = Verdict(reference.label, comparison, p)


def _rank(entrants: list[Entrant], found: list[Evidence]) -> None:
    """Fill in ``budget`` and ``best``: on each metric the leader must beat all others of its budget."""
    pruned = [pair for pair in zip(entrants, found, strict=True) if pair[0].method != DENSE]
    fields: dict[tuple[int, tuple[str, str]], list[tuple[Entrant, Evidence]]] = defaultdict(list)
    for (entrant, evidence), budget in zip(pruned, budgets([entrant.tokens for entrant, _ in pruned]), strict=True):
        evidence.budget = budget
        for metric, measured in entrant.measured.items():
            if not math.isnan(measured.value):
                fields[budget, metric].append((entrant, evidence))
    contests = [(metric, members) for (_, metric), members in fields.items() if len(members) > 1]
    leaders, p = [], []
    for metric, members in contests:
        (best, evidence), *others = sorted(members, key=lambda member: -member[0].measured[metric].value)
        leaders.append((evidence, metric))
        p.append(_shown(best, [other for other, _ in others], metric, max(FLIPS, 40 * len(contests))))
    for (evidence, (task, key)), adjusted in zip(leaders, holm(p), strict=True):
        evidence.best[task][key] = adjusted


def _shown(best: Entrant, others: list[Entrant], metric: tuple[str, str], flips: int) -> float:
    """The largest p of ``best`` against each of ``others``, the nearest first; stops where it shows nothing."""
    largest = 0.0
    for other in others:
        largest = max(largest, compare(best.measured[metric], other.measured[metric], flips).p)
        if largest >= ALPHA:
            break
    return largest


def _agree(entrant: Entrant, dense: Entrant, evidence: Evidence) -> None:
    common = [task for task in entrant.runs if task in dense.runs]
    evidence.loyalty = {task: estimate(loyalty(dense.runs[task][0], entrant.runs[task])) for task in common}
    if len(common) == len(dense.runs):
        evidence.loyalty_mean = mean_of(list(evidence.loyalty.values()))


def _sort_by_difficulty(entrant: Entrant, dense: Entrant, small: Entrant | None, evidence: Evidence) -> None:
    if small is None:
        return
    evidence.groups_by = small.label
    for task in entrant.runs:
        if task in dense.runs and task in small.runs:
            groups = difficulty(dense.runs[task][0], small.runs[task][0], entrant.runs[task])
            evidence.groups[task] = {name: estimate(measured) for name, measured in groups.items()}


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
    """Mean over estimates taken as independent, with the interval that theirs give (MOVER; Zou and Donner 2008)."""
    n, value = len(estimates), statistics.fmean(e.value for e in estimates)
    low = value - math.hypot(*(e.value - e.low for e in estimates)) / n
    high = value + math.hypot(*(e.high - e.value for e in estimates)) / n
    return Estimate(value, low, high, sum(e.questions for e in estimates), sum(e.images for e in estimates))


def _only(entrants: list[Entrant], method: str) -> Entrant | None:
    return next((entrant for entrant in entrants if entrant.method == method), None)


def _nearest(entrants: list[Entrant], method: str, to: Entrant) -> Entrant | None:
    of_method = [entrant for entrant in entrants if entrant.method == method]
    return min(of_method, key=lambda entrant: abs(entrant.tokens - to.tokens), default=None)
