"""What a setting of a method costs and keeps: executed multiply-adds, and answers that are the dense model's.

A setting is given up as soon as it can no longer pass, whatever it would answer to the questions that are left. So
those are asked first whose answers most of the settings before it changed: which ones come first decides about the
time that this takes, and nothing about what passes.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np

from ..evals.tasks.tasks import Task
from ..methods import Method, load_method
from ..results.statistics.answers import normalised
from ..results.statistics.intervals import estimate
from ..results.statistics.metrics import measure_values
from ..results.store.calibration_records import Agreement, CalibratedPoint
from ..results.store.samples import Answer
from .asking import Asker
from .prices import Prices

Records = dict[str, dict[int, Answer]]
"""Answers by task and doc_id."""


@dataclass
class SettingBench:
    """Measures settings on the questions that ``asker`` asks of ``tasks``; every one once.

    A setting passes where every task reaches the ``target``, a share of answers, and all together reach ``overall``.
    ``on_point`` is called with each point that was measured. ``methods``: what was measured, by its text. ``floor``:
    searches propose nothing that costs less, in multiply-adds.
    """

    asker: Asker
    tasks: Sequence[Task]
    target: float
    overall: float = 0.0
    on_point: Callable[[CalibratedPoint], Any] = lambda point: None
    points: dict[str, CalibratedPoint] = field(default_factory=dict)
    methods: dict[str, Method] = field(default_factory=dict)
    floor: float = 0.0

    def __post_init__(self) -> None:
        none = load_method("none")
        self.answers = {task.name: self.asker.records(none, task) for task in self.tasks}
        self._said = {name: {doc: _said(one) for doc, one in records.items()} for name, records in self.answers.items()}
        self._changed: Counter[tuple[str, int]] = Counter()
        self.dense = self._point(none, self.answers)
        self.prices = Prices(self.asker, self.tasks, self.answers)

    def measure(self, method: Method, *, everywhere: bool = False) -> CalibratedPoint:
        """The point of a setting; ``everywhere``: all questions are asked, whatever it misses."""
        key = str(method)
        if key not in self.points or (everywhere and not self.points[key].complete):
            records: Records = {task.name: {} for task in self.tasks}
            for task, docs in self._turns():
                records[task.name] |= self.asker.records(method, task, docs)
                if not everywhere and not self._enough(self._shares(records)):
                    break
            changed = [(task, doc) for task, of in records.items() for doc in of if not self._same(task, doc, of)]
            self._changed.update(changed)
            self.points[key], self.methods[key] = self._point(method, records), method
            self.on_point(self.points[key])
        return self.points[key]

    def passes(self, method: Method) -> bool:
        """Whether a setting does."""
        point = self.measure(method)
        return point.complete and self._enough([one.share for one in point.agreement.values()])

    def nearest(self, methods: Iterable[Method]) -> Method | None:
        """Of settings that were measured, the one that keeps most answers, and of equals the one that costs least."""
        order = lambda one: (self.points[str(one)].least.share, -self.points[str(one)].macs)  # noqa: E731
        return max(methods, key=order, default=None)

    def _turns(self) -> Iterator[tuple[Task, set[int]]]:
        """Batches of questions: of each task in turn, those first that change most often."""
        docs = {
            task.name: sorted(self._said[task.name], key=lambda doc: -self._changed[task.name, doc])
            for task in self.tasks
        }
        worst = sorted(self.tasks, key=lambda task: -max(self._changed[task.name, doc] for doc in docs[task.name]))
        size = self.asker.batch_size
        for start in range(0, max(map(len, docs.values())), size):
            for task in worst:
                if batch := docs[task.name][start : start + size]:
                    yield task, set(batch)

    def _enough(self, shares: Sequence[float]) -> bool:
        return min(shares) >= self.target and fmean(shares) >= self.overall

    def _shares(self, records: Records) -> list[float]:
        """Of each task, the share of answers that are the dense ones if all that are not asked yet will be."""
        return [self._kept(task, answers).mean() for task, answers in records.items()]

    def _same(self, task: str, doc: int, answers: dict[int, Answer]) -> bool:
        return doc not in answers or _said(answers[doc]) == self._said[task][doc]

    def _kept(self, task: str, answers: dict[int, Answer]) -> Any:
        return np.array([self._same(task, doc, answers) for doc in self._said[task]], float)

    def _point(self, method: Method, records: Records) -> CalibratedPoint:
        asked = [one for answers in records.values() for one in answers.values()]
        return CalibratedPoint(
            method=method.name,
            spec=str(method),
            macs=fmean(one.executed_macs for one in asked),
            tokens=fmean(fmean(one.visual_tokens) for one in asked),
            agreement={task: self._agreement(task, answers) for task, answers in records.items()},
            complete=len(asked) == sum(map(len, self._said.values())),
            confirmed=self.asker.skip > 0,
        )

    def _agreement(self, task: str, answers: dict[int, Answer]) -> Agreement:
        images = [one.pixels for one in self.answers[task].values()]
        one = estimate(measure_values(self._kept(task, answers), images, 1.0))
        return Agreement(share=one.value, low=one.low, high=one.high, questions=len(answers), images=one.images)


def given(method: Method) -> dict[str, Any]:
    """The options of a method that are not its defaults."""
    changed = [field.name for field in dataclasses.fields(method) if getattr(method, field.name) != field.default]
    return {name: value for name, value in method.hyperparameters().items() if name in changed}


def _said(answer: Answer) -> str:
    return normalised(answer.output)
