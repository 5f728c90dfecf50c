"""What is stored of each question: one record with named fields, from generation to a row of ``samples.parquet``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from ...utils.token_grids import Places

COLUMNS = (
    "task",
    "doc_id",
    "question_id",
    "image",
    "category",
    "prompt",
    "target",
    "output",
    "answer",
    "score",
    "prompt_tokens",
    "new_tokens",
    "prompt_visual_tokens",
    "visual_tokens",
    "kv_lengths",
    "executed_macs",
    "kept",
    "nonfinite",
    "latency_ms",
    "batch_questions",
    "places",
    "batch_macs",
    "pixels",
)
"""Columns of ``samples.parquet`` in their order; :mod:`visibench.evals.answers.cell` adds ``dense_agreement``, whether
the answer is the dense model's (bool, null where that is not known)."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model answered to one question, and what that took.

    ``output``: as generated. ``pixels``: hash of the decoded images. ``visual_tokens``, ``kv_lengths``: an entry a
    decoder layer, visual tokens at its input and entries of its KV cache after prefill. ``executed_macs``:
    multiply-adds of its prefill alone, without padding. ``kept``: see
    :func:`visibench.evals.answers.generate._kept`. ``nonfinite``: some step gave logits that are NaN or infinite.

    ``batch_macs``: multiply-adds that the prefill of its whole batch really executed, padding included (see
    :func:`visibench.evals.compute.flops.executed_by_batch`), divided by the ``batch_questions``: the same for all of
    them. At least the mean of their ``executed_macs``; equal to it where rows are of one length in every layer. Like
    those it has the vision tower for every image, also where its features are reused. None where an early version
    answered.

    ``latency_ms``: measured time of ``generate`` for the whole batch of ``batch_questions`` questions that it was
    answered in: from inputs on the device to the tokens of all its answers on the host, so with vision tower,
    projector, prefill, the method, and decoding up to the longest answer; without the decoding and processing of
    images, and without the tower for images whose features are reused (``--feature-cache-gb``). It is what a request
    in such a batch waits; ``latency_ms / batch_questions``, summed over the questions, is the time of all batches.

    ``places``: where its visual tokens lie, see :mod:`visibench.utils.token_grids`; empty where that is not
    known.
    """

    prompt: str
    output: str
    pixels: str
    prompt_tokens: int
    new_tokens: int
    prompt_visual_tokens: int
    visual_tokens: list[int]
    kv_lengths: list[int]
    executed_macs: float
    kept: str
    nonfinite: bool
    latency_ms: float
    batch_questions: int
    places: Places = field(default_factory=list)
    batch_macs: float | None = None


@dataclass(frozen=True, kw_only=True)
class Sample(Answer):
    """An answer that was scored: a row of ``samples.parquet``.

    ``image``: cluster id. ``category``: None for tasks without. ``answer``: the output as scored. ``score``: that of
    lmms-eval for this question, in the headline metric.
    """

    task: str
    doc_id: int
    question_id: str
    image: str
    category: Any
    target: str
    answer: str
    score: float


def frame(samples: Sequence[Sample]) -> pd.DataFrame:
    """A row a question, with :data:`COLUMNS`; ``places`` as JSON. Cells of early versions lack the later columns."""
    rows = ({column: getattr(sample, column) for column in COLUMNS} for sample in samples)
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return table.assign(places=[json.dumps(sample.places, separators=(",", ":")) for sample in samples])
