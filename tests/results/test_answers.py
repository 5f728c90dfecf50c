"""Answers as statistics read them: once from each file, what was asked held once, and the same whatever the form."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint
from storing import config, frame, put
from tabled import answered
from visibench.errors import DataError
from visibench.results.statistics import intervals, sign_flip
from visibench.results.statistics.answers import Answers, answers, check_same_questions
from visibench.results.statistics.comparison import compare
from visibench.results.statistics.metrics import measure
from visibench.results.store import columns, disk
from visibench.results.store.store import Store
from visibench.results.tables.render import fitted
from visibench.results.tables.tables import build


def stored(tmp_path, samples, label="none"):
    return answers(put(Store(tmp_path), config(label, label=label), samples=samples))


def test_a_table_reads_each_file_of_samples_once_and_holds_what_was_asked_once(tmp_path, monkeypatch):
    store, rng = Store(tmp_path), np.random.default_rng(0)
    for label in ("none", "random", "fastv", "downsample"):
        answered(store, label, rng.random(60) < 0.7)
    read, columns_read = [], []
    monkeypatch.setattr(disk, "read", lambda file, old=disk.read: read.append(file.name) or old(file))
    monkeypatch.setattr(
        columns, "_checked", lambda *args, old=columns._checked: columns_read.append(args[-1]) or old(*args)
    )
    tables = build(store.cells())
    fitted(tables, None, None)
    assert read.count("samples.parquet") == 4
    assert all("kept" not in names and "answer" in names for names in columns_read)
    found = [answers(cell) for row in tables[0].rows for cell in row.cells]
    assert len({id(one.asked) for one in found}) == 1


def test_rows_that_stand_in_another_order_are_the_same_answers(tmp_path):
    samples = frame(["a", "a", "b", "c"], [1, 0, 0.5, 1], answer=["x", "y", "z", None], visual_tokens=[[4, 2]] * 4)
    here, there = (stored(tmp_path / name, one) for name, one in (("one", samples), ("two", samples[::-1])))
    assert here.score.tolist() == there.score.tolist() == [1, 0, 0.5, 1]
    assert here.said.tolist() == there.said.tolist() == ["x", "y", "z", None]
    assert here.asked is there.asked
    assert here.normalised.tolist() == ["x", "y", "z", ""]
    check_same_questions(here, samples)
    with pytest.raises(DataError, match=r"1 of 4 questions differ \(first: doc_id 2\)"):
        check_same_questions(here, samples.assign(prompt=["q0", "q1", "Q2", "q3"]))


@pytest.mark.parametrize(
    ("prompt", "tokens", "adapts"),
    [
        ([4, 4, 6], [[4, 2], [4, 2], [6, 3]], False),
        ([4, 4, 6], [[4, 2], [4, 1], [6, 3]], True),
        ([4, 4, 6], [[4, 2], [4], [6, 3]], True),
        ([4, 4, 6], [[4], [4], [6, 3]], False),
    ],
)
def test_tokens_by_layer_may_be_as_many_as_they_like(tmp_path, prompt, tokens, adapts):
    found = stored(tmp_path, frame(list("abc"), [1, 0, 1], prompt_visual_tokens=prompt, visual_tokens=tokens))
    assert found.adapts is adapts
    assert found.spread == pytest.approx(np.var([np.mean(layers) for layers in tokens]))


def test_samples_in_memory_and_those_of_a_file_measure_the_same(tmp_path):
    rng = np.random.default_rng(1)
    samples = frame(rng.integers(0, 9, 40).astype(str), rng.random(40) < 0.5)
    one, other = measure("s", [samples]), measure("s", [stored(tmp_path, samples)])
    assert (one.sums == other.sums).all()
    assert dataclasses.asdict(intervals.estimate(one)) == dataclasses.asdict(intervals.estimate(other))
    assert isinstance(Answers.of(samples), Answers)


@pytest.mark.parametrize(("right", "of"), [(0, 20), (3, 20), (20, 20), (713, 1000)])
def test_a_share_of_questions_with_images_of_their_own_has_wilsons_interval(right, of):
    found = measure("s", [frame([str(i) for i in range(of)], np.arange(of) < right)])
    error = np.sqrt(right / of * (1 - right / of) / of) or 0.0
    t = intervals.quantile(found)
    low, high = intervals._wilson(right / of, error, of, t)
    from scipy.special import ndtr

    assert [low, high] == pytest.approx(proportion_confint(right, of, alpha=2 * ndtr(-t), method="wilson"), abs=1e-12)


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (0, 1), (3, 3), (2, 9), (40, 11)])
def test_mcnemars_test_is_that_of_statsmodels(better, worse):
    number = np.arange(better + worse + 5)
    one = frame(number.astype(str), number < better)
    two = one.assign(score=((better <= number) & (number < better + worse)).astype(float))
    found = compare(measure("s", [one]), measure("s", [two]))
    assert found.mcnemar_p == pytest.approx(mcnemar([[0, better], [worse, 0]], exact=True).pvalue, rel=1e-12)


def test_sums_in_a_table_are_those_that_are_counted_one_by_one(monkeypatch):
    steps = np.random.default_rng(2).integers(-4, 5, 300)[:, None].astype(float)
    steps = steps[steps[:, 0] != 0]
    filled = sign_flip._all_sums(steps)
    monkeypatch.setattr(sign_flip, "_convolved", lambda steps: pytest.fail("not by the table"))
    monkeypatch.setattr(sign_flip, "LIMIT", 10**9)
    both = np.hstack([steps, np.zeros_like(steps)])  # two columns go the other way
    one_by_one = sign_flip._all_sums(both)
    known = pd.Series(filled[1], filled[0][:, 0])
    assert pd.Series(one_by_one[1], one_by_one[0][:, 0]).sub(known, fill_value=0).abs().max() < 1e-15
