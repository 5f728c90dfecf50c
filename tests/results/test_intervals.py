"""Statistics of answers that share images, against lmms-eval's aggregates, other libraries, and simulated truth."""

import math
from dataclasses import replace

import numpy as np
import pytest
import statsmodels.api
import visibench
from scipy.stats import t
from simulated import assert_covers, clustered, lmms_eval, lmms_value, mme, pope, quick
from storing import frame
from visibench.errors import DataError
from visibench.evals.answers.score import evaluate
from visibench.evals.tasks.tasks import load_tasks
from visibench.results.statistics import metrics
from visibench.results.statistics.answers import Answers
from visibench.results.statistics.comparison import compare
from visibench.results.statistics.intervals import Paired, estimate, freedom
from visibench.results.statistics.metrics import METRICS, Measured, measure, reproduced

# ---- metrics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [*METRICS, "pope_accuracy"])
@pytest.mark.parametrize("seed", range(5))
def test_metrics_equal_lmms_evals_aggregates(key, seed):
    samples = (mme if key.startswith("mme") else pope)(np.random.default_rng(seed))
    assert measure(key, [samples]).value == pytest.approx(lmms_value(key, samples), rel=1e-12)


def test_metrics_of_answers_that_are_never_yes():
    samples = pope(np.random.default_rng(0)).assign(answer="no")
    for key in ("pope_precision", "pope_recall", "pope_f1_score"):
        assert measure(key, [samples]).value == lmms_value(key, samples) == 0


@pytest.mark.parametrize("name", ["gqa", "mme", "textvqa_val", "pope"])
def test_samples_of_an_evaluation_give_its_scores(name, loaded, disk_data):
    rng = np.random.default_rng(1)
    loaded.decode = lambda ids: list(rng.choice(["yes", "Yes.", "no", "a dog"], len(ids)))
    (task,) = load_tasks([name], str(disk_data))
    result = evaluate(loaded, visibench.load_method("none"), task)
    known = [key for key in result.outcome.metrics if key in METRICS or key in ("exact_match", "pope_accuracy")]
    assert {score.key for score in result.outcome.scores} <= set(known)
    for key in known:
        value = result.outcome.metrics[key]
        assert reproduced(key, [result.samples], [value]).value == pytest.approx(value, rel=1e-9)
        assert reproduced(key, [result.samples], [value + 0.01]) is None


def test_cognition_is_what_lmms_eval_says():
    assert set(metrics.MME_COGNITION) == set(lmms_eval("mme").eval_type_dict["Cognition"])


@pytest.mark.parametrize("key", ["pope_f1_score", "pope_precision", "mme_perception_score"])
def test_the_error_is_that_of_lmms_evals_scores_without_each_image_in_turn(key):
    kind, rng = mme if key.startswith("mme") else pope, np.random.default_rng(3)
    one = kind(rng)
    two = one.assign(score=np.where(rng.random(len(one)) < 0.8, one["score"], 1 - one["score"]), answer=np.where(
        rng.random(len(one)) < 0.8, one["answer"], "no"))  # fmt: skip
    asks = METRICS[key].asks
    asked = [samples[asks(Answers.of(samples).asked)] if asks else samples for samples in (one, two)]
    without = [
        [lmms_value(key, samples[samples["image"] != image]) for image in samples["image"].unique()]
        for samples in asked
    ]
    n = len(without[0])

    def error(values):
        return math.sqrt((n - 1) / n * np.square(np.subtract(values, np.mean(values))).sum())

    measured = [measure(key, [samples], 2000.0 if kind is mme else 1.0) for samples in (one, two)]
    found = Paired.of(*measured)
    assert found.error * found.maximum == pytest.approx(error(np.subtract(*without)), rel=1e-9)
    plain = estimate(replace(measured[0], maximum=None))
    assert plain.half_width == pytest.approx(t.ppf(0.975, freedom(measured[0])) * error(without[0]), rel=1e-9)
    # A bootstrap, which draws at random what this takes in turn, comes to about the same.
    weights = rng.multinomial(n, np.full(n, 1 / n), size=4000)
    draws = measured[0].metric.value(np.tensordot(weights, measured[0].sums[0], axes=1))
    assert np.nanstd(draws) == pytest.approx(error(without[0]), rel=0.15)


def test_a_category_with_one_image_says_nothing_about_its_spread():
    category = ["OCR"] * 4 + ["color"] * 2
    samples = frame(list("aabbcc"), [1, 0, 1, 1, 1, 1], category=category, question_id=list("112233"))
    found = estimate(measure("mme_perception_score", [samples], 2000.0))
    assert found.value == pytest.approx(100 * 3 / 4 + 50 + 200)
    assert math.isnan(found.low)


def test_seeds_count_as_their_mean():
    rng = np.random.default_rng(4)
    runs = [pope(rng) for _ in range(3)]
    for key in ("pope_f1_score", "pope_accuracy"):
        single = [measure(key, [run]) for run in runs]
        together = measure(key, runs)
        assert together.value == pytest.approx(np.mean([one.value for one in single]))
        assert (together.questions, together.images) == (120, 20)
        versus = compare(together, single[0])
        assert versus.difference == pytest.approx(together.value - single[0].value)
        assert versus.mcnemar_p is None


def test_pairs_that_are_not_whole():
    with pytest.raises(DataError, match="pairs"):
        measure("mme_perception_score", [mme(np.random.default_rng(0)).iloc[1:]])


# ---- intervals ----------------------------------------------------------------------------------------------------


def test_standard_error_is_the_cluster_robust_one():
    rng = np.random.default_rng(5)
    image = rng.integers(0, 25, 140)
    scores = rng.choice([0, 0.3, 0.6, 0.9, 1], 140)
    samples = frame(image.astype(str), scores)
    found = estimate(measure("exact_match", [samples]))
    fit = statsmodels.api.OLS(scores, np.ones(140)).fit(cov_type="cluster", cov_kwds={"groups": image})
    sizes = np.bincount(image)
    error, quantile = float(fit.bse[0]), t.ppf(0.975, sizes.sum() ** 2 / (sizes**2).sum() - 1)
    # Wilson's limits are where value and limit lie t standard errors apart, the error being that at the limit.
    effective = scores.mean() * (1 - scores.mean()) / error**2
    for limit in (found.low, found.high):
        assert abs(scores.mean() - limit) == pytest.approx(quantile * math.sqrt(limit * (1 - limit) / effective))
    # Without a known range, the plain interval.
    found = estimate(measure("seconds", [samples.assign(score=scores * 50)]))
    assert [found.low, found.high] == pytest.approx(50 * (scores.mean() + quantile * error * np.array([-1, 1])))


@pytest.mark.parametrize(("images", "each", "share", "correlation"), [(30, 3, 0.85, 0.3), (100, 6, 0.9, 0.5)])
def test_coverage_of_means(images, each, share, correlation):
    rng, runs = np.random.default_rng(6), 1000
    found = [estimate(quick(clustered(rng, images, each, share, correlation))) for _ in range(runs)]
    covered = sum(e.low <= share <= e.high for e in found)
    assert_covers(covered, runs)
    # Questions taken as independent, the same interval would miss far more often.
    naive = [estimate(quick(clustered(rng, images, each, share, correlation).reshape(-1, 1))) for _ in range(500)]
    assert np.mean([e.low <= share <= e.high for e in naive]) < 0.92


# Near 100 % with few images the interval errs on the wide side.
@pytest.mark.parametrize(("images", "share", "most"), [(40, 0.85, 0.97), (17, 0.85, 0.97), (17, 0.95, 0.99)])
def test_coverage_of_f1(images, share, most):
    rng, runs, each = np.random.default_rng(7), 1000, 6
    truth = np.tile([1, 0], each // 2)

    def f1(right):
        said = np.where(right > 0, truth, 1 - truth)
        counts = [truth * said, (1 - truth) * said, truth * (1 - said)]
        sums = np.stack([count.sum(1) for count in counts], axis=1)[None].astype(float)
        return Measured(METRICS["pope_f1_score"], sums, right.reshape(1, -1), np.full(len(right), float(each)), 1.0)

    population = f1(clustered(rng, 200_000, each, share, 0.3)).value
    found = [estimate(f1(clustered(rng, images, each, share, 0.3))) for _ in range(runs)]
    covered = sum(e.low <= population <= e.high for e in found)
    assert_covers(covered, runs, most)


def test_coverage_of_mme():
    rng, runs, categories = np.random.default_rng(8), 1000, 5

    def perception(images):
        pairs = clustered(rng, images, 2 * categories, 0.8, 0.3).reshape(images, categories, 2).sum(2)
        scores = np.concatenate([50 * pairs + 100 * (pairs == 2), np.ones_like(pairs)], axis=1)
        sizes = np.full(images, 2.0 * categories)
        return Measured(METRICS["mme_perception_score"], scores[None], pairs.reshape(1, -1), sizes, 200.0 * categories)

    population = perception(200_000).value
    covered = sum(e.low <= population <= e.high for e in (estimate(perception(20)) for _ in range(runs)))
    assert_covers(covered, runs)


@pytest.mark.parametrize("images", [15, 40, 150])
def test_coverage_where_some_images_have_many_more_questions_than_others(images):
    rng, runs = np.random.default_rng(21), 1500
    covered = 0
    for _ in range(runs):
        sizes = rng.geometric(0.2, images)
        right = (rng.random((images, sizes.max())) < rng.beta(1.6, 0.4, images)[:, None]) & (
            np.arange(sizes.max()) < sizes[:, None]
        )
        sums = np.stack([right.sum(1), sizes], axis=1)[None].astype(float)
        found = estimate(Measured(metrics.MEAN, sums, np.zeros((1, sizes.sum())), sizes.astype(float), 1.0))
        covered += found.low <= 0.8 <= found.high
    assert_covers(covered, runs)


def test_coverage_of_mme_where_each_image_belongs_to_one_category():
    rng, runs, categories, each = np.random.default_rng(22), 1000, 5, 12
    member = np.repeat(np.eye(categories), each, axis=0)

    def perception(copies):
        pairs = clustered(rng, copies * len(member), 2, 0.8, 0.3).sum(1)
        half = (50 * pairs + 100 * (pairs == 2))[:, None] * np.tile(member, (copies, 1))
        sums = np.concatenate([half, np.tile(member, (copies, 1))], axis=1)
        sizes = np.full(len(pairs), 2.0)
        return Measured(METRICS["mme_perception_score"], sums[None], pairs.reshape(1, -1), sizes, 200.0 * categories)

    population = perception(2000).value
    covered = sum(e.low <= population <= e.high for e in (estimate(perception(1)) for _ in range(runs)))
    assert_covers(covered, runs)


@pytest.mark.parametrize("key", ["exact_match", "pope_f1_score"])
def test_no_variation_is_no_certainty(key):
    samples = frame(np.repeat(np.arange(10).astype(str), 4), np.ones(40))
    found = estimate(measure(key, [samples], 1.0))
    assert found.value == found.high == pytest.approx(1)
    assert 0.6 < found.low < 0.8  # ten images, all right
    versus = compare(measure(key, [samples], 1.0), measure(key, [samples], 1.0))
    assert (versus.difference, versus.p, versus.error) == (0, 1, 0)
    assert versus.detectable > 0.5, "six of ten images must change one way for p < 0.05"
    assert versus.high == -versus.low == pytest.approx(1 - found.low)


def test_one_image_that_outweighs_the_others_gives_a_wide_interval_and_no_nan():
    sizes, right = np.array([1000, 1, 1, 1, 1, 1, 1]), np.array([600, 1, 0, 1, 1, 0, 1])
    samples = frame(
        np.repeat(np.arange(7), sizes), np.concatenate([np.arange(n) < k for n, k in zip(sizes, right, strict=True)])
    )
    found = measure("exact_match", [samples], 1.0)
    interval, versus = estimate(found), compare(found, found)
    assert 0 <= interval.low < interval.value < interval.high <= 1
    assert not math.isnan(versus.low)
    assert versus.detectable is None or math.isfinite(versus.detectable)


def test_one_image_has_no_interval():
    one = measure("exact_match", [frame(["a"] * 4, [1, 0, 1, 1])])
    found = estimate(one)
    assert found.value == 0.75
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    versus = compare(one, measure("exact_match", [frame(["a"] * 4, [1, 0, 0, 1])]))
    assert math.isnan(versus.low)
    assert versus.p == 1
