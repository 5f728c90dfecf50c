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
    Ratios on the same questions: ratio ± t × error.
    Differences on the same questions: Tango's score interval (1998), which is to a paired difference what Wilson's is
    to a share: each limit lies t of the standard errors away that would be there if it were true. At many changes it is
    difference ± t × error; at few, where that misses the truth one time in six, it still covers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.optimize import brentq
from scipy.special import stdtrit

from .metrics import Floats, Measured, once

LEVEL = 0.95
NOTHING = 1e-9
"""A standard error, or a difference of scores, of less than this share of the scale is none."""


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


@once
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
        below, above = Paired.of(first, second).limits(t)
        low, high = value + below / second.value, value + above / second.value
        if first.maximum is not None:  # no more than the best score over the least that the other one may be
            high = min(high, first.maximum / estimate(second).low)
    return Estimate(value, low if math.isnan(low) else max(low, 0.0), high, first.questions, images)


@dataclass(frozen=True)
class Paired:
    """The difference of two methods on the same questions, in shares of the metric's ``maximum`` (None: in its units).

    ``error``: standard error. ``questions``: how many independent ones there are. ``changed``: the share of them that
    differ, as far as the error tells.
    """

    value: float
    error: float
    maximum: float | None
    questions: float

    @classmethod
    def of(cls, first: Measured, second: Measured) -> Paired:
        """Both methods' answers to the same questions."""
        if first.is_mean:
            sums = first.sums[0] - second.sums[0]
            sums[:, 1] = first.sums[0, :, 1]
            error = _mean_error(sums)
        else:
            error = _jackknife_error(_left_out(first) - _left_out(second))
        scale, value = first.maximum or 1.0, first.value - second.value
        known = first.maximum is not None and not math.isnan(error)
        questions = min(independent(first), independent(second)) if known else math.nan
        return cls(value / scale, error / scale, first.maximum, questions)

    @cached_property
    def changed(self) -> float:
        """At least as many as the difference needs; of so many, so different, the error is that of independent ones."""
        return min(max(self.error**2 * self.questions + self.value**2, abs(self.value)), 1.0)

    def error_at(self, true: float) -> float:
        """The standard error if the ``true`` difference is this one: that of its likeliest explanation (Tango 1998)."""
        value, true = (self.value, true) if true >= 0 else (-self.value, -true)
        b, c = (2 - value) * true - self.changed, -(self.changed - value) / 2 * true * (1 - true)
        lost = (math.sqrt(max(b**2 - 8 * c, 0.0)) - b) / 4
        return math.sqrt(max(2 * lost + true * (1 - true), 0.0) / self.questions)

    def limits(self, t: float) -> tuple[float, float]:
        """The true differences from which what was observed lies ``t`` standard errors away, in the metric's units."""
        if self.maximum is None:
            width = t * self.error if self.error > NOTHING else math.nan
            return self.value - width, self.value + width
        if math.isnan(self.error):
            return math.nan, math.nan

        def beyond(true: float) -> float:
            return abs(true - self.value) - t * self.error_at(true)

        low, high = (
            end if beyond(end) <= 0 else float(brentq(beyond, self.value + end * NOTHING, end)) for end in (-1.0, 1.0)
        )
        return low * self.maximum, high * self.maximum


@once
def freedom(measured: Measured) -> float:
    """Degrees of freedom: images - 1, of images of one size that these amount to."""
    sizes = measured.sizes
    return max(sizes.sum() ** 2 / (sizes**2).sum() - 1, 1.0)


@once
def quantile(measured: Measured) -> float:
    """The t quantile of the interval's level; NaN for one image."""
    return float(stdtrit(freedom(measured), (1 + LEVEL) / 2)) if measured.images > 1 else math.nan


@once
def independent(measured: Measured) -> float:
    """How many independent questions an interval amounts to: Wilson's farther limit, solved for their number.

    Not more than there are. Only for metrics with a known maximum.
    """
    interval, maximum, t = estimate(measured), measured.maximum or math.nan, quantile(measured)
    share, low, high = (value / maximum for value in (interval.value, interval.low, interval.high))
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
    centre, scale = share + t**2 / (2 * effective), 1 + t**2 / effective
    width = t * math.sqrt(share * (1 - share) / effective + t**2 / (4 * effective**2))
    return np.array([centre - width, centre + width]) / scale
