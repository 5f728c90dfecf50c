"""Two methods on the same questions of one task: scores, differences, and the questions that tell them apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import DataError
from ..store.facts import differences
from ..store.store import Cell
from .answers import Answers, check_same_questions
from .comparison import Comparison, family
from .inference import MethodRuns
from .intervals import NOTHING, Estimate, estimate
from .metrics import loyalty
from .power import ALPHA, equivalence


@dataclass(frozen=True)
class PairedMetric:
    """A metric of both sides, in lmms-eval's units; ``p_holm``: adjusted over the metrics of the task.

    ``p_equivalent``: of the claim that the sides differ by less than the margin; None without one, and where that
    cannot be tested.
    """

    key: str
    title: str
    maximum: float | None
    first: Estimate
    second: Estimate
    comparison: Comparison
    p_holm: float
    p_equivalent: float | None = None

    @property
    def equivalent(self) -> bool:
        """Whether a difference of less than the margin is shown."""
        return self.p_equivalent is not None and self.p_equivalent < ALPHA


@dataclass(frozen=True)
class Pairing:
    """Two sides on ``asked`` questions of the ``total`` of a task.

    ``agreement``: share of equal answers, None if a side has several seeds. ``differs``: what is not the same beside
    the methods. ``discordant``: the questions whose scores differ, with both sides' answers, one a seed. ``margin``: of
    equivalence, a share of a metric's maximum.
    """

    task: str
    asked: int
    total: int
    metrics: list[PairedMetric]
    agreement: Estimate | None
    differs: dict[str, list[Any]]
    discordant: list[dict[str, Any]]
    margin: float | None = None


def pair(first: Sequence[Cell], second: Sequence[Cell], margin: float | None = None) -> Pairing:
    """Compare two sides, each the cells of one method on one task, a cell a seed.

    ``margin``: also test whether they differ by less than this share of a metric's maximum. Raises :class:`DataError`
    if they were not asked the same questions about the same images.
    """
    one, two = MethodRuns(first), MethodRuns(second)
    (task,), (other,) = one.cells, two.cells
    if task != other:
        raise DataError(f"answers to {task} cannot be paired with answers to {other}: name cells of one task")
    check_same_questions(one.runs[task][0], two.runs[task][0])
    if len({cell.metrics.data_hash for cell in (*first, *second)}) > 1:
        raise DataError("the questions are the same, but the pixels of their images are not: run both on the same data")
    runs = one.runs[task], two.runs[task]
    facts = differences([first[0], second[0]])
    return Pairing(
        task=task,
        asked=first[0].metrics.size,
        total=first[0].metrics.total,
        metrics=_metrics(one, two, first[0], margin),
        agreement=estimate(loyalty(runs[1][0], runs[0])) if len(runs[0]) == len(runs[1]) == 1 else None,
        differs={key: [side.get(key) for side in facts] for key in sorted({*facts[0], *facts[1]})},
        discordant=_discordant(*runs),
        margin=margin,
    )


def _metrics(one: MethodRuns, two: MethodRuns, cell: Cell, margin: float | None) -> list[PairedMetric]:
    scores = {(cell.config.task, score.key): score for score in cell.metrics.scores}
    common = [metric for metric in scores if metric in one.measured and metric in two.measured]
    if not common:
        raise DataError(
            f"no score of {cell.config.task} can be recomputed from single questions: compare on another task"
        )
    pairs = [(one.measured[metric], two.measured[metric]) for metric in common]
    return [
        PairedMetric(
            key=metric[1],
            title=scores[metric].title,
            maximum=scores[metric].maximum,
            first=estimate(first),
            second=estimate(second),
            comparison=comparison,
            p_holm=p,
            p_equivalent=None if margin is None else equivalence(first, second, margin),
        )
        for metric, (first, second), (comparison, p) in zip(common, pairs, family(pairs), strict=True)
    ]


def _discordant(one: Sequence[Answers], two: Sequence[Answers]) -> list[dict[str, Any]]:
    scores = [np.mean([run.score for run in side], axis=0) for side in (one, two)]
    rows = np.flatnonzero(np.abs(scores[0] - scores[1]) > NOTHING)
    asked = one[0].asked.table.take(rows).to_pylist()
    return [
        {
            "doc_id": question["doc_id"],
            "question_id": question["question_id"],
            "image": question["image"],
            "question": question["prompt"],
            "target": question["target"],
            "first": {"score": float(scores[0][row]), "answers": [run.said[row] for run in one]},
            "second": {"score": float(scores[1][row]), "answers": [run.said[row] for run in two]},
        }
        for row, question in zip(rows, asked, strict=True)
    ]
