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

from ..store.store import Cell
from .metrics import COUNTS, Measured, answers, difficulty, loyalty, measure, reproduces
from .stats import ALPHA, FLIPS, Comparison, Estimate, compare, estimate, holm, ratio

DENSE, RANDOM, POOLING, DOWNSAMPLE = "none", "random", "pooling", "downsample"
BASELINES = (DENSE, RANDOM, POOLING, DOWNSAMPLE)
"""What every comparison should hold; tables show them first, and say which were not run."""


@dataclass(frozen=True)
class Verdict:
    """A row against a ``reference`` row on one metric; ``p_holm`` is adjusted over all tests of the table."""

    reference: str
    comparison: Comparison
    p_holm: float

    @property
    def sign(self) -> int:
        """1 higher, -1 lower, 0 tied: no difference shown."""
        return int(math.copysign(1, self.comparison.difference)) if self.p_holm < ALPHA else 0


@dataclass(frozen=True)
class Spread:
    """Standard deviations over the questions of a task: of T, and of the executed multiply-adds."""

    tokens: float
    macs: float


@dataclass
class Evidence:
    """What one row's answers show, by task and there by metric or group.

    ``scores`` leaves out metrics that samples do not reproduce. ``against``: first by ``dense`` and ``random``.
    ``loyalty``: share of answers equal to the dense model's. ``retained``: score / dense score, mean over the dense
    model's tasks. ``spread``: None unless the method keeps more of some images than of others. ``groups``: mean score
    by difficulty, against the row ``groups_by`` of smaller images. ``nearest``: the T of the random row compared with.
    ``budget``: the rows of similar T (:func:`budgets`); None for dense. ``best``: where the row leads its budget, p of
    the claim that it is higher than every other row there, adjusted likewise.
    """

    scores: dict[str, dict[str, Estimate]] = field(default_factory=lambda: defaultdict(dict))
    against: dict[str, dict[str, dict[str, Verdict]]] = field(
        default_factory=lambda: {"dense": defaultdict(dict), "random": defaultdict(dict)}
    )
    loyalty: dict[str, Estimate] = field(default_factory=dict)
    loyalty_mean: Estimate | None = None
    retained: Estimate | None = None
    spread: Spread | None = None
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
        self.cells: dict[str, list[Cell]] = {}
        for cell in sorted(cells, key=lambda cell: (cell.config.task, cell.config.seed)):
            self.cells.setdefault(cell.config.task, []).append(cell)

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

    @property
    def headlines(self) -> dict[str, Measured]:
        """The headline metric of each task whose samples reproduce it."""
        keys = {task: (task, cells[0].metrics.scores[0].key) for task, cells in self.cells.items()}
        return {task: self.measured[key] for task, key in keys.items() if key in self.measured}

    @property
    def spread(self) -> Spread | None:
        """How much tokens and compute vary where the method adapts to the question; None where it does not."""
        if not any(_adapts(run) for runs in self.runs.values() for run in runs):
            return None
        tokens = [
            float(run["visual_tokens"].map(statistics.fmean).var(ddof=0)) for runs in self.runs.values() for run in runs
        ]
        macs = [cell.metrics.compute.macs_sd**2 for cells in self.cells.values() for cell in cells]
        return Spread(math.sqrt(statistics.fmean(tokens)), math.sqrt(statistics.fmean(macs)))


def _adapts(run: pd.DataFrame) -> bool:
    """Whether questions with the same number of visual tokens in the prompt keep different ones."""
    if not set(COUNTS) <= set(run):
        return False
    prompt, left = COUNTS
    return bool(run[left].map(tuple).groupby(run[prompt]).nunique().max() > 1)


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
        evidence = Evidence(spread=entrant.spread)
        for (task, key), measured in entrant.measured.items():
            evidence.scores[task][key] = estimate(measured)
        found.append(evidence)
    _judge(entrants, found)
    dense = _only(entrants, DENSE)
    if dense is not None:
        for entrant, evidence in zip(entrants, found, strict=True):
            if entrant is not dense:
                _agree(entrant, dense, evidence)
                evidence.retained = _retained(entrant, dense)
            _sort_by_difficulty(entrant, dense, _nearest(entrants, DOWNSAMPLE, entrant), evidence)
    return found


def _judge(entrants: list[Entrant], found: list[Evidence]) -> None:
    """Fill in ``against`` and ``best``, adjusted as one family: the best is never tied with a row that it must beat."""
    pairs, contests = _pairs(entrants, found), _contests(entrants, found)
    # Adjusted p-values must be able to fall below α, however many tests there are.
    flips = max(FLIPS, 40 * (len(pairs) + len(contests)))
    compared = [compare(one.measured[metric], other.measured[metric], flips) for one, other, _, metric in pairs]
    leads = [_lead([entrant for entrant, _ in members], metric, flips) for metric, members in contests]
    adjusted = holm([comparison.p for comparison in compared] + leads)
    for (_, other, verdicts, (task, key)), comparison, p in zip(pairs, compared, adjusted, strict=False):
        verdicts[task][key] = Verdict(other.label, comparison, p)
    for ((task, key), members), p in zip(contests, adjusted[len(pairs) :], strict=True):
        members[0][1].best[task][key] = p


def _pairs(
    entrants: list[Entrant], found: list[Evidence]
) -> list[tuple[Entrant, Entrant, dict[str, dict[str, Verdict]], tuple[str, str]]]:
    """Rows with the dense one, methods with the random row nearest in T: both, where verdicts go, and the metric."""
    dense, pairs = _only(entrants, DENSE), []
    for entrant, evidence in zip(entrants, found, strict=True):
        random = _nearest(entrants, RANDOM, entrant) if entrant.method not in (DENSE, RANDOM) else None
        evidence.nearest = random.tokens if random else None
        for name, reference in (("dense", dense), ("random", random)):
            if reference is not None and reference is not entrant:
                common = [metric for metric in entrant.measured if metric in reference.measured]
                pairs += [(entrant, reference, evidence.against[name], metric) for metric in common]
    return pairs


def _contests(
    entrants: list[Entrant], found: list[Evidence]
) -> list[tuple[tuple[str, str], list[tuple[Entrant, Evidence]]]]:
    """The rows of each budget by metric, the highest first, where there are several; fills in ``budget``."""
    pruned = [pair for pair in zip(entrants, found, strict=True) if pair[0].method != DENSE]
    fields: dict[tuple[int, tuple[str, str]], list[tuple[Entrant, Evidence]]] = defaultdict(list)
    for (entrant, evidence), budget in zip(pruned, budgets([entrant.tokens for entrant, _ in pruned]), strict=True):
        evidence.budget = budget
        for metric, measured in entrant.measured.items():
            if not math.isnan(measured.value):
                fields[budget, metric].append((entrant, evidence))
    return [
        (metric, sorted(members, key=lambda member: -member[0].measured[metric].value))
        for (_, metric), members in fields.items()
        if len(members) > 1
    ]


def _lead(members: list[Entrant], metric: tuple[str, str], flips: int) -> float:
    """The largest p of the first against each of the others, the nearest first; stops where it shows nothing."""
    largest, best = 0.0, members[0]
    for other in members[1:]:
        largest = max(largest, compare(best.measured[metric], other.measured[metric], flips).p)
        if largest >= ALPHA:
            break
    return largest


def _agree(entrant: Entrant, dense: Entrant, evidence: Evidence) -> None:
    common = [task for task in entrant.runs if task in dense.runs]
    evidence.loyalty = {task: estimate(loyalty(dense.runs[task][0], entrant.runs[task])) for task in common}
    if len(common) == len(dense.runs):
        evidence.loyalty_mean = mean_of(list(evidence.loyalty.values()))


def _retained(entrant: Entrant, dense: Entrant) -> Estimate | None:
    """Score / dense score, mean over the tasks with a dense score above 0; None unless all of them are measured."""
    tasks = [task for task, cells in dense.cells.items() if cells[0].metrics.scores[0].value > 0]
    ours, theirs = entrant.headlines, dense.headlines
    seeds = {tuple(cell.config.seed for cell in entrant.cells.get(task, [])) for task in tasks}
    if not tasks or len(seeds) > 1 or not all(task in ours and task in theirs for task in tasks):
        return None
    return mean_of([ratio(ours[task], theirs[task]) for task in tasks])


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
