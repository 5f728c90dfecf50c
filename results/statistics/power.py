"""What so many answers can show: the difference that a test would find, and equivalence within a margin."""

from __future__ import annotations

import math

from scipy.special import betaincinv, stdtr, stdtrit

from .intervals import Paired, freedom, independent
from .metrics import Measured

ALPHA = 0.05
POWER = 0.80


def detectable(error: float, reference: Measured, *, sides: int = 2, tests: int = 1) -> float | None:
    """A true difference δ from ``reference`` that is shown with about 80 % power or more.

    ``error``: standard error of the observed difference. ``sides``: 2 for a difference, 1 for a drop. ``tests``: how
    many there are, by Bonferroni, which is Holm's strictest step.

    δ = z √(e² + δ (1 - δ) / n), in units of the metric's maximum, solved for δ. e: the ``error``, from the answers that
    differ now. The second term is the spread that δ brings with it if it strikes the questions of an image together as
    much as they are right together; n: independent questions. z: the sum of the t quantiles of the level and of the
    power, with the degrees of freedom of the intervals: where a few images have most of the questions, more would
    promise what tests then miss. At least, as many of the n must change as an exact test needs where all change one
    way, k with 2^-k ≤ α / (sides · tests). Of about 20 questions the power is nearer 70 %: exact tests move in steps.
    None where nothing would be shown: the scale ends within δ, or the images are too few.
    """
    images, maximum, value, level = reference.images, reference.maximum, reference.value, ALPHA / (sides * tests)
    needed = math.ceil(-math.log2(level))
    if images < needed or math.isnan(error):
        return None
    z = float(stdtrit(freedom(reference), 1 - level) + stdtrit(freedom(reference), POWER))
    if maximum is None:  # without a scale only the spread that is there is known
        return z * error if error > 0 else None
    e = error / maximum
    n = max(needed, independent(reference))
    a = z**2 / n
    normal = (a + math.sqrt(a**2 + 4 * (1 + a) * (z * e) ** 2)) / (2 * (1 + a))
    shown = maximum * max(normal, float(betaincinv(needed, n - needed + 1, POWER)))  # solves P(≥ needed of n) = power
    room = value if sides == 1 else max(value, maximum - value)
    return shown if shown <= room else None


def equivalence(first: Measured, second: Measured, margin: float) -> float | None:
    """p of the claim that two methods differ by less than ``margin``, a share of the metric's maximum: TOST.

    Two one-sided tests (Schuirmann 1987), paired and clustered by image: how far the difference lies within either end
    of the margin, in standard errors that would be there if it were that end (as in the intervals: answers that never
    differ prove no more than their number). None where that is not known: one image, or a metric without a maximum.
    Raises :class:`ValueError` unless 0 < ``margin`` < 1.
    """
    if not 0 < margin < 1:
        raise ValueError(f"a margin is a share between 0 and 1 of the best score, not {margin:g}")
    paired = Paired.of(first, second)
    if math.isnan(paired.questions):
        return None
    within = [(margin - sign * paired.value) / paired.error_at(sign * margin) for sign in (1, -1)]
    return float(stdtr(freedom(first), -min(within)))
