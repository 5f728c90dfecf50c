"""Differences of two methods and families of tests, against other libraries and simulated truth."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from simulated import assert_covers, changed, quick
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_paired
from visibench.results.statistics.comparison import compare, family, holm
from visibench.results.statistics.intervals import Paired
from visibench.results.statistics.power import ALPHA, equivalence

# ---- tests and power ----------------------------------------------------------------------------------------------


def rivals(rng, images, each, gain=0.0):
    """Two methods with equal skill up to ``gain``: half of what makes an image hard is common, half is its own."""
    common, own = rng.beta(1.5, 0.5, images), rng.beta(0.75, 0.25, (2, images))
    chance = (common + own) / 2
    chance[0] = np.minimum(chance[0] + gain, 1)
    return [quick((rng.random((images, each)) < c[:, None]).astype(float)) for c in chance]


def test_equal_methods_are_told_apart_in_at_most_5_percent():
    rng, runs = np.random.default_rng(11), 600
    found = [compare(*rivals(rng, 30, 8)) for _ in range(runs)]
    wrong = sum(c.p <= 0.05 for c in found) / runs
    margin = 2 * math.sqrt(0.05 * 0.95 / runs)  # two Monte-Carlo standard errors: 1.8 points
    assert wrong <= 0.05 + margin
    assert wrong >= 0.02  # and the test is not asleep
    assert_covers(sum(c.low <= 0 <= c.high for c in found), runs)
    # The reason why McNemar's test is not the one used here.
    assert sum(c.mcnemar_p <= 0.05 for c in found) / runs > 0.09


def test_equal_methods_against_a_mean_over_seeds():
    """A single run against the mean of five of the same kind, on questions whose difficulty differs."""
    rng, runs, images, each = np.random.default_rng(12), 500, 40, 4
    wrong = 0
    for _ in range(runs):
        chance = rng.beta(1.5, 0.5, (images, 1))
        draws = (rng.random((6, images, each)) < chance).astype(float)
        many = replace(quick(draws[1:].mean(0)), scores=draws[1:].reshape(5, -1))
        wrong += compare(quick(draws[0]), many).p <= 0.05
    assert wrong / runs <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / runs)


def test_power_grows_with_the_effect():
    rng, runs = np.random.default_rng(13), 150
    power = [
        np.mean([compare(*rivals(rng, 60, 4, gain)).p <= 0.05 for _ in range(runs)]) for gain in (0.0, 0.08, 0.16, 0.3)
    ]
    assert power == sorted(power)
    assert power[0] < 0.1
    assert power[-1] > 0.95


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    many = np.random.default_rng(0).random(30) ** 3
    assert holm(list(many)) == pytest.approx(list(multipletests(many, method="holm")[1]))
    assert holm([]) == []


# ---- families: what a table marks ---------------------------------------------------------------------------------


def table(rng, skills, images=34, each=3):
    """Methods with ``skills`` and a dense model: half of what makes an image hard is common to all."""
    common = rng.beta(1.5, 0.5, images)
    chance = (common + rng.beta(1.5, 0.5, (len(skills) + 1, images))) / 2 * np.array([1, *skills])[:, None]
    dense, *others = (quick((rng.random((images, each)) < c[:, None]).astype(float)) for c in chance)
    return family([(other, dense) for other in others])


@pytest.mark.slow
def test_of_tables_of_equal_methods_one_in_twenty_has_any_mark():
    rng, runs = np.random.default_rng(40), 500
    tables = [table(rng, [1.0] * 8) for _ in range(runs)]
    marked = sum(any(p < ALPHA for _, p in rows) for rows in tables) / runs
    assert marked <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / runs)
    alone = sum(any(comparison.p < ALPHA for comparison, _ in rows) for rows in tables) / runs
    assert alone > 0.12, "which is why a mark of a test taken alone is another mark"


def test_a_row_that_is_worse_is_marked_and_no_other_row():
    rng, runs = np.random.default_rng(41), 150
    tables = [table(rng, [0.55] + [1.0] * 7) for _ in range(runs)]
    assert np.mean([rows[0][1] < ALPHA for rows in tables]) > 0.9
    others = np.mean([any(p < ALPHA for _, p in rows[1:]) for rows in tables])
    assert others <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / runs)


# ---- intervals of differences -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("better", "worse", "questions"), [(5, 0, 100), (0, 0, 40), (12, 3, 50), (30, 31, 200)])
def test_errors_are_those_of_the_likeliest_explanation(better, worse, questions):
    """Tango's score statistic, its nuisance parameter found by maximising the likelihood."""
    value, share = (better - worse) / questions, (better + worse) / questions
    paired = Paired(value, math.sqrt((share - value**2) / questions), 1.0, questions)
    for true in (-0.4, -0.05, 0.02, 0.3, 0.6):

        def surprise(lost, true=true):
            same = questions - better - worse
            chances = (better, lost + true), (worse, lost), (same, 1 - 2 * lost - true)
            return -sum(count * math.log(max(chance, 1e-300)) for count, chance in chances if count)

        bounds = (max(0.0, -true), (1 - true) / 2)
        lost = minimize_scalar(surprise, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
        expected = math.sqrt((2 * lost + true - true**2) / questions)
        assert paired.error_at(true) == pytest.approx(expected, abs=2e-6)
        mirrored = Paired(-value, paired.error, 1.0, questions)
        assert mirrored.error_at(-true) == pytest.approx(paired.error_at(true))


CHANGES = [
    (100, 1, 0.02, 0),
    (100, 1, 0.05, 0),
    (34, 3, 0.06, 0.02),
    (34, 3, 0.1, 0.1),
    (17, 6, 0.1, 0.05),
    (34, 3, 0.3, 0.05),
]


@pytest.mark.parametrize(("images", "each", "gained", "lost"), CHANGES)
def test_intervals_cover_and_hold_0_where_the_test_shows_nothing(images, each, gained, lost):
    rng, runs, covered, plain = np.random.default_rng(42), 400, 0, 0
    for _ in range(runs):
        found = compare(*changed(rng, images, each, gained, lost))
        assert (found.low <= 0 <= found.high) == (found.p >= ALPHA)
        assert -1 <= found.low <= found.difference <= found.high <= 1
        covered += found.low <= gained - lost <= found.high
        plain += abs(found.difference - gained + lost) <= 1.99 * found.error
    assert_covers(covered, runs, most=1.0)
    if not lost:
        assert plain < 0.91 * runs, "difference ± t × error would not do"


def test_intervals_of_many_changes_are_the_plain_ones():
    found = compare(*changed(np.random.default_rng(43), 800, 3, 0.3, 0.2))
    assert [found.low, found.high] == pytest.approx(
        found.difference + 1.963 * found.error * np.array([-1, 1]), rel=0.02
    )


# ---- equivalence --------------------------------------------------------------------------------------------------


def test_equivalence_is_the_paired_t_test_twice():
    """Where much changes, the errors at the margin are those that are there."""
    rng = np.random.default_rng(44)
    first, second = changed(rng, 2000, 1, 0.25, 0.24)
    scores = first.scores[0], second.scores[0]
    expected = ttost_paired(*scores, -0.03, 0.03)[0]
    assert 0.001 < expected < 0.5
    assert equivalence(first, second, 0.03) == pytest.approx(expected, rel=0.1)
    with pytest.raises(ValueError, match="share between 0 and 1"):
        equivalence(first, second, 0.0)


@pytest.mark.parametrize(("images", "each", "lost"), [(400, 1, 0.02), (400, 1, 0.0), (60, 6, 0.05), (34, 3, 0.03)])
def test_methods_that_differ_by_the_margin_are_called_equivalent_in_at_most_5_percent(images, each, lost):
    rng, runs = np.random.default_rng(45), 500
    called = np.mean([equivalence(*changed(rng, images, each, 0.1 + lost, lost), 0.1) < ALPHA for _ in range(runs)])
    assert called <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / runs)


def test_methods_that_do_not_differ_are_called_equivalent_where_there_are_questions_enough():
    rng, runs = np.random.default_rng(46), 100
    shown = [
        np.mean([equivalence(*changed(rng, images, 3, 0.03, 0.03), 0.05) < ALPHA for _ in range(runs)])
        for images in (10, 40, 150)
    ]
    assert shown[0] < 0.2
    assert shown == sorted(shown)
    assert shown[-1] > 0.9


def test_answers_that_never_differ_prove_no_more_than_their_number():
    few, many = (quick(np.ones((images, 1))) for images in (20, 200))
    assert equivalence(few, few, 0.05) > ALPHA > equivalence(many, many, 0.05)
    assert equivalence(replace(few, maximum=None), few, 0.05) is None
