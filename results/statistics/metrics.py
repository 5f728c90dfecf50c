"""Metrics as functions of sums over questions, so that they can be taken again on any resample of the images.

lmms-eval aggregates per-question results: GQA and TextVQA by a mean, POPE by counts of right and wrong answers, MME by
the score of pairs of questions, averaged in each category and summed over them. Each is a fixed function of sums over
questions, here over the questions of each image.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ...errors import DataError
from ..store.store import Cell

Floats = NDArray[np.float64]
COUNTS = ["prompt_visual_tokens", "visual_tokens"]
COLUMNS = ["doc_id", "question_id", "image", "category", "prompt", "target", "answer", "score"]
SAME = ["doc_id", "prompt", "target", "image"]
MME_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
_SET_OFF = re.compile(r"^[\"'`“”‘’(\[{]+|[\"'`“”‘’)\]},;:.!?]+$")
RIGHT = 0.5
"""A question counts as right from this score on; only scores of several reference answers (TextVQA) lie in between."""


@dataclass(frozen=True)
class Metric:
    """``value`` of the sum of ``terms`` over the questions that ``asks``.

    ``terms``: samples → (questions, k). ``value``: sums (…, k) → (…), NaN where the metric is not defined.
    ``linear``: the sums of two methods differ in numerators alone, so that sums may be averaged over seeds.
    """

    terms: Callable[[pd.DataFrame], Floats]
    value: Callable[[Floats], Floats]
    linear: bool = True
    asks: Callable[[pd.DataFrame], pd.Series] = lambda samples: samples["doc_id"].notna()


@dataclass(frozen=True)
class Measured:
    """A metric of one method on the questions of a task, by image.

    ``sums`` (runs, images, k): one run a seed, or their mean where the metric is linear. ``scores`` (seeds, questions).
    ``sizes`` (images,): questions of each image. ``maximum``: the best possible value, None if it is not known.
    """

    metric: Metric
    sums: Floats
    scores: Floats
    sizes: Floats
    maximum: float | None

    @property
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

    @property
    def is_mean(self) -> bool:
        """Whether the metric is a mean over questions."""
        return self.metric.linear and self.sums.shape[2] == 2


def measure(key: str, runs: Sequence[pd.DataFrame], maximum: float | None = None) -> Measured:
    """lmms-eval's metric ``key`` on the samples of one method, a run a seed; a mean of scores if it is none of these.

    Raises :class:`DataError` if the runs were asked different questions.
    """
    metric = METRICS.get(key, MEAN)
    for run in runs[1:]:
        check_same_questions(runs[0], run)
    counted = [run[metric.asks(run)] for run in runs]
    image, names = pd.factorize(counted[0]["image"])
    terms = [metric.terms(run) for run in counted]
    sums = np.zeros((len(counted), len(names), terms[0].shape[1]))
    for run_sums, run_terms in zip(sums, terms, strict=True):
        np.add.at(run_sums, image, run_terms)
    scores = np.stack([run["score"].to_numpy(float) for run in counted])
    if metric is MEAN and maximum is None and scores.min() >= 0 and scores.max() <= 1:
        maximum = 1.0
    sizes = np.bincount(image, minlength=len(names)).astype(float)
    return Measured(metric, sums.mean(0, keepdims=True) if metric.linear else sums, scores, sizes, maximum)


def measure_values(values: Floats, images: Sequence[str], maximum: float | None = None) -> Measured:
    """The mean of one value a question (questions,), with the image of each; ``maximum`` 1 for shares."""
    image, names = pd.factorize(np.asarray(images, object))
    sums = np.zeros((1, len(names), 2))
    np.add.at(sums[0], image, np.stack([values, np.ones_like(values)], axis=1))
    sizes = np.bincount(image, minlength=len(names)).astype(float)
    return Measured(MEAN, sums, values[None], sizes, maximum)


def reproduces(key: str, run: pd.DataFrame, stored: float) -> bool:
    """Whether samples give lmms-eval's own value of a metric, so that statistics are about the same quantity."""
    counted = run[METRICS.get(key, MEAN).asks(run)]
    return len(counted) > 0 and math.isclose(measure(key, [run]).value, stored, rel_tol=1e-9, abs_tol=1e-12)


def loyalty(dense: pd.DataFrame, runs: Sequence[pd.DataFrame]) -> Measured:
    """Share of questions answered as the dense model answers them: lower case, without punctuation and extra spaces."""
    for run in runs:
        check_same_questions(dense, run)
    return measure("loyalty", [run.assign(score=agreement(dense, run).astype(float)) for run in runs])


def agreement(dense: pd.DataFrame, run: pd.DataFrame) -> pd.Series:
    """Whether each answer is the dense model's to the same question, as :func:`normalised` reads them."""
    return (run["answer"].map(normalised) == dense["answer"].map(normalised)).astype("boolean")


def difficulty(dense: pd.DataFrame, small: pd.DataFrame, runs: Sequence[pd.DataFrame]) -> dict[str, Measured]:
    """Mean score by VTC-Bench's groups: A, the dense model is right and with a smaller image wrong; B, both are right.

    Empty groups are left out. Source: VTC-Bench (arXiv 2510.07143), where A is what tells methods apart.
    """
    for other in (small, *runs):
        check_same_questions(dense, other)
    right, kept = dense["score"].to_numpy() >= RIGHT, small["score"].to_numpy() >= RIGHT
    groups = {"A": right & ~kept, "B": right & kept}
    return {name: measure("score", [run[group] for run in runs]) for name, group in groups.items() if group.any()}


def answers(cell: Cell) -> pd.DataFrame:
    """The samples of a cell that statistics need, in the order of the questions."""
    samples = cell.samples()
    counts = [column for column in COUNTS if column in samples]
    return samples[COLUMNS + counts].sort_values("doc_id", ignore_index=True)


def check_same_questions(one: pd.DataFrame, other: pd.DataFrame) -> None:
    """Raise :class:`DataError` unless both hold the same questions, targets and images in the same order."""
    if len(one) != len(other):
        raise DataError(
            f"{len(one)} questions cannot be paired with {len(other)}: run both with the same --limit on the same data"
        )
    if one[SAME].equals(other[SAME]):  # as nearly always; spelling all of it out takes ten times as long
        return
    differ = (one[SAME].astype(str).to_numpy() != other[SAME].astype(str).to_numpy()).any(1)
    if differ.any():
        first = one["doc_id"].iloc[int(differ.argmax())]
        raise DataError(
            f"{differ.sum()} of {len(one)} questions differ (first: doc_id {first}), so answers cannot be paired: run "
            "both on the same data"
        )


@lru_cache(maxsize=1 << 16)  # many answers are the same few words
def normalised(answer: str) -> str:
    """An answer in lower case without extra spaces and without the marks that set off a word, as in "a cat." or "(no)".

    Marks inside a word, a sign and a decimal point count: 3.5 is not 35. So does an answer of marks alone.
    """
    words = (_SET_OFF.sub("", word) for word in answer.lower().split())
    return " ".join(filter(None, words)) or answer.strip()


def _ratios(sums: Floats) -> Floats:
    """Sum over categories of numerator / denominator; ``sums`` holds all numerators, then all denominators."""
    above, below = np.split(sums, 2, axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (above / below).sum(-1)


def _scores(samples: pd.DataFrame) -> Floats:
    score = samples["score"].to_numpy(float)
    return np.stack([score, np.ones_like(score)], axis=1)


def _mme(samples: pd.DataFrame) -> Floats:
    """Half of what its pair scores for each question, by category: 100 × accuracy, and 100 if both are right."""
    pair = samples.groupby(["category", "question_id"])["score"]
    if (pair.transform("size") != 2).any():
        raise DataError("MME scores pairs of questions, but some question stands alone: run it again")
    half = 50 * samples["score"].to_numpy(float) + 50 * (pair.transform("sum") == 2).to_numpy(float)
    codes, names = pd.factorize(samples["category"], sort=True)
    member = (codes[:, None] == np.arange(len(names))).astype(float)
    return np.concatenate([half[:, None] * member, member / 2], axis=1)


def _cognition(samples: pd.DataFrame) -> pd.Series:
    return samples["category"].isin(MME_COGNITION)


def _counts(samples: pd.DataFrame) -> Floats:
    """True positives, false positives, false negatives. An answer that is neither yes nor no is none of them."""
    said, truth = (samples[column].str.lower().str.strip() for column in ("answer", "target"))
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
    "mme_perception_score": Metric(_mme, _ratios, asks=lambda samples: ~_cognition(samples)),
    "mme_cognition_score": Metric(_mme, _ratios, asks=_cognition),
    "pope_precision": Metric(_counts, _precision, linear=False),
    "pope_recall": Metric(_counts, _recall, linear=False),
    "pope_f1_score": Metric(_counts, _f1, linear=False),
}
