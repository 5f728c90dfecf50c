"""What a setting of a method costs and keeps: executed multiply-adds, and answers that are the dense model's."""

from __future__ import annotations

import dataclasses
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


@dataclass
class SettingBench:
    """Measures settings on the questions that ``asker`` asks of ``tasks``; every one once.

    A setting passes where every task reaches the ``target``, a share of answers, and all together reach ``overall``.
    Where a task misses its target the others are not asked. ``on_point`` is called with each point that was measured.
    ``methods``: what was measured, by its text.
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
        dense = {task.name: self.asker.records(none, task) for task in self.tasks}
        self._said = {name: {doc: _said(one) for doc, one in records.items()} for name, records in dense.items()}
        self._images = {name: {doc: one.pixels for doc, one in records.items()} for name, records in dense.items()}
        self.dense = self._point(none, dense)

    def measure(self, method: Method, *, everywhere: bool = False) -> CalibratedPoint:
        """The point of a setting; ``everywhere``: all tasks are asked, whatever one of them misses."""
        key = str(method)
        if key not in self.points:
            records: dict[str, dict[int, Answer]] = {}
            for task in self.tasks:
                records[task.name] = self.asker.records(method, task)
                if not everywhere and self._agreement(task.name, records[task.name]).share < self.target:
                    break
            self.points[key], self.methods[key] = self._point(method, records), method
            self.on_point(self.points[key])
        return self.points[key]

    def passes(self, method: Method) -> bool:
        """Whether a setting does."""
        return self._enough(self.measure(method))

    def cheapest(self, methods: Iterable[Method] | None = None) -> list[Method]:
        """Of those that were measured, or of some, the ones that pass, in order of their multiply-adds."""
        keys = self.points if methods is None else dict.fromkeys(map(str, methods))
        reach = [key for key in keys if self._enough(self.points[key])]
        return [self.methods[key] for key in sorted(reach, key=lambda key: self.points[key].macs)]

    def _enough(self, point: CalibratedPoint) -> bool:
        shares = [one.share for one in point.agreement.values()]
        return point.reaches(self.target) and fmean(shares) >= self.overall

    def _point(self, method: Method, records: dict[str, dict[int, Answer]]) -> CalibratedPoint:
        asked = [one for answers in records.values() for one in answers.values()]
        return CalibratedPoint(
            method=method.name,
            spec=str(method),
            macs=fmean(one.executed_macs for one in asked),
            tokens=fmean(fmean(one.visual_tokens) for one in asked),
            agreement={task: self._agreement(task, answers) for task, answers in records.items()},
            complete=len(records) == len(self.tasks),
            confirmed=self.asker.skip > 0,
        )

    def _agreement(self, task: str, answers: dict[int, Answer]) -> Agreement:
        same = np.array([_said(one) == self._said[task][doc] for doc, one in answers.items()], float)
        one = estimate(measure_values(same, [self._images[task][doc] for doc in answers], 1.0))
        return Agreement(share=one.value, low=one.low, high=one.high, questions=one.questions, images=one.images)


def given(method: Method) -> dict[str, Any]:
    """The options of a method that are not its defaults."""
    changed = [field.name for field in dataclasses.fields(method) if getattr(method, field.name) != field.default]
    return {name: value for name, value in method.hyperparameters().items() if name in changed}


def _said(answer: Answer) -> str:
    return normalised(answer.output)
