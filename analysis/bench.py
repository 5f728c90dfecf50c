"""What a setting of a method costs and keeps: executed multiply-adds, and answers that are the dense model's.

A setting is given up as soon as it can no longer pass, whatever it would answer to the questions that are left. So
those are asked first whose answers most of the settings before it changed: which ones come first decides about the
time that this takes, and nothing about what passes.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
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

Records = dict[str, dict[int, Answer]]
"""Answers by task and doc_id."""


@dataclass
class SettingBench:
    """Measures settings on the questions that ``asker`` asks of ``tasks``; every one once.

    A setting passes where every task reaches the ``target``, a share of answers, and all together reach ``overall``.
    ``on_point`` is called with each point that was measured. ``methods``: what was measured, by its text.
    """

    asker: Asker
    tasks: Sequence[Task]
    target: float
    overall: float = 0.0
    on_point: Callable[[CalibratedPoint], Any] = lambda point: None
    points: dict[str, CalibratedPoint] = field(default_factory=dict)
    methods: dict[str, Method] = field(default_factory=dict)

    def __post_init__(self) -> None:
        none = load_method("none")
        self.answers = {task.name: self.asker.records(none, task) for task in self.tasks}
        self._said = {name: {doc: _said(one) for doc, one in records.items()} for name, records in self.answers.items()}
        self._changed: Counter[tuple[str, int]] = Counter()
        self.dense = self._point(none, self.answers)

    def measure(self, method: Method, *, everywhere: bool = False) -> CalibratedPoint:
        """The point of a setting, asked until it cannot pass; ``everywhere``: all questions, whatever it misses."""
        key = str(method)
        if key not in self.points or (everywhere and not self.points[key].complete):
            records: Records = {task.name: {} for task in self.tasks}
            for task, docs in self._turns():
                answers = self.asker.records(method, task, docs)
                self._changed.update((task.name, doc) for doc in answers if not self._same(task.name, doc, answers))
                records[task.name] |= answers
                if not everywhere and not self._enough(records):
                    break
            self.points[key], self.methods[key] = self._point(method, records), method
            self.on_point(self.points[key])
        return self.points[key]

    def passes(self, method: Method) -> bool:
        """Whether a setting does."""
        return self._passed(self.measure(method))

    def cheapest(self, methods: Iterable[Method] | None = None) -> list[Method]:
        """Of those that were measured, or of some, the ones that pass, in order of their multiply-adds."""
        keys = self.points if methods is None else dict.fromkeys(map(str, methods))
        reach = [key for key in keys if self._passed(self.points[key])]
        return [self.methods[key] for key in sorted(reach, key=lambda key: self.points[key].macs)]

    def nearest(self, methods: Iterable[Method]) -> Method | None:
        """Of settings that were measured, the one that keeps most answers, and of equals the one that costs least."""
        points = [(self.points[str(one)], one) for one in methods]
        order = sorted(points, key=lambda both: (-both[0].least.share, both[0].macs))
        return order[0][1] if order else None

    def _turns(self) -> list[tuple[Task, set[int]]]:
        """Batches of questions: of each task in turn, those first whose answers change most often."""
        often, size = self._changed, self.asker.batch_size
        docs = {
            name: [doc for _, doc in sorted((-often[name, doc], doc) for doc in said)]
            for name, said in self._said.items()
        }
        worst = sorted(self.tasks, key=lambda task: -often[task.name, docs[task.name][0]])
        starts = range(0, max(map(len, docs.values())), size)
        batches = [(task, {*docs[task.name][start : start + size]}) for start in starts for task in worst]
        return [(task, batch) for task, batch in batches if batch]

    def _enough(self, records: Records) -> bool:
        """Whether a setting passes if it answers all that it was not asked yet as the dense model does."""
        return self._shares_pass([float(self._kept(task, answers).mean()) for task, answers in records.items()])

    def _passed(self, point: CalibratedPoint) -> bool:
        return point.complete and self._shares_pass([one.share for one in point.agreement.values()])

    def _shares_pass(self, shares: Sequence[float]) -> bool:
        return min(shares) >= self.target and fmean(shares) >= self.overall

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
