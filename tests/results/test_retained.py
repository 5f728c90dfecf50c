"""The share of the dense scores that is retained with its interval, and what varies over questions."""

import json
import math

import numpy as np
import pytest
from scipy.stats import t
from simulated import assert_covers, clustered, of_scores, quick
from storing import config, frame, put
from visibench.results.statistics.intervals import estimate, ratio
from visibench.results.statistics.metrics import measure
from visibench.results.store.records import Compute, ScoreRecord, VisualTokens
from visibench.results.store.store import Store
from visibench.results.tables.render import render
from visibench.results.tables.tables import build


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "run")


def pairs(rng, images, each=3, base=0.8, lost=0.2):
    """Scores of the dense model, and of a method that loses some of its right answers: the true ratio is 1 - lost."""
    dense = clustered(rng, images, each, base, 0.3)
    return dense * (rng.random(dense.shape) >= lost), dense


# ---- the ratio of two scores --------------------------------------------------------------------------------------


def test_interval_of_a_ratio_is_that_of_a_paired_bootstrap():
    rng = np.random.default_rng(0)
    ours, dense = pairs(rng, 400)
    found = ratio(of_scores(ours), of_scores(dense))
    drawn = rng.integers(0, 400, (4000, 400))
    draws = ours.sum(1)[drawn].sum(1) / dense.sum(1)[drawn].sum(1)
    assert found.value == pytest.approx(ours.sum() / dense.sum())
    assert found.half_width == pytest.approx(t.ppf(0.975, 399) * draws.std(), rel=0.05)
    assert (found.questions, found.images) == (1200, 400)
    apart = estimate(of_scores(ours)).half_width / dense.mean()
    assert found.half_width < 0.8 * apart, "the same images on both sides make it narrower"


def test_intervals_of_ratios_cover_the_truth():
    rng, hits, runs = np.random.default_rng(1), 0, 400
    for _ in range(runs):
        ours, dense = pairs(rng, 60)
        found = ratio(quick(ours), quick(dense))
        hits += found.low <= 0.8 <= found.high
    assert_covers(hits, runs)


def test_no_difference_and_no_right_answer_are_no_certainty():
    dense = np.ones((30, 2)) * (np.arange(30) < 24)[:, None]
    same, nothing = (ratio(of_scores(scores), of_scores(dense)) for scores in (dense, 0 * dense))
    assert same.value == 1
    assert same.low < 0.97 < 1.03 < same.high
    assert (nothing.value, nothing.low) == (0, 0)
    assert 0.05 < nothing.high < 0.3
    more = [ratio(of_scores(np.tile(dense, (5, 1))), of_scores(np.tile(dense, (5, 1)))), same]
    assert more[0].half_width < more[1].half_width / 3
    assert math.isnan(ratio(of_scores(dense[:1]), of_scores(dense[:1])).low), "one image says nothing"


def test_ratio_of_f1_takes_f1_again_on_every_resample():
    rng = np.random.default_rng(2)
    truth = np.tile(["yes", "no"], 60)
    said = [np.where(rng.random(120) < share, truth, "no") for share in (0.7, 0.95)]
    images = np.repeat(np.arange(40), 3)
    frames = [frame(images, answer == truth, target=truth, answer=answer) for answer in said]
    found = ratio(*(measure("pope_f1_score", [run], 1.0) for run in frames))
    draws = []
    for _ in range(2000):
        rows = (3 * rng.integers(0, 40, 40)[:, None] + np.arange(3)).ravel()
        draws.append(np.divide(*(f1(truth[rows], answer[rows]) for answer in said)))
    assert found.value == pytest.approx(f1(truth, said[0]) / f1(truth, said[1]))
    assert found.half_width == pytest.approx(2.02 * np.std(draws), rel=0.08)


def f1(truth, said):
    hits = ((truth == "yes") & (said == "yes")).sum()
    return 2 * hits / ((truth == "yes").sum() + (said == "yes").sum())


# ---- in tables ----------------------------------------------------------------------------------------------------


def answered(store, method, right, task="gqa", seed=0, kept=None, prompt=16, value=None, **changes):
    """A cell of questions about images of their own; ``kept``: visual tokens of each question in both layers."""
    kept = [8] * len(right) if kept is None else kept
    counts = {"visual_tokens": [[k, k] for k in kept], "prompt_visual_tokens": prompt}
    samples = frame([f"i{i}" for i in range(len(right))], right, **counts)
    score = ScoreRecord(
        key="exact_match", title="score", value=float(np.mean(right)) if value is None else value, maximum=1
    )
    visual = VisualTokens(prompt=16, per_layer=[float(np.mean(kept))] * 2)
    return put(store, config(method, task, seed), samples=samples, scores=[score], visual_tokens=visual, **changes)


def only(store):
    (table,) = build(store.cells())
    return {row.label: row for row in table.rows}


def test_retained_is_the_mean_of_the_tasks_ratios_with_its_interval(store):
    rng = np.random.default_rng(3)
    parts = {}
    for task, images in (("gqa", 90), ("pope", 60)):
        ours, dense = pairs(rng, images, each=1)
        answered(store, "none", dense.ravel(), task)
        answered(store, "fastv", ours.ravel(), task)
        parts[task] = ratio(of_scores(ours), of_scores(dense))
    row, dense = only(store)["fastv"], only(store)["none"]
    assert row.evidence.retained.value == pytest.approx(np.mean([part.value for part in parts.values()]))
    assert row.retained.mean == pytest.approx(100 * row.evidence.retained.value)
    half = math.hypot(*(part.half_width for part in parts.values())) / 2
    assert row.evidence.retained.half_width == pytest.approx(half)
    assert dense.evidence.retained is None
    tables = build(store.cells())
    assert f"{row.retained.mean:.1f} ± {100 * half:.1f}" in render(tables)
    assert "clustered by image: delta method" in render(tables)
    found = json.loads(render(tables, "json"))["tables"][0]["rows"][1]["retained_percent"]
    assert found["high"] - found["low"] == pytest.approx(200 * half)


def test_retained_of_several_seeds_says_both_spreads(store):
    rng = np.random.default_rng(4)
    answered(store, "none", rng.random(80) < 0.9)
    for seed in range(3):
        answered(store, "random", rng.random(80) < 0.5, seed=seed)
    row = only(store)["random"]
    text = render(build(store.cells()))
    assert f"{row.retained.mean:.1f} ± {100 * row.evidence.retained.half_width:.1f} (sd {row.retained.sd:.1f})" in text


def test_retained_has_no_interval_where_samples_do_not_give_the_score(store):
    answered(store, "none", np.ones(20))
    answered(store, "fastv", np.ones(20), value=0.5)
    row = only(store)["fastv"]
    assert (row.retained.mean, row.evidence.retained) == (50, None)


def test_what_varies_is_shown_where_a_method_adapts(store):
    compute = Compute(macs=2e9, macs_sd=3e8, components={})
    answered(store, "none", np.ones(4), kept=[16] * 4, compute=compute)
    answered(store, "tome", np.ones(4), kept=[8] * 4, compute=compute)
    # A fixed share of images of different sizes is no adaptation; other counts of one size are.
    answered(store, "fastv", np.ones(4), kept=[4, 8, 4, 8], prompt=[8, 16, 8, 16], compute=compute)
    answered(store, "visipruner", np.ones(4), kept=[4, 8, 6, 10], compute=compute)
    rows = only(store)
    assert [rows[name].evidence.spread for name in ("none", "tome", "fastv")] == [None] * 3
    assert rows["visipruner"].evidence.spread.tokens == pytest.approx(np.std([4, 8, 6, 10]))
    assert rows["visipruner"].evidence.spread.macs == pytest.approx(3e8)
    text = render(build(store.cells()))
    assert text.count("(sd ") == 2
    assert "7.0 (sd 2.2)" in text
    assert "2.00 (sd 0.30)" in text
    assert "over the questions of a task, where a method adapts to them" in text
