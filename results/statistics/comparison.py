"""Two methods on the same questions: their difference, its interval and its exact test, and families of such tests.

The p-value is McNemar's exact one where scores are 0 or 1 and each image has one question, else that of the sign-flip
test by image (:mod:`~visibench.results.statistics.sign_flip`).

Interval and test never contradict each other: the 95 % interval holds 0 if and only if p ≥ 0.05. Tango's interval
mostly does so by itself. Where few answers change it may not, for exact tests move in steps; there the limit on the
side of 0 is the one of the test (Miettinen 1976), with the error that its p-value stands for: difference / t(p). So
the interval errs no more often than the exact test where there is no difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import bdtr, stdtrit

from .intervals import NOTHING, Paired, freedom, quantile
from .metrics import Measured
from .power import ALPHA, detectable
from .sign_flip import FLIPS, FLIPS_PER_TEST, sign_flip

MCNEMAR, SIGN_FLIP = "exact McNemar", "sign-flip by image"


@dataclass(frozen=True)
class Comparison:
    """``difference``: first minus second method on the same questions, in the metric's units, with its 95 % interval.

    ``p``: two-sided, of the named ``test``; ``exact``: all swaps were counted, none drawn at random. ``mcnemar_p``:
    McNemar's exact test, which takes questions as independent; None unless scores are 0 or 1 from one run each.
    ``error``: standard error of the difference. ``detectable``: see
    :func:`~visibench.results.statistics.power.detectable`, for this one test. ``better`` and ``worse``: questions whose
    score the first method has higher, or lower.
    """

    difference: float
    low: float
    high: float
    p: float
    test: str
    exact: bool
    mcnemar_p: float | None
    error: float
    detectable: float | None
    questions: int
    images: int
    better: int
    worse: int


def compare(first: Measured, second: Measured, flips: int = FLIPS) -> Comparison:
    """Two methods on the same questions; ``flips``: random swaps at most, where not all can be counted.

    With several runs (seeds) a side counts as the mean over them, and swaps with the other side's runs in all pairs.
    """
    found = significance(first, second, flips)
    value, paired = first.value - second.value, Paired.of(first, second)
    error = paired.error * (first.maximum or 1.0)
    low, high = _agreeing(value, *paired.limits(quantile(first)), found.p, first)
    return Comparison(
        difference=value,
        low=low,
        high=high,
        p=found.p,
        test=found.name,
        exact=found.exact,
        mcnemar_p=found.mcnemar_p,
        error=error,
        detectable=detectable(error, second),
        questions=first.questions,
        images=first.images,
        better=found.better,
        worse=found.worse,
    )


@dataclass(frozen=True)
class Tested:
    """The test of a :class:`Comparison`, whose fields say what these are."""

    name: str
    p: float
    exact: bool
    mcnemar_p: float | None
    better: int
    worse: int


def significance(first: Measured, second: Measured, flips: int = FLIPS) -> Tested:
    """Whether two methods differ on the same questions, as :func:`compare` says."""
    if first.sums.shape[1:] != second.sums.shape[1:]:
        raise ValueError("measure both methods on the same questions")
    gains = first.scores.mean(0) - second.scores.mean(0)
    better, worse = int((gains > NOTHING).sum()), int((gains < -NOTHING).sum())  # a mean over seeds is rounded
    exact = _mcnemar(better, worse) if first.binary and second.binary else None
    if exact is not None and first.is_mean and first.images == first.questions:
        return Tested(MCNEMAR, exact, True, exact, better, worse)
    p, counted = sign_flip(first, second, flips)
    return Tested(SIGN_FLIP, p, counted, exact, better, worse)


def _mcnemar(better: int, worse: int) -> float:
    """Twice the chance of so few heads or fewer among so many throws of a coin."""
    return min(1.0, 2 * float(bdtr(min(better, worse), better + worse, 0.5)))


def _agreeing(value: float, low: float, high: float, p: float, first: Measured) -> tuple[float, float]:
    """Limits that hold 0 if and only if the test shows nothing."""
    if math.isnan(low) or (low <= 0 <= high) == (p >= ALPHA):
        return low, high
    far = max(abs(low), abs(high))
    at_p = max(float(stdtrit(freedom(first), 1 - p / 2)), NOTHING)
    near = max(abs(value) * (1 - quantile(first) / at_p), -far)
    return (near, high) if value > 0 else (low, -near)


def family(pairs: Sequence[tuple[Measured, Measured]]) -> list[tuple[Comparison, float]]:
    """Each pair compared, with p adjusted (Holm) over all of them."""
    compared = [compare(first, second, flips_for(len(pairs))) for first, second in pairs]
    return list(zip(compared, holm([comparison.p for comparison in compared]), strict=True))


def flips_for(tests: int) -> int:
    """Random swaps that resolve a p-value at the smallest of Holm's levels in a family of so many tests."""
    return max(FLIPS, FLIPS_PER_TEST * tests)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values of a family of tests."""
    # statsmodels' multipletests has Python collect its garbage at every call, and a table has dozens of families.
    order, tests = np.argsort(p, kind="stable"), len(p)
    stepped = np.maximum.accumulate(np.arange(tests, 0, -1) * np.asarray(p, float)[order])
    adjusted = np.empty(tests)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted.tolist()
