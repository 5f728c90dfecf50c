"""The paired sign-flip test by image: two methods swap all their answers to an image, and the metric is taken again.

Exact if both are exchangeable within images; for a mean it needs only symmetric differences, or many images.

All swaps are counted wherever that can be done, equal sums together: scores that are whole numbers or tenths give few
different sums, however many images there are, and twenty images that change give no more than a million. Else random
swaps are drawn until a thousand are as extreme as what was observed, which makes the p-value valid at any number of
draws (Besag and Clifford 1991), or until ``flips`` are drawn. What is drawn does not depend on other tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from .metrics import Floats, Measured

FLIPS = 400_000
"""Random swaps of a test that shows something; a p-value of 0.0005 is then known to 7 %."""
FLIPS_PER_TEST = 2_000
"""As many more where a family has more tests, so that the smallest level of Holm's is resolved."""
EXTREME = 1_000
LIMIT = 2**21
"""Most sums that are counted."""
_DENOMINATORS = 1_000
_SEED = 20250
_CHUNK = 4_000
_AT_ONCE = 2**22
"""Numbers of one part of the random swaps: 32 MiB."""
_SLACK = 1e-9
_ROUNDING = 1e-12
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class _Swaps:
    """What swaps do. ``moves`` (images, k): what swapping an image adds, of those images that change anything.

    ``difference``: sums of moves (m, k) → differences of the metric (m,).
    """

    moves: Floats
    difference: Callable[[Floats], Floats]

    @classmethod
    def of(cls, first: Measured, second: Measured) -> _Swaps:
        """The swaps of two methods' answers, image by image, every run of one with every run of the other."""
        value, runs, others = first.metric.value, len(first.sums), len(second.sums)
        # Every run of one side with every run of the other.
        moves = (second.sums[None] - first.sums[:, None]).reshape(runs * others, *first.sums.shape[1:])
        totals = np.repeat(first.sums.sum(1), others, axis=0), np.tile(second.sums.sum(1), (runs, 1))

        def difference(moved: Floats) -> Floats:
            by_run = moved.reshape(-1, *totals[0].shape)
            apart = value(totals[0] + by_run) - value(totals[1] - by_run)
            mean: Floats = apart.sum(-1) / (runs * others)
            return mean

        flat = moves.swapaxes(0, 1).reshape(moves.shape[1], -1)
        if not first.metric.linear:
            return cls(flat[flat.any(axis=1)], difference)
        # Each image adds its own part to the difference, whatever the others do.
        observed = difference(np.zeros((1, flat.shape[1])))
        parts = difference(flat) - observed
        parts = np.where(np.abs(parts) > _SLACK * np.abs(parts).max(initial=0), parts, 0)
        return cls(parts[parts != 0, None], lambda moved: observed + moved[:, 0])

    @property
    def observed(self) -> float:
        """The size of the difference when nothing is swapped."""
        return abs(float(self.difference(np.zeros((1, self.moves.shape[1])))[0]))


def sign_flip(first: Measured, second: Measured, flips: int = FLIPS) -> tuple[float, bool]:
    """Two-sided p of the difference, and whether it is exact; ``flips``: random swaps at most where it is not."""
    swaps = _Swaps.of(first, second)
    observed = swaps.observed
    if observed <= _ROUNDING * max(abs(first.value), abs(second.value)):
        return 1.0, True
    counted = _all_sums(swaps.moves)
    if counted is None:
        return _drawn(swaps, observed, flips), False
    sums, shares = counted
    return min(1.0, float(shares[_reaches(swaps.difference(sums), observed)].sum())), True


def _reaches(differences: Floats, observed: float) -> NDArray[np.bool_]:
    return np.abs(differences) >= observed * (1 - _SLACK)


def _all_sums(moves: Floats) -> tuple[Floats, Floats] | None:
    """All sums of some of the ``moves`` and what share of the swaps gives each; None if they are too many."""
    steps, unit = _as_integers(moves)
    leading = steps[np.arange(len(steps)), (steps != 0).argmax(axis=1)]
    backward = leading < 0  # a swap back is a swap forth seen from its other end
    start = steps[backward].sum(0, keepdims=True)
    forward = np.where(backward[:, None], -steps, steps)
    if forward.shape[1] == 1 and (forward.sum() + 1) * (len(forward) + 1) <= LIMIT:
        steps_made, shares = _convolved(forward[:, 0])
        all_sums: Floats = (start + steps_made[:, None]) * unit
        return all_sums, shares
    distinct, counts = np.unique(forward, axis=0, return_counts=True)
    sums, shares = start, np.ones(1)
    for step, count in zip(distinct, counts, strict=True):
        if len(sums) * (count + 1) > LIMIT:
            return None
        times = np.arange(count + 1)
        sums = (sums[:, None, :] + times[:, None] * step).reshape(-1, len(step))
        sums, shares = _merged(sums, (shares[:, None] * _binomial(count)).ravel())
    return sums * unit, shares


def _convolved(steps: Integers) -> tuple[Integers, Floats]:
    """All sums of some of the positive ``steps``, from 0 up, with the shares: a table of so few is filled at once."""
    counts = np.bincount(steps)
    shares = np.ones(1)
    for step in np.flatnonzero(counts):
        spaced = np.zeros(step * counts[step] + 1)
        spaced[::step] = _binomial(counts[step])
        shares = np.convolve(shares, spaced)
    return np.arange(len(shares)), shares


@lru_cache(maxsize=4096)
def _binomial(count: int) -> Floats:
    """Share of the swaps of ``count`` equal moves in which 0, 1, … of them are made."""
    times = np.arange(count + 1)
    log_share: Floats = gammaln(count + 1) - gammaln(times + 1) - gammaln(count - times + 1) - count * np.log(2)
    return np.exp(log_share)


def _as_integers(moves: Floats) -> tuple[Integers, float]:
    """Moves as whole multiples of a unit: exactly where they are fractions of each other, else to twelve digits."""
    sizes = np.unique(np.abs(moves[moves != 0]))
    relative = sizes / sizes[0]
    for denominator in range(1, _DENOMINATORS + 1):
        if np.abs(relative * denominator - np.rint(relative * denominator)).max() < 1e-7:
            break
    else:
        denominator = 2**40 * sizes[0] / sizes[-1]
    unit = sizes[0] / denominator
    return np.rint(moves / unit).astype(np.int64), float(unit)


def _merged(sums: Integers, shares: Floats) -> tuple[Integers, Floats]:
    """Equal rows of ``sums`` as one, with what they have together."""
    # A hash of 64 bits: among two million rows, two different ones share it once in four million tests.
    codes = sums[:, 0] if sums.shape[1] == 1 else (sums * _keys(sums.shape[1])).sum(1)
    _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    return sums[first], np.bincount(inverse, weights=shares).astype(float)


@lru_cache(maxsize=64)
def _keys(count: int) -> Integers:
    """Odd numbers, with which whole numbers side by side are hashed."""
    return np.random.default_rng(_SEED).integers(2**62, size=count, dtype=np.int64) * 2 + 1


def _drawn(swaps: _Swaps, observed: float, flips: int) -> float:
    # Of images that a swap changes alike, only how many are swapped counts: many images are few kinds.
    kinds, counts = np.unique(swaps.moves, axis=0, return_counts=True)
    order = np.argsort(counts, kind="stable")
    reached = count = 0
    for made in _random(counts[order], flips):
        hits = np.flatnonzero(_reaches(swaps.difference(made @ kinds[order]), observed))
        if reached + len(hits) >= EXTREME:
            return EXTREME / (count + int(hits[EXTREME - reached - 1]) + 1)
        reached, count = reached + len(hits), count + len(made)
    return (1 + reached) / (1 + count)


def _random(counts: Integers, flips: int) -> Iterator[Floats]:
    """How many images of each kind are swapped, of ``counts``, the smallest first: (draws, kinds), in parts."""
    rng, alone = np.random.default_rng(_SEED), int((counts == 1).sum())
    several, chunk = counts[alone:], min(_CHUNK, max(_AT_ONCE // len(counts), 1))
    for start in range(0, flips, chunk):
        draws = min(chunk, flips - start)
        coins = rng.integers(0, 2, (draws, alone), dtype=np.int8)
        yield np.hstack([coins, rng.binomial(several, 0.5, (draws, len(several)))]).astype(float)
