"""How long the dense model takes, from one batch: for sweeps of which nothing has run yet."""

from __future__ import annotations

import time
from typing import NamedTuple

from ...engine import prune
from ...methods import load_method
from ...models import LoadedModel
from ..answers.generate import Bridge, questions
from ..compute.timing import time_prefill
from ..settings.config import DENSE
from ..tasks import lmms_eval
from ..tasks.tasks import Task
from .config import SweepConfig

LARGEST = 2**30
"""Bytes of weights of a model that is loaded for this."""


class Pace(NamedTuple):
    """Seconds for a question, answered in batches, and for all prefills that a cell times (0 without ``timing``)."""

    question: float
    prefill: float


def pace(loaded: LoadedModel, task: Task, config: SweepConfig) -> Pace:
    """Answer the first batch of a task with the dense model, twice, and time the second time."""
    size, _ = task.size(config.limit_of(task.name))
    batch = questions(task, min(config.batch_size, size))
    with lmms_eval.quiet(), prune(loaded.model, load_method(DENSE)) as session:
        for _ in range(2):
            bridge = Bridge(loaded, session, task, config.batch_size)
            started = time.perf_counter()
            bridge.answer(batch)
            seconds = time.perf_counter() - started
    return Pace(seconds / len(batch), _prefill(loaded, task, config))


def _prefill(loaded: LoadedModel, task: Task, config: SweepConfig) -> float:
    if config.timing is None:
        return 0.0
    count = min(config.timing.batch_size, task.size(config.limit_of(task.name))[0])
    texts, images = map(list, zip(*(task.question(i) for i in range(count)), strict=True))
    timing = time_prefill(loaded, load_method(DENSE), loaded.inputs(texts, images), warmup=1, repeats=1)
    return timing.times_ms[0] * 1e-3 * (config.timing.warmup + config.timing.repeats)
