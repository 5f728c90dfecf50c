"""Questions of a table on which methods and the dense model part, with every method's answer and what it kept.

A method is right on a question if its score is at least :data:`~visibench.results.statistics.metrics.RIGHT` with every
seed, wrong if it is with none; between them it counts as neither.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ...results.statistics.answers import in_order
from ...results.statistics.inference import DENSE
from ...results.statistics.metrics import RIGHT
from ...results.store.records import CellConfig
from ...results.tables.tables import MethodRow, ResultTable
from ...utils.token_grids import Places, kept_tokens, read

Parting = Literal["lost", "gained"]
KINDS: dict[Parting, str] = {"lost": "dense right, methods wrong", "gained": "dense wrong, methods right"}
RULE = (
    "Chosen from the questions on which the dense model is right and some method wrong, or the other way round, in "
    "turn from every task and kind: there first one about an image that is not shown yet, then one on which methods "
    "part from dense that were shown least, then the one that divides the methods most evenly, then the first."
)


@dataclass(frozen=True)
class MethodAnswer:
    """What one method said: ``answers`` and ``score`` by seed, the mean score. ``parts``: not as the dense model.

    ``left``: visual tokens at the last layer's input, and ``kept``, which of the prompt's they are (None: not
    recorded). ``latency_ms``: time in which its batch of ``batch`` questions was answered (None: not recorded), in a
    cell that ``reused`` vision features or not. All these are of the first seed.
    """

    row: MethodRow
    answers: list[str]
    score: float
    right: bool | None
    parts: bool
    left: int
    kept: list[bool] | None
    latency_ms: float | None = None
    batch: int | None = None
    reused: bool = False


@dataclass(frozen=True)
class ShownQuestion:
    """A question with the answers of all rows that were asked it. ``config``: of the dense model's cell."""

    config: CellConfig
    doc_id: int
    question_id: str
    image: str
    category: str
    prompt: str
    target: str
    kind: Parting
    visual_tokens: int
    places: Places
    answers: list[MethodAnswer]


_ASKED = ("doc_id", "question_id", "image", "category", "prompt", "target", "places", "prompt_visual_tokens")
_SHOWN = (*_ASKED, "answer", "score", "latency_ms", "batch_questions", "visual_tokens", "kept")


def _row(table: pa.Table, place: int) -> dict[str, Any]:
    """The question at ``place``, by column."""
    return {name: column[place].as_py() for name, column in zip(table.column_names, table.columns, strict=True)}


class TaskAnswers:
    """The answers of all rows to one task: ``scores`` (rows, questions), means over seeds."""

    def __init__(self, task: str, rows: Sequence[MethodRow]) -> None:
        self.task = task
        self.rows = [row for row in rows if any(cell.config.task == task for cell in row.cells)]
        self.cells = [[cell for cell in row.cells if cell.config.task == task] for row in self.rows]
        self.runs = [[in_order(cell.table(*_SHOWN)) for cell in cells] for cells in self.cells]
        seeds = [np.stack([run["score"].to_numpy().astype(float) for run in runs]) for runs in self.runs]
        self.scores = np.stack([scores.mean(0) for scores in seeds])
        self.right = np.stack([(scores >= RIGHT).all(0) for scores in seeds])
        self.wrong = np.stack([(scores < RIGHT).all(0) for scores in seeds])
        self.dense = next((place for place, row in enumerate(self.rows) if row.method == DENSE), None)

    def parting(self, kind: Parting) -> NDArray[np.bool_]:
        """Bool (rows, questions): the dense model is right (wrong, for ``gained``), the row the opposite."""
        if self.dense is None:
            return np.zeros_like(self.right)
        return self.right[self.dense] & self.wrong if kind == "lost" else self.wrong[self.dense] & self.right

    @cached_property
    def images(self) -> list[str]:
        """The image of each question."""
        return [str(image) for image in self.runs[0][0]["image"].to_pylist()]

    def question(self, place: int, kind: Parting) -> ShownQuestion:
        """The question at ``place``."""
        assert self.dense is not None
        sample = _row(self.runs[self.dense][0], place)
        parting = self.parting(kind)[:, place]
        return ShownQuestion(
            config=self.cells[self.dense][0].config,
            doc_id=int(sample["doc_id"]),
            question_id=str(sample["question_id"]),
            image=str(sample["image"]),
            category=sample["category"] or "",
            prompt=str(sample["prompt"]),
            target=str(sample["target"]),
            kind=kind,
            visual_tokens=int(sample.get("prompt_visual_tokens") or 0),
            places=read(sample.get("places")),
            answers=[self._answer(row, place, bool(parts)) for row, parts in enumerate(parting)],
        )

    def _answer(self, row: int, place: int, parts: bool) -> MethodAnswer:
        samples = [_row(run, place) for run in self.runs[row]]
        first = samples[0]
        timed = first["latency_ms"] is not None
        right, wrong = bool(self.right[row, place]), bool(self.wrong[row, place])
        return MethodAnswer(
            row=self.rows[row],
            answers=[str(sample["answer"]) for sample in samples],
            score=float(self.scores[row, place]),
            right=right if right or wrong else None,
            parts=parts,
            left=int(first["visual_tokens"][-1]),
            kept=kept_tokens(first.get("kept"), int(first.get("prompt_visual_tokens") or 0)),
            latency_ms=float(first["latency_ms"]) if timed else None,
            batch=int(first["batch_questions"]) if timed else None,
            reused=self.cells[row][0].metrics.reused_images > 0,
        )


@dataclass(frozen=True)
class _Candidate:
    answers: TaskAnswers
    place: int
    kind: Parting
    parting: tuple[int, ...]
    even: int

    @property
    def image(self) -> tuple[str, str]:
        return self.answers.task, self.answers.images[self.place]


def choose(table: ResultTable, count: int) -> list[ShownQuestion]:
    """Up to ``count`` questions by :data:`RULE`; none without a dense row."""
    queues = {}
    answered = [TaskAnswers(task, table.rows) for task in table.questions]
    for kind in KINDS:
        for each in answered:
            queues[each.task, kind] = _candidates(each, kind)
    shown: dict[str, Counter[int]] = defaultdict(Counter)
    images: set[tuple[str, str]] = set()
    chosen: list[_Candidate] = []
    while len(chosen) < count and any(queues.values()):
        for (task, _), queue in queues.items():
            if not queue or len(chosen) == count:
                continue
            best = min(queue, key=lambda one: _order(one, images, shown[one.answers.task]))
            queue.remove(best)
            chosen.append(best)
            images.add(best.image)
            shown[task].update(best.parting)
    return [one.answers.question(one.place, one.kind) for one in chosen]


def _order(one: _Candidate, images: set[tuple[str, str]], shown: Counter[int]) -> tuple[bool, int, int, int]:
    return one.image in images, min(shown[row] for row in one.parting), -one.even, one.place


def _candidates(answers: TaskAnswers, kind: Parting) -> list[_Candidate]:
    parting = answers.parting(kind)
    counts, others = parting.sum(0), len(answers.rows) - 1
    return [
        _Candidate(answers, int(place), kind, tuple(map(int, np.flatnonzero(parting[:, place]))), int(even))
        for place, even in enumerate(np.minimum(counts, others - counts))
        if counts[place]
    ]
