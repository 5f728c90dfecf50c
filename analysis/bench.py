"""What a setting of a method costs and keeps: executed multiply-adds, and answers that are the dense model's.

A setting is given up as soon as it can no longer pass, whatever it would answer to the questions that are left. So
those are asked first whose answers have changed under most settings of late: which ones come first decides about the
time that this takes, and nothing about what passes.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
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

Question = tuple[str, int]
"""Task and doc_id."""
LATELY = 0.1
"""What the latest answer to a question counts for, beside those before it."""
ROUNDING = 1e-9


@dataclass(frozen=True)
class Candidate:
    """A setting with ``counts``, int (questions, layers): the visual tokens that it leaves at each layer's input.

    ``macs``: executed multiply-adds of a prefill, mean over questions. ``before``: what else it does, in front of its
    cuts. ``same``, bool (questions,): where it does nothing.
    """

    method: Method
    counts: np.ndarray
    macs: float
    before: str
    same: np.ndarray

    def fate(self, question: int) -> Hashable:
        """What it does to a question, None for nothing; equal fates give equal answers.

        Settings of one method rank tokens alike, so those that leave as many in each layer leave the same ones.
        """
        return (
            None if self.same[question] else (self.method.name, self.before, question, self.counts[question].tobytes())
        )


@dataclass
class SettingBench:
    """Settings on the questions that ``asker`` asks of ``tasks``; each question once under what treats it alike.

    A setting passes where every task reaches the ``target``, a share of answers, and all together reach ``overall``.
    ``points``: of settings that were asked everything, by their text. ``given_up``: of those that were not, the share
    of the asked answers that changed.
    """

    asker: Asker
    tasks: Sequence[Task]
    target: float
    overall: float = 0.0
    points: dict[str, CalibratedPoint] = field(default_factory=dict)
    given_up: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        none = load_method("none")
        self.answers = {
            (task.name, doc): one for task in self.tasks for doc, one in self.asker.records(none, task).items()
        }
        self.questions: list[Question] = [*self.answers]
        self._total = Counter(name for name, _ in self.questions)
        self._lately = dict.fromkeys(self.questions, 0.0)
        self._heard: dict[Hashable, tuple[bool, Answer]] = {
            (str(none), question): (True, one) for question, one in self.answers.items()
        }
        self.dense = self.measure(none)
        del self.points[str(none)]

    def passes(self, method: Method, foreseen: Candidate | None = None) -> bool:
        """Whether a setting does; ``foreseen``: what is known of it, so that what was answered counts again."""
        key = str(method)
        if key not in self.points and key not in self.given_up:
            self._ask(method, foreseen, everywhere=False)
        point = self.points.get(key)
        return point is not None and self._enough(self._shares(point))

    def measure(self, method: Method, foreseen: Candidate | None = None) -> CalibratedPoint:
        """The point of a setting on all questions, whatever it misses."""
        if str(method) not in self.points:
            self._ask(method, foreseen, everywhere=True)
        return self.points[str(method)]

    def _ask(self, method: Method, foreseen: Candidate | None, *, everywhere: bool) -> None:
        key, heard = str(method), self._heard
        fates = {
            question: (key, question) if foreseen is None else foreseen.fate(number)
            for number, question in enumerate(self.questions)
        }
        same = {one: fate is None or heard[fate][0] for one, fate in fates.items() if fate is None or fate in heard}
        size = self._spare + 1
        while len(same) < len(fates) and (everywhere or self._can_pass(same)):
            left = sorted((one for one in fates if one not in same), key=lambda one: -self._lately[one])
            for one, answer in self._answers(method, left[:size]):
                same[one] = _said(answer) == _said(self.answers[one])
                heard[fates[one]] = same[one], answer
                self._lately[one] += LATELY * ((not same[one]) - self._lately[one])
            size *= 2
        if len(same) < len(fates):
            self.given_up[key] = sum(not kept for kept in same.values()) / len(same)
        elif foreseen is None:
            answers = [heard[fate][1] for fate in fates.values()]
            tokens = fmean(fmean(one.visual_tokens) for one in answers)
            self.points[key] = self._point(method, same, fmean(one.executed_macs for one in answers), tokens)
        else:
            self.points[key] = self._point(method, same, foreseen.macs, float(foreseen.counts.mean()))

    def _answers(self, method: Method, questions: Sequence[Question]) -> Iterator[tuple[Question, Answer]]:
        for task in self.tasks:
            docs = {doc for name, doc in questions if name == task.name}
            if docs:
                for doc, answer in self.asker.records(method, task, docs).items():
                    yield (task.name, doc), answer

    @property
    def _spare(self) -> int:
        """How many answers may change, at most."""
        of_all, each = len(self.questions) * (1 - self.overall), [n * (1 - self.target) for n in self._total.values()]
        return int(min(of_all, sum(each)) + ROUNDING)

    def _can_pass(self, same: Mapping[Question, bool]) -> bool:
        """Whether a setting passes if it answers all that it was not asked yet as the dense model does."""
        changed = Counter(name for (name, _), kept in same.items() if not kept)
        return self._enough([1 - changed[name] / total for name, total in self._total.items()])

    def _enough(self, shares: Sequence[float]) -> bool:
        return min(shares) >= self.target - ROUNDING and fmean(shares) >= self.overall - ROUNDING

    def _shares(self, point: CalibratedPoint) -> list[float]:
        return [one.share for one in point.agreement.values()]

    def _point(self, method: Method, same: Mapping[Question, bool], macs: float, tokens: float) -> CalibratedPoint:
        return CalibratedPoint(
            method=method.name,
            spec=str(method),
            macs=macs,
            tokens=tokens,
            agreement={task.name: self._agreement(task.name, same) for task in self.tasks},
            confirmed=self.asker.skip > 0,
        )

    def _agreement(self, task: str, same: Mapping[Question, bool]) -> Agreement:
        asked = [question for question in self.questions if question[0] == task]
        kept, images = [same[one] for one in asked], [self.answers[one].pixels for one in asked]
        one = estimate(measure_values(np.array(kept, float), images, 1.0))
        return Agreement(share=one.value, low=one.low, high=one.high, questions=len(asked), images=one.images)


def given(method: Method) -> dict[str, Any]:
    """The options of a method that are not its defaults."""
    changed = [field.name for field in dataclasses.fields(method) if getattr(method, field.name) != field.default]
    return {name: value for name, value in method.hyperparameters().items() if name in changed}


def _said(answer: Answer) -> str:
    return normalised(answer.output)
