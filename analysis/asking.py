"""Questions asked again and again under different methods: what is the same each time is done once."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from ..engine import prune
from ..engine.vision.features import FeatureStore
from ..evals.answers.checkpoint import KeptAnswers
from ..evals.answers.generate import Bridge, OnFirst, questions
from ..evals.answers.score import Evaluation, score
from ..evals.tasks import lmms_eval
from ..evals.tasks.question import Question
from ..evals.tasks.tasks import Task
from ..methods import Method
from ..models import LoadedModel
from ..results.store.samples import Answer

GIB = 2**30


@dataclass
class Asker:
    """Asks ``loaded`` the first ``limit`` questions of tasks, in batches that each start from seeded generators.

    ``skip``: leave out so many of them; what is asked then cannot be scored, since scorers want all. Vision features
    are shared, and an output that a question had before has the answer and score that it had then.
    ``on_batch`` is called with the number of questions after each batch.
    """

    loaded: LoadedModel
    limit: int | None = None
    batch_size: int = 8
    seed: int = 0
    on_batch: Callable[[int], Any] = lambda answered: None
    skip: int = 0
    features: FeatureStore = field(default_factory=lambda: FeatureStore(GIB))
    _questions: dict[str, list[Question]] = field(default_factory=dict)
    _known: dict[tuple[str, int, str], tuple[str, float]] = field(default_factory=dict)

    def questions(self, task: Task) -> list[Question]:
        """Those that are asked of a task."""
        if task.name not in self._questions:
            self._questions[task.name] = questions(task, task.size(self.limit)[0])[self.skip :]
        return self._questions[task.name]

    def answers(
        self, method: Method, task: Task, on_first: OnFirst | None = None, only: Collection[int] | None = None
    ) -> KeptAnswers:
        """What is answered under ``method``; ``on_first``: see :class:`~visibench.evals.answers.generate.Bridge`.

        ``only``: doc_ids, of the questions to ask.
        """
        asked = [one for one in self.questions(task) if only is None or one.doc_id in only]
        answers = KeptAnswers()
        with lmms_eval.quiet(), prune(self.loaded.model, method, features=self.features) as session:
            bridge = Bridge(
                self.loaded, session, task, self.batch_size, self.on_batch, answers, self.seed, on_first=on_first
            )
            bridge.answer(asked)
        return answers

    def records(self, method: Method, task: Task, only: Collection[int] | None = None) -> dict[int, Answer]:
        """The record of each question, or of some, by doc_id."""
        return of_questions(self.answers(method, task, only=only))

    def evaluated(self, method: Method, task: Task, on_first: OnFirst | None = None) -> Evaluation:
        """The same, scored by lmms-eval."""
        return self._scored(task, self.answers(method, task, on_first))

    def scored(self, method: Method, task: Task, on_first: OnFirst | None = None) -> pd.DataFrame:
        """Output, answer and score of each question, by doc_id: what it had before, or by lmms-eval."""
        answers = self.answers(method, task, on_first)
        records = of_questions(answers)
        if any((task.name, doc_id, record.output) not in self._known for doc_id, record in records.items()):
            self._scored(task, answers)
        rows = [
            (doc_id, record.output, *self._known[task.name, doc_id, record.output])
            for doc_id, record in sorted(records.items())
        ]
        return pd.DataFrame(rows, columns=["doc_id", "output", "answer", "score"])

    def _scored(self, task: Task, answers: KeptAnswers) -> Evaluation:
        evaluation = score(task, answers, limit=self.limit, batch_size=self.batch_size, seed=self.seed)
        for sample in evaluation.samples.itertuples():
            self._known[task.name, sample.doc_id, sample.output] = (sample.answer, sample.score)
        return evaluation


def of_questions(answers: KeptAnswers) -> dict[int, Answer]:
    """The record of each question, by doc_id."""
    return {doc_id: record for batch in answers.batches.values() for doc_id, record in batch.records.items()}
