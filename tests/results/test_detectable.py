"""The difference that a comparison says it can show, against simulated power."""

import math

import numpy as np
import pytest
from simulated import clustered, of_scores, quick
from visibench.results.statistics.comparison import compare
from visibench.results.statistics.metrics import MEAN, Measured
from visibench.results.statistics.power import detectable


def churned(rng, images, each, rate, gain):
    """One method right wherever ``shared`` is; the other loses ``rate`` and ``gain`` of that, the first ``rate``."""
    draw = rng.random((images, each))
    shared = clustered(rng, images, each, 0.8, 0.3)
    low, high = shared.copy(), shared.copy()
    low[draw < rate + gain], high[draw < rate + gain] = 0, 1
    worse = (draw >= rate + gain) & (draw < 2 * rate + gain)
    low[worse], high[worse] = 1, 0
    return compare(quick(high), quick(low), flips=1000)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("images", "each", "rate", "least"),
    # Of 20 questions, one that changes the other way costs an exact test more than the spread has room for.
    [
        (100, 1, 0.01, 0.8),
        (50, 1, 0.02, 0.8),
        (25, 4, 0.01, 0.8),
        (80, 3, 0.1, 0.8),
        (60, 2, 0, 0.8),
        (20, 1, 0.05, 0.7),
    ],
)
def test_what_a_comparison_prints_as_detectable_is_found_with_80_percent(images, each, rate, least):
    """At the figure itself, as a comparison without any true difference prints it; half of it is not."""
    rng, runs = np.random.default_rng(14), 300
    printed = [churned(rng, images, each, rate, 0.0).detectable for _ in range(100)]
    floor = float(np.median([one for one in printed if one is not None]))

    def shown(gain):
        return np.mean([churned(rng, images, each, rate, gain).p <= 0.05 for _ in range(runs)])

    margin = 3 * math.sqrt(0.8 * 0.2 / runs)
    assert shown(floor) >= least - margin
    assert shown(floor / 2) < least - margin


def test_a_few_images_with_most_of_the_questions_count_as_few():
    """30 images have a question each and two have 30: taken for 32 like ones, tests would find half of what is said."""
    rng, image = np.random.default_rng(15), np.repeat(np.arange(32), [1] * 30 + [30] * 2)

    def measured(scores):
        sums = np.stack([np.bincount(image, scores), np.bincount(image)], axis=1)[None].astype(float)
        return Measured(MEAN, sums, scores[None], sums[0, :, 1], 1.0)

    def compared(gain):
        """Both right where most questions of an image are or none; each gains a tenth, the first ``gain`` more."""
        draw, shared = rng.random(len(image)), rng.random(len(image)) < rng.beta(1.87, 0.47, 32)[image]
        first = np.where(draw < 0.1 + gain, 1.0, np.where(draw > 0.9, 0.0, shared))
        second = np.where(draw < 0.1 + gain, 0.0, np.where(draw > 0.9, 1.0, shared))
        return compare(measured(first), measured(second), flips=1000)

    printed = [compared(0.0).detectable for _ in range(60)]
    floor = float(np.median([one for one in printed if one is not None]))
    assert np.mean([compared(floor).p <= 0.05 for _ in range(200)]) >= 0.8 - 2 * math.sqrt(0.8 * 0.2 / 200)


def test_detectable_effect_of_many_images_is_the_textbook_one():
    many = of_scores(np.tile([[0.0], [1.0]], (50_000, 1)))
    assert detectable(0.05, many) == pytest.approx(0.05 * (1.959964 + 0.841621), rel=2e-3)


def test_too_few_images_detect_nothing():
    """Five images give p = 2 / 2^5 at the least."""
    assert detectable(0.01, of_scores(np.ones((5, 20)))) is None
    assert detectable(0.01, of_scores(np.ones((6, 20)))) is not None
    versus = compare(of_scores(np.ones((5, 20))), of_scores(np.zeros((5, 20))))
    assert (versus.p, versus.detectable) == (0.0625, None)
