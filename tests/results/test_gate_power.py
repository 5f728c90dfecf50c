"""What the regression gate's tests can show: false alarms and power, against exact tests and simulated truth."""

import math

import numpy as np
import pytest
from scipy.stats import binom, binomtest, permutation_test
from simulated import quick
from visibench.results.gate.gate import drop_of_run, drops_of_cells, p_drop
from visibench.results.statistics.comparison import MCNEMAR, SIGN_FLIP, compare
from visibench.results.statistics.power import ALPHA, detectable


def test_p_values_are_those_of_one_sided_tests():
    rng = np.random.default_rng(2)
    before, now = (rng.random((2, 60, 1)) < np.array([0.8, 0.65])[:, None, None]).astype(float)
    comparison = compare(quick(now), quick(before))
    worse, better = int((now < before).sum()), int((now > before).sum())
    assert comparison.test == MCNEMAR
    assert p_drop(comparison) == pytest.approx(binomtest(worse, worse + better, alternative="greater").pvalue)
    assert p_drop(compare(quick(before), quick(now))) == 1

    before, now = (rng.random((2, 12, 3)) < np.array([0.8, 0.5])[:, None, None]).astype(float)
    comparison = compare(quick(now), quick(before))
    by_image = [(now - before).sum(1)]
    exact = permutation_test(by_image, np.sum, permutation_type="samples", alternative="less", n_resamples=np.inf)
    assert comparison.test == SIGN_FLIP
    assert p_drop(comparison) == pytest.approx(exact.pvalue)


def test_a_sweep_without_a_drop_fails_in_at_most_5_percent():
    """Answers before and now are drawn anew with the same chances, alike within images, in cells of several kinds."""
    rng, runs, alarms = np.random.default_rng(3), 400, 0
    for _ in range(runs):
        pairs = []
        for images, each in ((100, 1), (25, 4)) * 2:
            chance = rng.beta(3, 1, (images, 1))
            before, now = (rng.random((2, images, each)) < chance).astype(float)
            pairs.append((quick(before), quick(now)))
        alarms += any(verdict.dropped for verdict in drops_of_cells(pairs))
    assert alarms / runs <= 0.05


def test_the_gate_is_not_deaf_the_same_noise_with_a_drop_is_an_alarm(monkeypatch):
    rng, runs, alarms = np.random.default_rng(4), 40, 0
    for _ in range(runs):
        chance = rng.beta(3, 1, (50, 1))
        before, now = (rng.random((2, 50, 3)) < chance * np.array([1, 0.5])[:, None, None]).astype(float)
        same = (quick(before), quick(before))
        (verdict, *others) = drops_of_cells([(quick(before), quick(now)), *[same] * 3])
        alarms += verdict.dropped
        assert not any(other.dropped for other in others)
    assert alarms / runs > 0.9


@pytest.mark.parametrize("tests", [1, 25])
@pytest.mark.parametrize("questions", [100, 300])
def test_the_detectable_drop_has_the_power_that_mcnemars_test_gives_it(questions, tests):
    """Where nothing else changes, n right answers turn wrong with probability δ: the exact power is binomial."""
    perfect = quick(np.ones((questions, 1)))
    drop = detectable(0.0, perfect, sides=1, tests=tests)
    wrong = math.ceil(math.log2(tests / ALPHA))  # fewest wrong answers with 2^-k ≤ α / tests
    assert 0.78 <= binom.sf(wrong - 1, questions, drop) <= 0.93


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_the_detectable_drop_is_shown_four_times_in_five_and_half_of_it_is_not(noise, together):
    """Questions share images and answers are noisy; a drop strikes images as scores do, or single questions."""
    rng, tests, runs = np.random.default_rng(5), 25, 150
    before = (rng.random((60, 3)) < rng.beta(4, 1, (60, 1))).astype(float)

    def again(lost):
        chance = rng.beta(5 * lost, 5 * (1 - lost), (60, 1)) if together and lost else lost
        flipped = np.where(rng.random(before.shape) < noise, 1 - before, before)
        return quick(flipped * (rng.random(before.shape) >= chance))

    def shown(drop):
        # Noise turns more right answers wrong than wrong ones right: that is part of the drop.
        drift = noise * (2 * before.mean() - 1)
        after = [again((drop - drift) / (before.mean() - drift)) for _ in range(runs)]
        return np.mean([p_drop(compare(now, quick(before), 2000)) * tests < ALPHA for now in after])

    drop = detectable(compare(again(0), quick(before)).error, quick(before), sides=1, tests=tests)
    assert shown(drop) >= 0.8
    assert shown(drop / 2) < 0.8


def test_where_no_drop_can_be_shown():
    few = quick(np.ones((4, 6)))
    assert detectable(0.0, few, sides=1, tests=25) is None, "2^-4 never falls below 0.05 / 25"
    low = quick((np.arange(100) < 3).astype(float)[:, None])
    assert detectable(0.0, low, sides=1, tests=25) is None, "a score of 3 % cannot fall by more"


# ---- the run as a whole -------------------------------------------------------------------------------------------


def whole_run(rng, cells, images, each, lost, runs):
    """p of the run as a whole, and whether a cell shows a drop by itself; ``lost``: what each right answer may turn to.

    Methods answer the same questions; half of what makes an image hard is common to all of them, before and after.
    """
    common = rng.beta(1.6, 0.4, (runs, 1, images, 1))
    chance = (common + rng.beta(1.6, 0.4, (runs, cells, images, 1))) / 2
    before = rng.random((runs, cells, images, each)) < chance
    again = rng.random(before.shape) < chance
    after = np.where(rng.random(before.shape) < 0.1, again, before) & (rng.random(before.shape) >= lost)
    for old, new in zip(before.astype(float), after.astype(float), strict=True):
        pooled = [side.transpose(1, 0, 2).reshape(images, cells * each) for side in (old, new)]
        alone = [quick(new[cell]) for cell in range(cells)], [quick(old[cell]) for cell in range(cells)]
        yield drop_of_run(quick(pooled[0]), quick(pooled[1])), alone


def test_an_unchanged_run_as_a_whole_fails_in_at_most_its_half_of_5_percent():
    """Before and after share nine answers in ten, as a run on another machine might; methods go wrong together."""
    runs = 1000
    alarms = sum(test.dropped for test, _ in whole_run(np.random.default_rng(7), 12, 30, 3, 0.0, runs))
    assert 0.01 <= alarms / runs <= 0.025 + 2 * math.sqrt(0.025 * 0.975 / runs)


def test_what_the_run_as_a_whole_can_show_is_shown_four_times_in_five_and_no_cell_shows_it():
    rng, runs = np.random.default_rng(8), 150
    printed = [test.detectable for test, _ in whole_run(rng, 52, 34, 3, 0.0, 40)]
    floor = float(np.median(printed))
    assert floor < 0.06, "ten points in all cells are far above it"
    shown = cells = 0
    for test, (after, before) in whole_run(rng, 52, 34, 3, floor / 0.8, runs):
        shown += test.dropped
        if cells < 1000:  # p-values of single cells: Holm's first step over 52 of them and the half of α
            cells += sum(p_drop(compare(n, o)) * 104 < ALPHA for n, o in zip(after[:4], before[:4], strict=True))
    assert shown / runs >= 0.8 - 2 * math.sqrt(0.8 * 0.2 / runs)
    assert cells / (4 * runs) < 0.05
