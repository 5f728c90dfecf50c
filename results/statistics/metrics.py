"""Metrics as functions of sums over questions, so that they can be taken again on any resample of the images.

lmms-eval aggregates per-question results: GQA and TextVQA by a mean, POPE by counts of right and wrong answers, MME by
the score of pairs of questions, averaged in each category and summed over them. Each is a fixed function of sums over
questions, here over the questions of each image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, wraps
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from .answers import Answers, Asked, Clusters, Flags, Floats, check_same_questions, normalised

COLUMNS = ["doc_id", "question_id", "image", "category", "prompt", "target", "answer", "score"]
MME_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
RIGHT = 0.5
"""A question counts as right from this score on; only scores of several reference answers (TextVQA) lie in between."""
Runs = Sequence[Answers] | Sequence[pd.DataFrame]
T = TypeVar("T")


@dataclass(frozen=True)
class Metric:
    """``value`` of the sum of ``terms`` over the questions that ``asks``.

    ``terms``: answers → (questions, k). ``value``: sums (…, k) → (…), NaN where the metric is not defined.
    ``linear``: the sums of two methods differ in numerators alone, so that sums may be averaged over seeds. ``asks``:
    None for all questions.
    """

    terms: Callable[[Answers], Floats]
    value: Callable[[Floats], Floats]
    linear: bool = True
    asks: Callable[[Asked], Flags] | None = None

    def of(self, run: Answers) -> Answers:
        """The answers that count."""
        return run if self.asks is None else run.only(*run.asked.part(self.asks))


@dataclass(frozen=True, eq=False)
class Measured:
    """A metric of one method on the questions of a task, by image.

    ``sums`` (runs, images, k): one run a seed, or their mean where the metric is linear. ``scores`` (seeds, questions).
    ``sizes`` (images,): questions of each image. ``maximum``: the best possible value, None if it is not known.
    ``known``: what was found of it already (:func:`once`).
    """

    metric: Metric
    sums: Floats
    scores: Floats
    sizes: Floats
    maximum: float | None
    known: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def value(self) -> float:
        """The metric on all questions, mean over seeds."""
        return float(self.metric.value(self.sums.sum(1)).mean())

    @property
    def images(self) -> int:
        """Number of images, the units of sampling."""
        return self.sums.shape[1]

    @property
    def questions(self) -> int:
        """Number of questions."""
        return self.scores.shape[1]

    @cached_property
    def binary(self) -> bool:
        """Whether these are scores of one run, all of them 0 or 1."""
        return len(self.scores) == 1 and bool(((self.scores == 0) | (self.scores == 1)).all())

    @property
    def is_mean(self) -> bool:
        """Whether the metric is a mean over questions."""
        return self.metric.linear and self.sums.shape[2] == 2


def once(function: Callable[[Measured], T]) -> Callable[[Measured], T]:
    """A function whose answer is kept as long as what it was asked about."""

    @wraps(function)
    def kept(measured: Measured) -> T:
        known: dict[Callable[[Measured], T], T] = measured.known
        if function not in known:
            known[function] = function(measured)
        return known[function]

    return kept


def measure(key: str, runs: Runs, maximum: float | None = None) -> Measured:
    """lmms-eval's metric ``key`` on the samples of one method, a run a seed; a mean of scores if it is none of these.

    Raises :class:`DataError` if the runs were asked different questions.
    """
    metric = METRICS.get(key, MEAN)
    whole = [Answers.of(run) for run in runs]
    for run in whole[1:]:
        check_same_questions(whole[0], run)
    counted = [metric.of(run) for run in whole]
    images = counted[0].asked.images
    sums = np.stack([images.sums(metric.terms(run)) for run in counted])
    scores = np.stack([run.score for run in counted])
    if metric is MEAN and maximum is None and scores.min() >= 0 and scores.max() <= 1:
        maximum = 1.0
    return Measured(metric, sums.mean(0, keepdims=True) if metric.linear else sums, scores, images.sizes, maximum)


def measure_values(values: Floats, images: Sequence[str], maximum: float | None = None) -> Measured:
    """The mean of one value a question (questions,), with the image of each; ``maximum`` 1 for shares."""
    return _mean_of(values[None], Clusters.of(np.asarray(images, object)), maximum)


def _mean_of(scores: Floats, images: Clusters, maximum: float | None) -> Measured:
    """The mean of ``scores`` (seeds, questions) over questions and seeds."""
    sums = images.sums(np.stack([scores.mean(0), np.ones(scores.shape[1])], axis=1))
    return Measured(MEAN, sums[None], scores, images.sizes, maximum)


def reproduced(key: str, runs: Runs, stored: Sequence[float], maximum: float | None = None) -> Measured | None:
    """The metric as :func:`measure` gives it; None unless samples give lmms-eval's ``stored`` value of each run.

    Only then are statistics about the same quantity.
    """
    metric, whole = METRICS.get(key, MEAN), [Answers.of(run) for run in runs]
    if not all(len(metric.of(run).score) for run in whole):
        return None
    alone = [measure(key, [run], maximum) for run in whole]
    same = (
        math.isclose(one.value, value, rel_tol=1e-9, abs_tol=1e-12) for one, value in zip(alone, stored, strict=True)
    )
    if not all(same):
        return None
    return alone[0] if len(alone) == 1 else measure(key, whole, maximum)


def loyalty(dense: Answers | pd.DataFrame, runs: Runs) -> Measured:
    """Share of questions answered as the dense model answers them: lower case, without punctuation and extra spaces."""
    reference, others = Answers.of(dense), [Answers.of(run) for run in runs]
    for run in others:
        check_same_questions(reference, run)
    same = np.stack([run.normalised == reference.normalised for run in others]).astype(float)
    return _mean_of(same, reference.asked.images, 1.0)


def agreement(dense: pd.DataFrame, run: pd.DataFrame) -> pd.Series:
    """Whether each answer is the dense model's to the same question, as :func:`normalised` reads them."""
    return (run["answer"].map(normalised) == dense["answer"].map(normalised)).astype("boolean")


def difficulty(dense: Answers | pd.DataFrame, small: Answers | pd.DataFrame, runs: Runs) -> dict[str, Measured]:
    """Mean score by VTC-Bench's groups: A, the dense model is right and with a smaller image wrong; B, both are right.

    Empty groups are left out. Source: VTC-Bench (arXiv 2510.07143), where A is what tells methods apart.
    """
    reference, smaller, others = Answers.of(dense), Answers.of(small), [Answers.of(run) for run in runs]
    for other in (smaller, *others):
        check_same_questions(reference, other)
    right, kept = reference.score >= RIGHT, smaller.score >= RIGHT
    groups = {"A": right & ~kept, "B": right & kept}
    return {name: _within(group, others) for name, group in groups.items() if group.any()}


def _within(group: Flags, runs: Sequence[Answers]) -> Measured:
    """The mean score of some questions."""
    scores, images = np.stack([run.score[group] for run in runs]), runs[0].asked.images
    within = images if group.all() else runs[0].asked.images_of(group)
    return _mean_of(scores, within, 1.0 if scores.min() >= 0 and scores.max() <= 1 else None)


def _ratios(sums: Floats) -> Floats:
    """Sum over categories of numerator / denominator; ``sums`` holds all numerators, then all denominators."""
    half = sums.shape[-1] // 2
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios: Floats = (sums[..., :half] / sums[..., half:]).sum(-1)
    return ratios


def _scores(run: Answers) -> Floats:
    return np.stack([run.score, np.ones_like(run.score)], axis=1)


def _mme(run: Answers) -> Floats:
    """Half of what its pair scores for each question, by category: 100 × accuracy, and 100 if both are right."""
    pairs, categories = run.asked.pairs, run.asked.categories
    both = np.bincount(pairs.codes, run.score, len(pairs.names))[pairs.codes] == 2
    half = 50 * run.score + 50 * both
    member = (categories.codes[:, None] == np.arange(len(categories.names))).astype(float)
    return np.concatenate([half[:, None] * member, member / 2], axis=1)


def _cognition(asked: Asked) -> Flags:
    of = [place for place, name in enumerate(asked.categories.names) if name in MME_COGNITION]
    return np.isin(asked.categories.codes, of)


def _perception(asked: Asked) -> Flags:
    return ~_cognition(asked)


def _counts(run: Answers) -> Floats:
    """True positives, false positives, false negatives. An answer that is neither yes nor no is none of them."""
    said, truth = run.plain, run.asked.targets
    counts = [(truth == t) & (said == s) for t, s in (("yes", "yes"), ("no", "yes"), ("yes", "no"))]
    return np.stack(counts, axis=1).astype(float)


def _share(part: Floats, whole: Floats) -> Floats:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def _precision(sums: Floats) -> Floats:
    return _share(sums[..., 0], sums[..., 0] + sums[..., 1])


def _recall(sums: Floats) -> Floats:
    return _share(sums[..., 0], sums[..., 0] + sums[..., 2])


def _f1(sums: Floats) -> Floats:
    precision, recall = _precision(sums), _recall(sums)
    return _share(2 * (precision * recall), precision + recall)


MEAN = Metric(_scores, _ratios)
METRICS = {
    "mme_perception_score": Metric(_mme, _ratios, asks=_perception),
    "mme_cognition_score": Metric(_mme, _ratios, asks=_cognition),
    "pope_precision": Metric(_counts, _precision, linear=False),
    "pope_recall": Metric(_counts, _recall, linear=False),
    "pope_f1_score": Metric(_counts, _f1, linear=False),
}
