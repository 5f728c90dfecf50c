"""Exact paired tests, against SciPy's permutation test, closed forms, and swaps written out question by question."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest, norm, permutation_test
from simulated import clustered, lmms_value, mme, of_scores, pope, quick
from visibench.results.statistics import sign_flip as module
from visibench.results.statistics.comparison import MCNEMAR, SIGN_FLIP, compare
from visibench.results.statistics.metrics import measure
from visibench.results.statistics.sign_flip import EXTREME, sign_flip


def test_mcnemar_where_each_image_has_one_question():
    first, second = np.zeros((40, 1)), np.zeros((40, 1))
    first[:12], second[12:15] = 1, 1
    found = compare(of_scores(first), of_scores(second))
    assert (found.better, found.worse, found.test) == (12, 3, MCNEMAR)
    assert found.p == found.mcnemar_p == pytest.approx(binomtest(3, 15).pvalue)
    assert found.p == pytest.approx(0.03515625)
    assert found.difference == pytest.approx(9 / 40)


def test_few_images_try_all_swaps():
    """All swaps of whole images, as in SciPy's permutation test on the sums of images."""
    rng = np.random.default_rng(9)
    first, second = clustered(rng, 10, 4, 0.8, 0.3), clustered(rng, 10, 4, 0.5, 0.3)
    found = compare(of_scores(first), of_scores(second))
    exact = permutation_test(
        (first.sum(1), second.sum(1)), lambda a, b, axis: a.mean(axis) - b.mean(axis), permutation_type="samples"
    )
    assert found.test == SIGN_FLIP
    assert found.p == pytest.approx(exact.pvalue)


@pytest.mark.parametrize("values", [(0, 1), (0, 0.3, 0.6, 0.9, 1), (0, 1 / 3, 0.5, np.pi / 4)])
def test_scores_in_steps_and_without_any(values):
    """TextVQA's answers are worth tenths; thirds, halves and an irrational share are no multiples of anything."""
    rng = np.random.default_rng(30)
    first, second = rng.choice(values, (2, 11, 3))
    difference = first.sum(1) - second.sum(1)
    exact = permutation_test((difference,), np.sum, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip(quick(first), quick(second)) == (pytest.approx(exact.pvalue), True)


@pytest.mark.parametrize("seed", range(3))
def test_mme_whose_categories_have_other_sizes(seed):
    """Against all swaps of images, taken by lmms-eval's own aggregation."""
    rng = np.random.default_rng(31 + seed)
    one = mme(rng, images=7)
    two = one.assign(score=np.where(rng.random(len(one)) < 0.6, one["score"], 1 - one["score"]))
    differences = []
    for swap in range(2**7):
        swapped = np.array([swap >> int(image) & 1 for image in one["image"]], bool)
        sides = [a.assign(score=np.where(swapped, b["score"], a["score"])) for a, b in ((one, two), (two, one))]
        differences.append(np.subtract(*(lmms_value("mme_perception_score", side) for side in sides)))
    expected = np.mean(np.abs(differences) >= abs(differences[0]) - 1e-9)
    found = compare(*(measure("mme_perception_score", [side]) for side in (one, two)))
    assert (found.p, found.exact) == (pytest.approx(expected), True)


def test_many_images_that_change_alike_are_the_binomial_test():
    """28 images of 60, and 900 of 3000, where no enumeration reaches."""
    for images, better, worse in ((60, 20, 8), (3000, 520, 380)):
        first, second = np.zeros((images, 2)), np.zeros((images, 2))
        first[:better, 0], second[better : better + worse, 1] = 1, 1
        exact = binomtest(worse, worse + better).pvalue  # the images are a question each, in effect
        assert sign_flip(quick(first), quick(second)) == (pytest.approx(exact, rel=1e-9, abs=0), True)


@pytest.mark.parametrize("runs", [1, 3])
def test_many_images_of_many_questions_are_a_convolution(runs):
    """Sums of ± whole numbers, built up image by image; a mean over seeds makes them thirds."""
    rng = np.random.default_rng(32)
    first = (rng.random((200, 6)) < 0.72).astype(float)
    draws = (rng.random((runs, 200, 6)) < 0.65).astype(float)
    second = replace(quick(draws.mean(0)), scores=draws.reshape(runs, -1))
    steps = np.rint(runs * (first.sum(1) - draws.mean(0).sum(1))).astype(int)
    shares = np.ones(1)
    for step in np.abs(steps):
        shares = np.convolve(shares, [0.5, *[0] * (2 * step - 1), 0.5] if step else [1])
    sums = np.arange(len(shares)) - len(shares) // 2
    expected = shares[np.abs(sums) >= abs(steps.sum())].sum()
    assert 1e-12 < expected < 0.05
    assert sign_flip(quick(first), second) == (pytest.approx(expected, rel=1e-9, abs=0), True)


def test_swapping_recomputes_f1():
    """Against swaps of whole images written out question by question."""
    rng = np.random.default_rng(10)
    one = pope(rng, images=7)
    two = pope(rng, images=7).assign(target=one["target"])
    found = compare(measure("pope_f1_score", [one]), measure("pope_f1_score", [two]))
    differences = []
    for swap in range(2**7):
        swapped = np.array([swap >> int(image) & 1 for image in one["image"]], bool)
        mixed = [a.assign(answer=np.where(swapped, b["answer"], a["answer"])) for a, b in ((one, two), (two, one))]
        differences.append(lmms_value("pope_f1_score", mixed[0]) - lmms_value("pope_f1_score", mixed[1]))
    expected = np.mean(np.abs(differences) >= abs(differences[0]) - 1e-12)
    assert found.difference == pytest.approx(differences[0])
    assert found.p == pytest.approx(expected)


def test_where_there_are_too_many_sums_random_swaps_come_to_the_same(monkeypatch):
    rng = np.random.default_rng(33)
    for share in (0.8, 0.65, 0.5):
        first, second = quick(clustered(rng, 60, 4, 0.8, 0.3)), quick(clustered(rng, 60, 4, share, 0.3))
        exact, counted = sign_flip(first, second)
        monkeypatch.setattr(module, "LIMIT", 2)
        drawn, none_left_out = sign_flip(first, second)
        monkeypatch.undo()
        assert (counted, none_left_out) == (True, False)
        assert drawn == pytest.approx(exact, rel=4 / EXTREME**0.5, abs=1e-5)


def test_of_many_images_only_the_kinds_are_drawn(monkeypatch):
    """33,000 images that a swap changes in few ways; one that no other is like, which is a coin."""
    rng, drawn = np.random.default_rng(35), []
    first, second = ((rng.random((33_000, 3)) < share).astype(float) for share in (0.8, 0.7985))
    second[0] = 0.1
    monkeypatch.setattr(
        module, "_random", lambda counts, flips, old=module._random: drawn.append(counts) or old(counts, flips)
    )
    p, exact = sign_flip(quick(first), quick(second))
    changed = np.count_nonzero(np.abs(first.sum(1) - second.sum(1)) > 1e-9)
    assert not exact
    assert [counts.sum() for counts in drawn] == [changed]
    assert len(drawn[0]) <= 7
    # The sum of so many independent parts is as good as normal.
    difference = first.sum(1) - second.sum(1)
    z = difference.sum() / np.sqrt((difference**2).sum())
    assert p == pytest.approx(2 * norm.sf(abs(z)), rel=0.15)
    assert 1e-3 < p < 0.5


def test_what_is_drawn_does_not_depend_on_other_tests(monkeypatch):
    """A larger family asks for more swaps: none is drawn where a thousand were as extreme before."""
    monkeypatch.setattr(module, "LIMIT", 2)
    rng = np.random.default_rng(34)
    first, second = quick(clustered(rng, 60, 4, 0.8, 0.3)), quick(clustered(rng, 60, 4, 0.75, 0.3))
    few, many = (sign_flip(first, second, flips)[0] for flips in (400_000, 900_000))
    assert few == many > EXTREME / 400_000


def test_no_difference_shows_nothing():
    first = np.ones((30, 2))
    assert sign_flip(quick(first), quick(first)) == (1.0, True)
    assert sign_flip(quick(np.tile([[1.0, 0.0]], (30, 1))), quick(np.tile([[0.0, 1.0]], (30, 1)))) == (1.0, True)
