"""What the answers behind a table show: intervals, differences from dense and from random, loyalty, difficulty groups.

Random tokens and smaller images serve as references at the budget nearest to a row's own: of several such rows the one
whose mean visual tokens T are nearest.

Families of tests (Holm): one for each question, "does it differ from dense", "does it differ from random", "is it the
best of its group", and each metric. Its tests are the rows, or the groups, and nothing else: other tasks, metrics and
questions make no row's mark harder to get.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property

from ..store.records import CONTROL
from ..store.store import Cell
from .answers import Answers, answers
from .comparison import Comparison, family, flips_for, holm, significance
from .intervals import Estimate, estimate, ratio
from .metrics import Measured, difficulty, loyalty, reproduced
from .power import ALPHA, detectable, equivalence

DENSE, RANDOM, POOLING, DOWNSAMPLE = "none", "random", "pooling", "downsample"
Metric = tuple[str, str]
"""A task and the key of one of its metrics."""
BASELINES = (DENSE, RANDOM, POOLING, DOWNSAMPLE)
"""What every comparison should hold; tables show them first, and say which were not run."""


class Verdict(StrEnum):
    """What a contrast shows. Nothing shown is not equal; only ``EQUIVALENT`` says so, within a margin."""

    HIGHER = "higher"
    LOWER = "lower"
    HIGHER_ALONE = "higher, taken alone"
    LOWER_ALONE = "lower, taken alone"
    EQUIVALENT = "equivalent within the margin"
    NOT_SHOWN = "not shown"


@dataclass(frozen=True)
class Contrast:
    """A row against a ``reference`` row on one metric.

    ``p_holm``: adjusted over the ``tests`` of its family. ``detectable``: the true difference that is shown at the
    strictest level of that family (:func:`~visibench.results.statistics.power.detectable`). ``p_equivalent``: of the
    claim that the two differ by less than the margin, None without one; equivalence is not adjusted.
    """

    reference: str
    comparison: Comparison
    p_holm: float
    tests: int
    detectable: float | None
    p_equivalent: float | None = None

    @property
    def sign(self) -> int:
        """1 shown higher, -1 shown lower in its family, 0 neither."""
        return self._direction if self.p_holm < ALPHA else 0

    @property
    def verdict(self) -> Verdict:
        """What is shown: a difference in the family, equivalence, a difference for this test alone, or nothing."""
        if self.p_holm < ALPHA:
            return Verdict.HIGHER if self._direction > 0 else Verdict.LOWER
        if self.p_equivalent is not None and self.p_equivalent < ALPHA:
            return Verdict.EQUIVALENT
        if self.comparison.p < ALPHA:
            return Verdict.HIGHER_ALONE if self._direction > 0 else Verdict.LOWER_ALONE
        return Verdict.NOT_SHOWN

    @property
    def _direction(self) -> int:
        return int(math.copysign(1, self.comparison.difference))


@dataclass(frozen=True)
class Spread:
    """Standard deviations over the questions of a task: of T, and of the executed multiply-adds."""

    tokens: float
    macs: float


@dataclass
class Evidence:
    """What one row's answers show, by task and there by metric or group.

    ``scores`` leaves out metrics that samples do not reproduce. ``against``: first by ``dense`` and ``random``, and by
    ``control`` where the method has one.
    ``loyalty``: share of answers equal to the dense model's. ``retained``: score / dense score, mean over the dense
    model's tasks. ``spread``: None unless the method keeps more of some images than of others. ``groups``: mean score
    by difficulty, against the row ``groups_by`` of smaller images. ``nearest``: the T of the random row compared with.
    ``budget_group``: the rows of similar T (:func:`budget_groups`); None for dense. ``best``: where the row leads its
    group, p of the claim that it is higher than every other row there, adjusted over the groups.
    """

    scores: dict[str, dict[str, Estimate]] = field(default_factory=lambda: defaultdict(dict))
    against: dict[str, dict[str, dict[str, Contrast]]] = field(
        default_factory=lambda: {"dense": defaultdict(dict), "random": defaultdict(dict)}
    )
    loyalty: dict[str, Estimate] = field(default_factory=dict)
    loyalty_mean: Estimate | None = None
    retained: Estimate | None = None
    spread: Spread | None = None
    groups: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    groups_by: str | None = None
    nearest: float | None = None
    budget_group: int | None = None
    best: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))


class MethodRuns:
    """The cells of one row: all tasks and seeds of a method."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.label, self.method = cells[0].config.label, cells[0].config.role
        self.tokens = statistics.fmean(cell.metrics.visual_tokens.mean for cell in cells)
        self.cells: dict[str, list[Cell]] = {}
        for cell in sorted(cells, key=lambda cell: (cell.config.task, cell.config.seed)):
            self.cells.setdefault(cell.config.task, []).append(cell)

    def controls(self, other: MethodRuns) -> bool:
        """Whether this is the control of the ``other`` row."""
        own, theirs = (next(iter(row.cells.values()))[0].config for row in (self, other))
        same = (own.method, own.options, own.label) == (theirs.method, theirs.options, f"{CONTROL} of {theirs.label}")
        return own.control and not theirs.control and same

    @cached_property
    def runs(self) -> dict[str, list[Answers]]:
        """The answers to each task, one seed after the other."""
        return {task: [answers(cell) for cell in cells] for task, cells in self.cells.items()}

    @cached_property
    def measured(self) -> dict[tuple[str, str], Measured]:
        """The task's metrics that its samples reproduce."""
        by_metric = {}
        for task, cells in self.cells.items():
            for score in cells[0].metrics.scores:
                stored = [{s.key: s.value for s in cell.metrics.scores}[score.key] for cell in cells]
                found = reproduced(score.key, self.runs[task], stored, score.maximum)
                if found is not None:
                    by_metric[task, score.key] = found
        return by_metric

    @property
    def headlines(self) -> dict[str, Measured]:
        """The headline metric of each task whose samples reproduce it."""
        keys = {task: (task, cells[0].metrics.scores[0].key) for task, cells in self.cells.items()}
        return {task: self.measured[key] for task, key in keys.items() if key in self.measured}

    @property
    def spread(self) -> Spread | None:
        """How much tokens and compute vary where the method adapts to the question; None where it does not."""
        runs = [run for runs in self.runs.values() for run in runs]
        if not any(run.adapts for run in runs):
            return None
        macs = [cell.metrics.compute.macs_sd**2 for cells in self.cells.values() for cell in cells]
        return Spread(math.sqrt(statistics.fmean(run.spread for run in runs)), math.sqrt(statistics.fmean(macs)))


def budget_groups(means: Sequence[float]) -> list[int]:
    """The budget group of each T: 0 for the largest and all down to 4/5 of it, 1 for the next largest and so on.

    T stands for what was spent in all layers; the number after the last cut would put a method that cuts late beside
    one that cuts early.
    """
    numbers, start, group = [0] * len(means), math.inf, -1
    for place in sorted(range(len(means)), key=lambda place: -means[place]):
        if means[place] < 0.8 * start * (1 - 1e-9):
            start, group = means[place], group + 1
        numbers[place] = group
    return numbers


def infer(cells: Sequence[Sequence[Cell]], margin: float | None = None) -> list[Evidence]:
    """Evidence for each row of a table; ``cells``: by row. All rows hold cells that can be compared.

    ``margin``: also test whether rows differ from their references by less than this share of a metric's maximum.
    """
    rows = [MethodRuns(row_cells) for row_cells in cells]
    evidence = [Evidence(spread=row.spread) for row in rows]
    for row, row_evidence in zip(rows, evidence, strict=True):
        for (task, key), measured in row.measured.items():
            row_evidence.scores[task][key] = estimate(measured)
    _contrast(rows, evidence, margin)
    _find_best(rows, evidence)
    dense, smaller = _only(rows, DENSE), [row for row in rows if row.method == DOWNSAMPLE]
    if dense is not None:
        for row, row_evidence in zip(rows, evidence, strict=True):
            if row is not dense:
                _agree(row, dense, row_evidence)
                row_evidence.retained = _retained(row, dense)
            _sort_by_difficulty(row, dense, _nearest(smaller, row), row_evidence)
    return evidence


def _contrast(rows: list[MethodRuns], evidence: list[Evidence], margin: float | None) -> None:
    """Fill in ``against`` and ``nearest``: rows with the dense one, methods with the random row nearest in T."""
    dense, randoms = _only(rows, DENSE), [row for row in rows if row.method == RANDOM]
    controls: dict[str, list[MethodRuns]] = defaultdict(list)
    for row in rows:
        if row.method == CONTROL:
            controls[row.label].append(row)
    families: dict[tuple[str, Metric], list[tuple[MethodRuns, MethodRuns, Evidence]]] = defaultdict(list)
    for row, row_evidence in zip(rows, evidence, strict=True):
        random = _nearest(randoms, row) if row.method not in (DENSE, RANDOM, CONTROL) else None
        row_evidence.nearest = random.tokens if random else None
        control = next((other for other in controls[f"{CONTROL} of {row.label}"] if other.controls(row)), None)
        if control is not None:
            row_evidence.against["control"] = defaultdict(dict)
        for question, reference in (("dense", dense), ("random", random), ("control", control)):
            if reference is not None and reference is not row:
                for metric in row.measured:
                    if metric in reference.measured:
                        families[question, metric].append((row, reference, row_evidence))
    for (question, metric), members in families.items():
        pairs = [(row.measured[metric], reference.measured[metric]) for row, reference, _ in members]
        for (_, reference, row_evidence), pair, tested in zip(members, pairs, family(pairs), strict=True):
            contrast = _contrast_of(reference.label, *pair, *tested, len(pairs), margin)
            row_evidence.against[question][metric[0]][metric[1]] = contrast


def _contrast_of(
    label: str, first: Measured, second: Measured, comparison: Comparison, p: float, tests: int, margin: float | None
) -> Contrast:
    shown = detectable(comparison.error, second, tests=tests)
    equivalent = None if margin is None else equivalence(first, second, margin)
    return Contrast(label, comparison, p, tests, shown, equivalent)


def _find_best(rows: list[MethodRuns], evidence: list[Evidence]) -> None:
    """Fill in ``budget_group`` and ``best``: the highest row of each group by metric, where there are several rows."""
    pruned = [pair for pair in zip(rows, evidence, strict=True) if pair[0].method != DENSE]
    groups: dict[Metric, dict[int, list[tuple[MethodRuns, Evidence]]]] = defaultdict(lambda: defaultdict(list))
    for (row, row_evidence), group in zip(pruned, budget_groups([row.tokens for row, _ in pruned]), strict=True):
        row_evidence.budget_group = group
        for metric, measured in row.measured.items():
            if not math.isnan(measured.value):
                groups[metric][group].append((row, row_evidence))
    for metric, by_budget in groups.items():
        leaders = [_ranked(members, metric) for members in by_budget.values() if len(members) > 1]
        flips = flips_for(len(leaders))
        p_values = holm([_leads([row for row, _ in ranked], metric, flips) for ranked in leaders])
        for ((_, row_evidence), *_), p in zip(leaders, p_values, strict=True):
            row_evidence.best[metric[0]][metric[1]] = p


def _ranked(members: list[tuple[MethodRuns, Evidence]], metric: Metric) -> list[tuple[MethodRuns, Evidence]]:
    return sorted(members, key=lambda member: -member[0].measured[metric].value)


def _leads(ranked: list[MethodRuns], metric: Metric, flips: int) -> float:
    """p of the claim that the first is higher than each of the others: the largest of theirs (intersection-union)."""
    first, *others = (row.measured[metric] for row in ranked)
    return max(significance(first, other, flips).p for other in others)


def _agree(row: MethodRuns, dense: MethodRuns, evidence: Evidence) -> None:
    common = [task for task in row.runs if task in dense.runs]
    evidence.loyalty = {task: estimate(loyalty(dense.runs[task][0], row.runs[task])) for task in common}
    if len(common) == len(dense.runs):
        evidence.loyalty_mean = mean_of(list(evidence.loyalty.values()))


def _retained(row: MethodRuns, dense: MethodRuns) -> Estimate | None:
    """Score / dense score, mean over the tasks with a dense score above 0; None unless all of them are measured."""
    tasks = [task for task, cells in dense.cells.items() if cells[0].metrics.scores[0].value > 0]
    ours, theirs = row.headlines, dense.headlines
    seeds = {tuple(cell.config.seed for cell in row.cells.get(task, [])) for task in tasks}
    if not tasks or len(seeds) > 1 or not all(task in ours and task in theirs for task in tasks):
        return None
    return mean_of([ratio(ours[task], theirs[task]) for task in tasks])


def _sort_by_difficulty(row: MethodRuns, dense: MethodRuns, small: MethodRuns | None, evidence: Evidence) -> None:
    if small is None:
        return
    evidence.groups_by = small.label
    for task in row.runs:
        if task in dense.runs and task in small.runs:
            groups = difficulty(dense.runs[task][0], small.runs[task][0], row.runs[task])
            evidence.groups[task] = {name: estimate(measured) for name, measured in groups.items()}


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
    """Mean over estimates taken as independent, with the interval that theirs give (MOVER; Zou and Donner 2008)."""
    n, value = len(estimates), statistics.fmean(e.value for e in estimates)
    low = value - math.hypot(*(e.value - e.low for e in estimates)) / n
    high = value + math.hypot(*(e.high - e.value for e in estimates)) / n
    return Estimate(value, low, high, sum(e.questions for e in estimates), sum(e.images for e in estimates))


def _only(rows: list[MethodRuns], method: str) -> MethodRuns | None:
    return next((row for row in rows if row.method == method), None)


def _nearest(rows: list[MethodRuns], to: MethodRuns) -> MethodRuns | None:
    return min(rows, key=lambda row: abs(row.tokens - to.tokens), default=None)
