"""A regression gate: a run against the baseline of an earlier one, question by question.

    what a prefill kept and computed   deterministic: one question that differs fails the gate
    what was answered                  rounding may change it: only a drop of a score that is shown fails the gate

A drop is shown by the paired tests of :mod:`~visibench.results.statistics.comparison`, one-sided: one of the run as a
whole, which sees a small drop in many cells at once, and one of each cell × metric, which sees where. A run without any
drop fails with at most 5 % probability, however many tests there are: half of that is for the run as a whole, the other
half, by Holm's adjustment, for the cells.

The run as a whole is tested on the mean score of all questions of all cells, each a share of the best. An image counts
once, with all that was asked about it in all cells of its task: where methods fall together on an image, that is one
thing that happened, not many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ...errors import DataError
from ..statistics.comparison import Comparison, compare, flips_for, holm
from ..statistics.metrics import Measured, measure
from ..statistics.power import ALPHA, detectable
from ..store.records import CODE, CellConfig
from ..store.store import Cell
from .baseline import (
    FACTS,
    Baseline,
    BaselineCell,
    Questions,
    asked_of,
    by_name,
    measured,
    model_of,
    name_of,
    prefills_of,
    restricted,
    samples_of,
)

IF_MEANT = "if the change is meant, write a new baseline with --update"
# Settings that are no matter of equality: the cell's name holds the first three, fingerprint and data hash stand for
# model and data, options are compared one by one, machines may differ, and times are not compared.
_ELSEWHERE = {"label", "task", "seed", "model", "checkpoint", "origin", "options", "device", "timing", *CODE}


SHARES = 2
"""How many parts of 5 % there are: the run as a whole, and its cells."""


@dataclass(frozen=True)
class DropTest:
    """``comparison``: now minus before, in the metric's units. ``p_drop``: one-sided; ``p_holm``: over all tests.

    ``detectable``: a true drop that :func:`~visibench.results.statistics.power.detectable` says is shown at the level
    of ``p_holm``; None if none can be.
    """

    comparison: Comparison
    p_drop: float
    p_holm: float
    detectable: float | None

    @property
    def dropped(self) -> bool:
        """Whether a drop is shown."""
        return self.p_holm < ALPHA


@dataclass(frozen=True)
class MetricChange:
    """A metric before and now, in lmms-eval's units."""

    key: str
    title: str
    maximum: float | None
    before: float
    now: float
    verdict: DropTest


@dataclass(frozen=True)
class FactChange:
    """``questions`` of a cell differ in a deterministic fact; before and now of the first, number ``doc_id``."""

    fact: str
    questions: int
    doc_id: int
    before: Any
    now: Any


@dataclass(frozen=True)
class CellChange:
    """A cell against its baseline; ``answers``: how many of its ``questions`` got another one."""

    name: str
    questions: int
    images: int
    answers: int
    facts: list[FactChange]
    metrics: list[MetricChange]

    @property
    def failed(self) -> bool:
        """Whether a deterministic fact changed or a drop is shown."""
        return bool(self.facts) or any(metric.verdict.dropped for metric in self.metrics)


@dataclass(frozen=True)
class Report:
    """The outcome of the gate. ``whole``: mean scores of the run, as shares of the best, ``before`` and ``now``.

    ``tests``: of cells × metrics. ``notes``: what differs and does not count. ``left_out``: of the baseline, what the
    run does not hold, in words.
    """

    passed: bool
    tests: int
    whole: MetricChange
    cells: list[CellChange]
    notes: list[str]
    left_out: str = ""


def check(cells: Sequence[Cell], baseline: Baseline, *, subset: bool = False) -> Report:
    """Compare a run with a baseline; ``subset``: with what the run holds of the baseline's cells and questions.

    Raises :class:`DataError` unless both hold the same cells of the same model with the same settings and questions.
    """
    left_out = ""
    if subset:
        baseline, left_out = restricted(baseline, cells)
    run, stored = by_name(cells), {name_of(cell.config): cell for cell in baseline.cells}
    _same_cells(run, stored)
    pairs = []
    for name, before in stored.items():
        _same_experiment(name, before, run[name], baseline.questions[before.config.task])
        now = samples_of(run[name])
        pairs.append((name, before, now.assign(answer=before.answers, score=before.scores), now))
    scores = [
        (measured(name, then, old), measured(name, now, new))
        for name, before, then, now in pairs
        for old, new in zip(before.metrics, run[name].metrics.scores, strict=True)
    ]
    drops = iter(drops_of_cells(scores))
    changes = [
        CellChange(
            name=name,
            questions=len(now),
            images=now["image"].nunique(),
            answers=int((then["answer"] != now["answer"]).sum()),
            facts=_facts(before, now),
            metrics=[
                MetricChange(old.key, old.title, old.maximum, old.value, new.value, next(drops))
                for old, new in zip(before.metrics, run[name].metrics.scores, strict=True)
            ],
        )
        for name, before, then, now in pairs
    ]
    whole = _whole([(before.config.task, then, now) for _, before, then, now in pairs])
    passed = not whole.verdict.dropped and not any(change.failed for change in changes)
    return Report(passed, len(scores), whole, changes, _notes(baseline, run), left_out)


def drops_of_cells(pairs: Sequence[tuple[Measured, Measured]]) -> list[DropTest]:
    """Has any of these metrics dropped? Each before and now, on the same questions; all are one family of tests."""
    tests = SHARES * len(pairs)
    compared = [compare(now, before, flips_for(tests)) for before, now in pairs]
    drops = [p_drop(comparison) for comparison in compared]
    return [
        DropTest(comparison, p, min(1.0, SHARES * adjusted), detectable(comparison.error, before, sides=1, tests=tests))
        for (before, _), comparison, p, adjusted in zip(pairs, compared, drops, holm(drops), strict=True)
    ]


def drop_of_run(before: Measured, now: Measured) -> DropTest:
    """Has the run as a whole dropped? Its mean score before and now."""
    comparison = compare(now, before)
    p = p_drop(comparison)
    return DropTest(comparison, p, min(1.0, SHARES * p), detectable(comparison.error, before, sides=1, tests=SHARES))


def _whole(cells: Sequence[tuple[str, pd.DataFrame, pd.DataFrame]]) -> MetricChange:
    """The mean score of all questions of all ``cells``, each with its task, its samples before and now."""
    best: dict[str, float] = {}
    for task, *sides in cells:
        best[task] = max(best.get(task, 1.0), *(float(side["score"].abs().max()) for side in sides))
    before, now = (_pooled([(task, sides[side], best[task]) for task, *sides in cells]) for side in (0, 1))
    return MetricChange("score", "mean score of all questions", 1.0, before.value, now.value, drop_of_run(before, now))


def _pooled(cells: Sequence[tuple[str, pd.DataFrame, float]]) -> Measured:
    """The questions of all ``cells`` as those of one, each with its task, samples and best score."""
    frames = [
        samples.assign(image=task + "/" + samples["image"].astype(str), score=samples["score"] / best)
        for task, samples, best in cells
    ]
    return measure("score", [pd.concat(frames, ignore_index=True)], maximum=1.0)


def p_drop(comparison: Comparison) -> float:
    """One-sided p of a drop: half of two-sided p, since without a difference both tests are symmetric."""
    return comparison.p / 2 if comparison.difference < 0 else 1.0


def _facts(before: BaselineCell, now: pd.DataFrame) -> list[FactChange]:
    """The deterministic facts that changed."""
    pairs = list(zip((before.prefills[number] for number in before.prefill), prefills_of(now), strict=True))
    changes = []
    for fact, title in FACTS.items():
        differ = [row for row, (old, new) in enumerate(pairs) if not old.agrees(new, fact)]
        if differ:
            old, new = (getattr(side, fact) for side in pairs[differ[0]])
            changes.append(FactChange(title, len(differ), int(now.at[differ[0], "doc_id"]), old, new))
    return changes


def _notes(baseline: Baseline, run: dict[str, Cell]) -> list[str]:
    """What differs and does not count: versions, the machine, options that only one side knows."""
    notes: dict[str, None] = {}
    for part, before in baseline.environment.model_dump(exclude={"host"}).items():
        for cell in run.values():
            now = getattr(cell.metrics.environment, part)
            keys = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
            notes |= {f"{part}: {key} was {before.get(key)} and is {now.get(key)}": None for key in keys}
    for stored in baseline.cells:
        old, new = stored.config.options, run[name_of(stored.config)].config.options
        notes |= {f"{stored.config.method}: option {key} is new, {new[key]}": None for key in sorted({*new} - {*old})}
        notes |= {f"{stored.config.method}: option {key} is gone": None for key in sorted({*old} - {*new})}
    return list(notes)


def _same_cells(run: dict[str, Cell], stored: dict[str, BaselineCell]) -> None:
    missing, extra = [name for name in stored if name not in run], [name for name in run if name not in stored]
    if missing:
        instead = f", and has {len(extra)} that it does not know (first: {extra[0]})" if extra else ""
        remedy = "run the baseline's own configuration" if extra else "let the sweep finish"
        raise DataError(
            f"the run lacks {len(missing)} of the baseline's {len(stored)} cells (first: {missing[0]}){instead}: "
            f"{remedy}; {IF_MEANT}"
        )
    if extra:
        raise DataError(f"the baseline lacks {len(extra)} of the run's cells (first: {extra[0]}): {IF_MEANT}")


def _same_experiment(name: str, before: BaselineCell, cell: Cell, questions: Questions) -> None:
    """Raise :class:`DataError` unless model, settings, questions and metrics agree."""
    models = model_of(cell.config), model_of(before.config)
    if models[0] != models[1]:
        raise DataError(f"{name} is of model {models[0]}, the baseline of {models[1]}: load that one; {IF_MEANT}")
    old, new = _settings(before.config), _settings(cell.config)
    for key in old:
        if key in new and old[key] != new[key]:
            raise DataError(f"{name} ran with {key} {new[key]}, the baseline with {old[key]}: set it so; {IF_MEANT}")
    if not asked_of(cell).same(questions):
        raise DataError(
            f"{name} was asked other questions than the baseline (data hash {cell.metrics.data_hash}, there "
            f"{questions.data_hash}): run on the same data; {IF_MEANT}"
        )
    keys = [[score.key for score in scores] for scores in (cell.metrics.scores, before.metrics)]
    if keys[0] != keys[1]:
        raise DataError(f"{name} is scored by {', '.join(keys[0])}, the baseline by {', '.join(keys[1])}: {IF_MEANT}")


def _settings(config: CellConfig) -> dict[str, Any]:
    settings = config.model_dump(mode="json", exclude=_ELSEWHERE)
    return settings | {f"option {key}": value for key, value in config.options.items()}
