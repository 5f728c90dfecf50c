"""Intervals and tests for answers to questions that share images.

Images are the units of sampling: questions about one image are right or wrong together, so every interval and every
p-value here works on sums over the questions of an image (:class:`Measured`). Random steps use a fixed seed.

Standard errors
    A mean: cluster-robust (CR1). Any other metric: bootstrap over images that takes the metric again on every resample.
    With t quantiles throughout, of images - 1 degrees of freedom; where some images have more questions than others, of
    as many equal ones as they amount to (Kish).
Intervals (95 %)
    Wilson's, at the number of independent questions that the standard error amounts to: it stays in range and covers
    near 0 and 100 %, where percentiles of the bootstrap do not. Scores without a known maximum: value ± t × error.
    Where answers do not vary at all, which does not prove that they never will, as many questions as images.
Ratios on the same questions
    Ratio ± t × error. Two means: the delta method, cluster-robust (CR1). Any others: both taken again on the same
    resamples of the images.
Differences on the same questions
    Paired: difference ± t × error. The p-value is McNemar's exact one where scores are 0 or 1 and each image has one
    question, else that of the sign-flip test by image: two methods swap all their answers to an image, and the metric
    is taken again; all swaps if they are few, else random ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.special import betaincinv, ndtr, stdtrit
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from .metrics import Floats, Measured

LEVEL = 0.95
ALPHA = 0.05
POWER = 0.80
DRAWS = 2000
FLIPS = 10_000
MCNEMAR, SIGN_FLIP = "exact McNemar", "sign-flip by image"
_SEED = 20250
_NOTHING = 1e-9
_CHUNK = 1000


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % confidence interval, in the metric's units; NaN limits where one image says nothing."""

    value: float
    low: float
    high: float
    questions: int
    images: int

    @property
    def half_width(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Comparison:
    """``difference``: first minus second method on the same questions, in the metric's units, with its 95 % interval.

    ``p``: two-sided, of the named ``test``. ``mcnemar_p``: McNemar's exact test, which takes questions as independent;
    None unless scores are 0 or 1 from one run each. ``error``: standard error of the difference. ``detectable``: see
    :func:`detectable`, for this one test. ``better`` and ``worse``: questions whose score the first method has higher,
    or lower.
    """

    difference: float
    low: float
    high: float
    p: float
    test: str
    mcnemar_p: float | None
    error: float
    detectable: float | None
    questions: int
    images: int
    better: int
    worse: int


def estimate(measured: Measured) -> Estimate:
    """A metric with its interval."""
    value, maximum, images, t = measured.value, measured.maximum, measured.images, _t(measured)
    error = _mean_error(measured.sums[0]) if measured.is_mean else _bootstrap_error(_bootstrap(measured), images)
    if maximum is None or math.isnan(error):
        low, high = value - t * error, value + t * error
    else:
        low, high = _wilson(value / maximum, error / maximum, images, t) * maximum
    return Estimate(value, float(low), float(high), measured.questions, images)


def compare(first: Measured, second: Measured, flips: int = FLIPS) -> Comparison:
    """Two methods on the same questions; ``flips``: random swaps of the sign-flip test.

    With several runs (seeds) a side counts as the mean over them, and swaps with the other side's runs in all pairs.
    """
    if first.sums.shape[1:] != second.sums.shape[1:]:
        raise ValueError("measure both methods on the same questions")
    binary = len(first.scores) == len(second.scores) == 1 and np.isin([first.scores, second.scores], (0, 1)).all()
    scores = first.scores.mean(0), second.scores.mean(0)
    better, worse = int((scores[0] > scores[1]).sum()), int((scores[0] < scores[1]).sum())
    exact = float(mcnemar([[0, better], [worse, 0]], exact=True).pvalue) if binary else None
    low, high, error = _difference(first, second)
    independent = exact is not None and first.is_mean and first.images == first.questions
    return Comparison(
        difference=first.value - second.value,
        low=low,
        high=high,
        p=exact if independent and exact is not None else sign_flip(first, second, flips),
        test=MCNEMAR if independent else SIGN_FLIP,
        mcnemar_p=exact,
        error=error,
        detectable=detectable(error, second),
        questions=first.questions,
        images=first.images,
        better=better,
        worse=worse,
    )


def ratio(first: Measured, second: Measured) -> Estimate:
    """A metric as a share of another method's on the same questions; NaN limits where one image says nothing."""
    value, images, t = first.value / second.value, first.images, _t(first)
    if first.is_mean and second.is_mean:
        error = _mean_error(np.stack([first.sums[0, :, 0], second.sums[0, :, 0]], axis=1))
    else:
        with np.errstate(divide="ignore", invalid="ignore"):
            draws = _bootstrap(first) / _bootstrap(second)
        error = _bootstrap_error(np.where(np.isfinite(draws), draws, np.nan), images)
    if error > _NOTHING or math.isnan(error):
        low, high = value - t * error, value + t * error
    elif value == 0:  # nothing is right: what that proves of the metric itself
        alone = estimate(first)
        low, high = alone.low / second.value, alone.high / second.value
    else:  # the two never differ: what that proves of their difference
        below, above, _ = _difference(first, second)
        low, high = value + below / second.value, value + above / second.value
        if first.maximum is not None:  # no more than the best score over the least that the other one may be
            high = min(high, first.maximum / estimate(second).low)
    return Estimate(value, low if math.isnan(low) else max(low, 0.0), high, first.questions, images)


def detectable(error: float, reference: Measured, *, sides: int = 2, tests: int = 1) -> float | None:
    """A true difference δ from ``reference`` that is shown with about 80 % power or more.

    ``error``: standard error of the observed difference. ``sides``: 2 for a difference, 1 for a drop. ``tests``: how
    many there are, by Bonferroni, which is Holm's strictest step.

    δ = z √(e² + δ (1 - δ) / n), in units of the metric's maximum, solved for δ. e: the ``error``, from the answers that
    differ now. The second term is the spread that δ brings with it if it strikes the questions of an image together as
    much as they are right together; n: independent questions. z: the sum of the t quantiles of the level and of the
    power. At least, as many of the n must change as an exact test needs where all change one way, k with
    2^-k ≤ α / (sides · tests). Of about 20 questions the power is nearer 70 %: exact tests move in steps. None where
    nothing would be shown: the scale ends within δ, or the images are too few.
    """
    images, maximum, value, level = reference.images, reference.maximum, reference.value, ALPHA / (sides * tests)
    needed = math.ceil(-math.log2(level))
    if images < needed or math.isnan(error):
        return None
    z = float(stdtrit(images - 1, 1 - level) + stdtrit(images - 1, POWER))
    if maximum is None:  # without a scale only the spread that is there is known
        return z * error if error > 0 else None
    e = error / maximum
    n = max(needed, min(_independent(estimate(reference), maximum, _t(reference)), reference.questions))
    a = z**2 / n
    normal = (a + math.sqrt(a**2 + 4 * (1 + a) * (z * e) ** 2)) / (2 * (1 + a))
    found = maximum * max(normal, float(betaincinv(needed, n - needed + 1, POWER)))  # solves P(≥ needed of n) = power
    room = value if sides == 1 else max(value, maximum - value)
    return found if found <= room else None


def _independent(estimate: Estimate, maximum: float, t: float) -> float:
    """How many independent questions an interval amounts to: Wilson's farther limit, solved for their number."""
    share, low, high = (value / maximum for value in (estimate.value, estimate.low, estimate.high))
    limit = low if share > 0.5 else high
    return t**2 * limit * (1 - limit) / (share - limit) ** 2


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values of a family of tests."""
    return [float(value) for value in multipletests(p, method="holm")[1]] if p else []


def sign_flip(first: Measured, second: Measured, flips: int = FLIPS) -> float:
    """Two-sided p of the difference when methods are swapped image by image, all of an image's answers together.

    Exact if both are exchangeable within images; for a mean it needs only symmetric differences, or many images.
    """
    left = np.repeat(first.sums, len(second.sums), axis=0)  # every run of one side with every run of the other
    right = np.tile(second.sums, (len(first.sums), 1, 1))
    swap = right - left
    swap = swap[:, swap.any(axis=(0, 2))]
    value, totals = first.metric.value, (left.sum(1), right.sum(1))

    def difference(signs: Floats) -> Floats:
        moved = np.tensordot(signs, swap, axes=(1, 1))
        return (value(totals[0] + moved) - value(totals[1] - moved)).mean(-1)

    images = swap.shape[1]
    observed = abs(float(difference(np.zeros((1, images)))[0]))
    exhaustive = 2**images <= flips
    reached = count = 0
    for signs in _all_signs(images) if exhaustive else _random_signs(images, flips):
        reached += int((np.abs(difference(signs)) >= observed * (1 - 1e-9) - 1e-12).sum())
        count += len(signs)
    return reached / count if exhaustive else (1 + reached) / (1 + count)


def _difference(first: Measured, second: Measured) -> tuple[float, float, float]:
    """Limits and standard error of the difference."""
    images, difference, t = first.images, first.value - second.value, _t(first)
    if first.is_mean:
        paired = first.sums[0] - second.sums[0]
        paired[:, 1] = first.sums[0, :, 1]
        error = _mean_error(paired)
    else:
        error = _bootstrap_error(_bootstrap(first) - _bootstrap(second), images)
    maximum = first.maximum or 1.0
    if error > _NOTHING * maximum or math.isnan(error):
        return difference - t * error, difference + t * error, error
    # No image differs from another in this: the difference is at most the share of questions that disagree.
    low, high = _wilson(min(abs(difference) / maximum, 1.0), 0.0, images, t) * maximum
    low, high = (
        sorted((math.copysign(low, difference), math.copysign(high, difference))) if difference else (-high, high)
    )
    return float(low), float(high), 0.0


def _mean_error(sums: Floats) -> float:
    """Cluster-robust standard error (CR1) of a ratio of sums; ``sums`` (images, 2): scores and numbers of questions."""
    images, (above, below) = len(sums), sums.sum(0)
    if images < 2:
        return math.nan
    residual = sums[:, 0] - above / below * sums[:, 1]
    return math.sqrt(images / (images - 1) * (residual**2).sum()) / below


def _bootstrap_error(draws: Floats, images: int) -> float:
    """Standard deviation of draws, corrected for few images. Draws that miss a category do not count.

    NaN for one image, or if most draws miss a category: such a subset says nothing about the spread.
    """
    if images < 2 or np.isnan(draws).mean() > 0.5:
        return math.nan
    return float(np.nanstd(draws)) * math.sqrt(images / (images - 1))


def _wilson(share: float, error: float, images: int, t: float) -> Floats:
    """Wilson's interval of a share at the number of questions for which ``error`` is its standard error."""
    effective = share * (1 - share) / error**2 if error > _NOTHING else float(images)
    alpha = 2 * ndtr(-t)
    return np.array(proportion_confint(share * effective, effective, alpha=alpha, method="wilson"))


def _t(measured: Measured) -> float:
    """The t quantile of the interval's level; NaN for one image."""
    sizes = measured.sizes
    alike = sizes.sum() ** 2 / (sizes**2).sum()  # images of one size that these amount to
    return float(stdtrit(max(alike - 1, 1.0), (1 + LEVEL) / 2)) if measured.images > 1 else math.nan


def _bootstrap(measured: Measured) -> Floats:
    """The metric on resamples of the images, mean over runs: (draws,)."""
    totals = np.tensordot(_resamples(measured.images), measured.sums, axes=(1, 1))
    return measured.metric.value(totals).mean(-1)


@lru_cache(maxsize=4)
def _resamples(images: int) -> Floats:
    """How often each image is drawn: (draws, images). The same for all methods, so that differences are paired."""
    rng = np.random.default_rng(_SEED)
    return rng.multinomial(images, np.full(images, 1 / images), size=DRAWS).astype(float)


def _all_signs(images: int) -> Iterator[Floats]:
    """All ways to swap some of the images, 0 or 1 each."""
    yield (np.arange(2**images)[:, None] >> np.arange(images) & 1).astype(float)


def _random_signs(images: int, flips: int) -> Iterator[Floats]:
    rng = np.random.default_rng(_SEED)
    for start in range(0, flips, _CHUNK):
        yield rng.integers(0, 2, (min(_CHUNK, flips - start), images), dtype=np.int8).astype(float)
