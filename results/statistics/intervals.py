"""Intervals for answers to questions that share images.

Images are the units of sampling: questions about one image are right or wrong together, so every interval works on sums
over the questions of an image (:class:`~visibench.results.statistics.metrics.Measured`). No step is random.

Standard errors
    A mean, and the difference or ratio of two: cluster-robust (CR1; of a ratio, by the delta method). Any other metric:
    the jackknife, which takes the metric again without each image in turn (Efron and Stein 1981).
    With t quantiles throughout, of images - 1 degrees of freedom; where some images have more questions than others, of
    as many equal ones as they amount to (Kish).
Intervals (95 %)
    Wilson's, at the number of independent questions that the standard error amounts to: it stays in range and covers
    near 0 and 100 %, where percentiles of a bootstrap do not. Scores without a known maximum: value ± t × error.
    Where answers do not vary at all, which does not prove that they never will, as many questions as images.
    Differences and ratios on the same questions: ± t × error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, stdtrit
from statsmodels.stats.proportion import proportion_confint

from .metrics import Floats, Measured

LEVEL = 0.95
NOTHING = 1e-9
"""A standard error of less than this share of the scale is none."""


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


def estimate(measured: Measured) -> Estimate:
    """A metric with its interval."""
    value, maximum, images, t = measured.value, measured.maximum, measured.images, quantile(measured)
    error = _mean_error(measured.sums[0]) if measured.is_mean else _jackknife_error(_left_out(measured))
    if maximum is None or math.isnan(error):
        low, high = value - t * error, value + t * error
    else:
        low, high = _wilson(value / maximum, error / maximum, images, t) * maximum
    return Estimate(value, float(low), float(high), measured.questions, images)


def ratio(first: Measured, second: Measured) -> Estimate:
    """A metric as a share of another method's on the same questions; NaN limits where one image says nothing."""
    value, images, t = first.value / second.value, first.images, quantile(first)
    if first.is_mean and second.is_mean:
        error = _mean_error(np.stack([first.sums[0, :, 0], second.sums[0, :, 0]], axis=1))
    else:
        with np.errstate(divide="ignore", invalid="ignore"):
            error = _jackknife_error(_left_out(first) / _left_out(second))
    if error > NOTHING or math.isnan(error):
        low, high = value - t * error, value + t * error
    elif value == 0:  # nothing is right: what that proves of the metric itself
        alone = estimate(first)
        low, high = alone.low / second.value, alone.high / second.value
    else:  # the two never differ: what that proves of their difference
        below, above, _ = difference(first, second)
        low, high = value + below / second.value, value + above / second.value
        if first.maximum is not None:  # no more than the best score over the least that the other one may be
            high = min(high, first.maximum / estimate(second).low)
    return Estimate(value, low if math.isnan(low) else max(low, 0.0), high, first.questions, images)


def difference(first: Measured, second: Measured) -> tuple[float, float, float]:
    """Limits and standard error of the difference of two methods on the same questions."""
    images, value, t = first.images, first.value - second.value, quantile(first)
    if first.is_mean:
        paired = first.sums[0] - second.sums[0]
        paired[:, 1] = first.sums[0, :, 1]
        error = _mean_error(paired)
    else:
        error = _jackknife_error(_left_out(first) - _left_out(second))
    maximum = first.maximum or 1.0
    if error > NOTHING * maximum or math.isnan(error):
        return value - t * error, value + t * error, error
    # No image differs from another in this: the difference is at most the share of questions that disagree.
    low, high = _wilson(min(abs(value) / maximum, 1.0), 0.0, images, t) * maximum
    low, high = sorted((math.copysign(low, value), math.copysign(high, value))) if value else (-high, high)
    return float(low), float(high), 0.0


def freedom(measured: Measured) -> float:
    """Degrees of freedom: images - 1, of images of one size that these amount to."""
    sizes = measured.sizes
    return max(sizes.sum() ** 2 / (sizes**2).sum() - 1, 1.0)


def quantile(measured: Measured) -> float:
    """The t quantile of the interval's level; NaN for one image."""
    return float(stdtrit(freedom(measured), (1 + LEVEL) / 2)) if measured.images > 1 else math.nan


def independent(measured: Measured) -> float:
    """How many independent questions an interval amounts to: Wilson's farther limit, solved for their number.

    Not more than there are. Only for metrics with a known maximum.
    """
    found, maximum, t = estimate(measured), measured.maximum or math.nan, quantile(measured)
    share, low, high = (value / maximum for value in (found.value, found.low, found.high))
    limit = low if share > 0.5 else high
    return min(t**2 * limit * (1 - limit) / (share - limit) ** 2, measured.questions)


def _mean_error(sums: Floats) -> float:
    """Cluster-robust standard error (CR1) of a ratio of sums; ``sums`` (images, 2): scores and numbers of questions."""
    images, (above, below) = len(sums), sums.sum(0)
    if images < 2:
        return math.nan
    residual = sums[:, 0] - above / below * sums[:, 1]
    return math.sqrt(images / (images - 1) * (residual**2).sum()) / below


def _left_out(measured: Measured) -> Floats:
    """The metric without each image in turn, mean over runs: (images,); NaN where a category has no other image."""
    return measured.metric.value(measured.sums.sum(1, keepdims=True) - measured.sums).mean(0)


def _jackknife_error(left_out: Floats) -> float:
    """Standard error from the values without each image in turn.

    NaN for one image, or where a category has only one: it says nothing about its spread.
    """
    images = len(left_out)
    if images < 2:
        return math.nan
    return math.sqrt((images - 1) / images * ((left_out - left_out.mean()) ** 2).sum())


def _wilson(share: float, error: float, images: int, t: float) -> Floats:
    """Wilson's interval of a share at the number of questions for which ``error`` is its standard error."""
    effective = share * (1 - share) / error**2 if error > NOTHING else float(images)
    alpha = 2 * ndtr(-t)
    return np.array(proportion_confint(share * effective, effective, alpha=alpha, method="wilson"))
