"""Two methods on the same questions of one task: scores, differences, and the questions that tell them apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ...errors import DataError
from ..store.store import Cell
from ..tables.tables import differences
from .inference import Entrant
from .metrics import check_same_questions, loyalty
from .stats import Comparison, Estimate, compare, estimate, holm


@dataclass(frozen=True)
class PairedMetric:
    """A metric of both sides, in lmms-eval's units; ``p_holm``: adjusted over the metrics of the task."""

    key: str
    title: str
    maximum: float | None
    first: Estimate
    second: Estimate
    comparison: Comparison
    p_holm: float


@dataclass(frozen=True)
class Pairing:
    """Two sides on ``asked`` questions of the ``total`` of a task.

    ``agreement``: share of equal answers, None if a side has several seeds. ``differs``: what is not the same beside
    the methods. ``discordant``: the questions whose scores differ, with both sides' answers, one a seed.
    """

    task: str
    asked: int
    total: int
    metrics: list[PairedMetric]
    agreement: Estimate | None
    differs: dict[str, list[Any]]
    discordant: list[dict[str, Any]]


def pair(first: Sequence[Cell], second: Sequence[Cell]) -> Pairing:
    """Compare two sides, each the cells of one method on one task, a cell a seed.

    Raises :class:`DataError` if they were not asked the same questions about the same images.
    """
    one, two = Entrant(first), Entrant(second)
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
        metrics=_metrics(one, two, first[0]),
        agreement=estimate(loyalty(runs[1][0], runs[0])) if len(runs[0]) == len(runs[1]) == 1 else None,
        differs={key: [side.get(key) for side in facts] for key in sorted({*facts[0], *facts[1]})},
        discordant=_discordant(*runs),
    )


def _metrics(one: Entrant, two: Entrant, cell: Cell) -> list[PairedMetric]:
    scores = {(cell.config.task, score.key): score for score in cell.metrics.scores}
    common = [metric for metric in scores if metric in one.measured and metric in two.measured]
    if not common:
        raise DataError(
            f"no score of {cell.config.task} can be recomputed from single questions: compare on another task"
        )
    compared = [compare(one.measured[metric], two.measured[metric]) for metric in common]
    return [
        PairedMetric(
            key=metric[1],
            title=scores[metric].title,
            maximum=scores[metric].maximum,
            first=estimate(one.measured[metric]),
            second=estimate(two.measured[metric]),
            comparison=comparison,
            p_holm=p,
        )
        for metric, comparison, p in zip(common, compared, holm([c.p for c in compared]), strict=True)
    ]


def _discordant(one: Sequence[pd.DataFrame], two: Sequence[pd.DataFrame]) -> list[dict[str, Any]]:
    scores = [sum(run["score"].to_numpy() for run in side) / len(side) for side in (one, two)]
    rows = one[0].index[scores[0] != scores[1]]
    return [
        {
            "doc_id": int(one[0].at[row, "doc_id"]),
            "question_id": one[0].at[row, "question_id"],
            "image": one[0].at[row, "image"],
            "question": one[0].at[row, "prompt"],
            "target": one[0].at[row, "target"],
            "first": {"score": float(scores[0][row]), "answers": [run.at[row, "answer"] for run in one]},
            "second": {"score": float(scores[1][row]), "answers": [run.at[row, "answer"] for run in two]},
        }
        for row in rows
    ]
