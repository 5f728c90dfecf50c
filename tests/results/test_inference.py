"""Statistics in tables, and two methods compared on the command line."""

import csv
import io
import json
import math
import statistics

import numpy as np
import pandas as pd
import pytest
from storing import config, frame, full, put
from visibench.cli import main
from visibench.errors import DataError
from visibench.results.statistics.answers import normalised
from visibench.results.statistics.comparison import compare
from visibench.results.statistics.inference import MethodRuns, mean_of
from visibench.results.statistics.intervals import Estimate
from visibench.results.statistics.metrics import difficulty, loyalty, measure
from visibench.results.statistics.paired import pair
from visibench.results.store.records import ScoreRecord, VisualTokens
from visibench.results.store.store import Store
from visibench.results.tables.columns import spread
from visibench.results.tables.render import render
from visibench.results.tables.tables import build


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "run")


def answered(store: Store, method: str, right, *, tokens=8.0, task="gqa", seed=0, label=None, options=None, **changes):
    """Store a cell whose questions, three about each image, are answered right where ``right`` says so."""
    n = len(right)
    samples = pd.DataFrame(
        {
            "doc_id": range(n),
            "question_id": [str(100 + i) for i in range(n)],
            "image": [f"i{i // 3}" for i in range(n)],
            "category": None,
            "prompt": [f"Question {i}?\nAnswer shortly." for i in range(n)],
            "target": "yes",
            "answer": ["yes" if correct else "no" for correct in right],
            "score": np.asarray(right, float),
        }
    )
    cell = config(method, task, seed, label=label or method, options=options or {})
    scores = [ScoreRecord(key="exact_match", title="exact match", value=samples["score"].mean(), maximum=1)]
    visual = VisualTokens(prompt=16, per_layer=[tokens, tokens])
    return put(store, cell, samples=samples, scores=scores, visual_tokens=visual, size=n, total=750, **changes)


@pytest.fixture
def contest(store) -> Store:
    """120 questions about 40 images: dense, fastv as good as dense, tome and smaller images worse, random worst."""
    rng = np.random.default_rng(0)
    easy = rng.random(120)
    answered(store, "none", easy < 0.9, tokens=16)
    answered(store, "fastv", (easy < 0.9) ^ (rng.random(120) < 0.03))
    answered(store, "tome", easy < 0.6, tokens=5)
    answered(store, "downsample", easy < 0.7)
    for seed in range(3):
        for tokens, share in ((8, 0.3), (4, 0.2)):
            options = {"tokens": tokens, "seed": seed}
            right = rng.random(120) < share
            answered(store, "random", right, seed=seed, label=f"random:{tokens}", options=options, tokens=tokens)
    return store


def as_rows(store: Store) -> dict:
    (table,) = json.loads(render(build(store.cells()), "json"))["tables"]
    return {row["label"]: row for row in table["rows"]}


def test_rows_carry_intervals_and_comparisons(contest):
    rows = as_rows(contest)
    score = rows["fastv"]["scores"]["gqa"]["exact_match"]
    assert score["interval"]["low"] < score["mean"] == score["interval"]["value"] < score["interval"]["high"]
    assert (score["interval"]["questions"], score["interval"]["images"]) == (120, 40)
    assert score["against"]["dense"]["sign"] == 0
    assert score["against"]["random"]["sign"] == 1
    assert rows["tome"]["scores"]["gqa"]["exact_match"]["against"]["dense"]["sign"] == -1
    assert rows["none"]["scores"]["gqa"]["exact_match"]["against"] == {"dense": None, "random": None}
    random = rows["random:8"]["scores"]["gqa"]["exact_match"]
    assert random["interval"]["value"] == pytest.approx(random["mean"])
    assert random["against"]["random"] is None


def test_random_is_the_one_with_the_nearest_tokens(contest):
    rows = as_rows(contest)
    used = {label: rows[label]["scores"]["gqa"]["exact_match"]["against"]["random"] for label in ("fastv", "tome")}
    assert {label: verdict["reference"] for label, verdict in used.items()} == {"fastv": "random:8", "tome": "random:4"}
    by_hand = [rows[label]["scores"]["gqa"]["exact_match"]["mean"] for label in ("tome", "random:4")]
    assert used["tome"]["difference"] == pytest.approx(by_hand[0] - by_hand[1])
    assert "more than 10 % away from it in T: 1." in render(build(contest.cells()))


def test_p_values_are_adjusted_over_the_rows_of_each_question_apart(contest):
    """Five rows against dense, three against random, and the leaders of two budgets against all others there."""
    rows = as_rows(contest)
    scores = [row["scores"]["gqa"]["exact_match"] for row in rows.values()]
    families = [[s["against"][name] for s in scores if s["against"][name]] for name in ("dense", "random")]
    sides: dict = {}
    for cell in contest.cells():
        sides.setdefault(cell.config.label, []).append(cell)
    measured = {label: MethodRuns(cells).measured["gqa", "exact_match"] for label, cells in sides.items()}
    rest = (("fastv", "downsample", "random:8"), ("tome", "random:4"))
    leads = [max(compare(measured[first], measured[other]).p for other in others) for first, *others in rest]
    raw = [[v["p"] for v in found] for found in families] + [leads]
    adjusted = [[v["p_holm"] for v in found] for found in families]
    adjusted += [[s["best_p_holm"] for s in scores if s["best_p_holm"] is not None]]
    assert list(map(len, raw)) == list(map(len, adjusted)) == [5, 3, 2]
    for before, after in zip(raw, adjusted, strict=True):
        stepped = [min(1.0, (len(before) - i) * p) for i, p in enumerate(sorted(before))]
        expected = [max(stepped[: i + 1]) for i in range(len(before))]
        assert sorted(after) == pytest.approx(expected, rel=1e-9, abs=0)


def test_other_tasks_and_other_scores_change_no_mark(contest):
    """POPE's F1 and accuracy say the same thing twice; no row against dense on GQA pays for them."""
    before = as_rows(contest)
    for method, tokens in (("none", 16), ("fastv", 8), ("tome", 5)):
        right = next(cell.samples()["score"] for cell in contest.cells() if cell.config.method == method)
        answered(contest, method, right, task="pope", tokens=tokens)
    after = as_rows(contest)
    for label, row in before.items():
        assert after[label]["scores"]["gqa"]["exact_match"]["against"] == row["scores"]["gqa"]["exact_match"]["against"]


def test_loyalty_and_difficulty(contest):
    rows = as_rows(contest)
    frames = {cell.config.label: cell.samples() for cell in contest.cells()}
    dense, small = frames["none"], frames["downsample"]
    same = (frames["tome"]["answer"] == dense["answer"]).mean()
    assert rows["tome"]["loyalty"]["gqa"]["value"] == rows["tome"]["loyalty_mean"]["value"] == pytest.approx(same)
    assert rows["none"]["loyalty"] == {}
    hard = (dense["score"] == 1) & (small["score"] == 0)
    group = rows["fastv"]["difficulty"]["groups"]["gqa"]["A"]
    assert rows["fastv"]["difficulty"]["smaller_image"] == "downsample"
    assert group["questions"] == hard.sum() > 0
    assert group["value"] == pytest.approx(frames["fastv"]["score"][hard].mean())


def test_groups_of_difficulty_are_columns_that_can_be_asked_for(contest):
    (line, *_) = [row for row in rows_of_csv(contest, ["method", "group_a", "group_b"]) if row["method"] == "fastv"]
    for name in "AB":
        group = as_rows(contest)["fastv"]["difficulty"]["groups"]["gqa"][name]
        column = f"gqa:group_{name.lower()}"
        figures = [float(line[column]), float(line[f"{column}:low"]), float(line[f"{column}:high"])]
        assert figures == pytest.approx([group["value"], group["low"], group["high"]])
        assert int(line[f"{column}:questions"]) == group["questions"]
    text = render(build(contest.cells()), "text", ["method", "group_a", "group_b"])
    assert f"({group['questions']})" in text
    assert "and downsample (of downsample the row nearest in T) wrong (A) or right as well (B)" in text
    assert "lost when smaller" not in render(build(contest.cells()))


def rows_of_csv(store, names):
    return list(csv.DictReader(io.StringIO(render(build(store.cells()), "csv", names))))


def test_csv_has_the_numbers_behind_marks_and_bold(contest):
    row = next(row for row in rows_of_csv(contest, ["method", "gqa"]) if row["method"] == "fastv")
    assert (row["gqa:exact_match:questions"], row["gqa:exact_match:images"]) == ("120", "40")
    best = as_rows(contest)["fastv"]["scores"]["gqa"]["exact_match"]["best_p_holm"]
    assert float(row["gqa:exact_match:p_best"]) == pytest.approx(best)


def test_where_no_difference_can_be_shown_the_table_says_so(store):
    few = np.arange(12) % 2 == 0
    for method in ("none", "fastv"):
        answered(store, method, few)
    assert "Too few questions to show any: gqa (4 images)." in render(build(store.cells()))


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [
        (0.8, 0.9, "± 5.0"),
        (0.806, 0.9, "± 4.7"),
        (0.75, 0.9, "+5.0 −10.0"),
        (0.85, 0.9, "+5.0 −0.0"),
        (0.8, 0.85 - 1e-15, "+0.0 −5.0"),
        (math.nan, 1, ""),
    ],
)
def test_unequal_sides_of_an_interval_are_both_told(low, high, says):
    assert spread(Estimate(0.85, low, high, 10, 10), lambda width: f"{100 * width:.1f}") == says


def test_text_marks_what_is_shown_and_what_is_not(contest):
    text = render(build(contest.cells()))
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert "·d ↑r" in lines["fastv"]
    assert "↓d ↑r" in lines["tome"]
    assert "↓d" in lines["random:8"]
    assert not set("↑↓↗↘·≈=") & set(lines["none"])
    assert "after Holm over the rows, for each score and reference apart" in text
    assert "clustered by image (gqa 40 images)" in text
    floors = [v.detectable for row in build(contest.cells())[0].rows for v in dense_verdicts(row)]
    assert f"gqa {100 * statistics.median(floors):.1f}." in text
    assert "80 % power" in text


def dense_verdicts(row):
    return [verdict for by in row.evidence.against["dense"].values() for verdict in by.values()]


def test_csv_carries_limits_and_p(contest):
    rows = {row["method"]: row for row in csv.DictReader(io.StringIO(render(build(contest.cells()), "csv")))}
    expected = as_rows(contest)["tome"]["scores"]["gqa"]["exact_match"]
    found = [float(rows["tome"][f"gqa:exact_match:{name}"]) for name in ("low", "high", "p_dense", "p_random")]
    assert found == pytest.approx(
        [
            expected["interval"]["low"],
            expected["interval"]["high"],
            expected["against"]["dense"]["p_holm"],
            expected["against"]["random"]["p_holm"],
        ]
    )
    assert rows["none"]["loyalty_percent"] == ""


def test_samples_of_other_questions_are_no_table(contest):
    put(
        contest,
        config("vtw", "gqa"),
        scores=[ScoreRecord(key="exact_match", title="exact match", value=0.9, maximum=1)],
    )
    with pytest.raises(DataError, match="cannot be paired"):
        build(contest.cells())


def test_scores_without_interval_are_named(store):
    assert "No interval, no marks: gqa score, mme score" in render(build(full(store).cells()))


def test_mean_of_estimates():
    found = mean_of([Estimate(0.5, 0.4, 0.7, 10, 5), Estimate(0.9, 0.6, 1.0, 20, 6)])
    assert (found.value, found.questions, found.images) == (pytest.approx(0.7), 30, 11)
    assert [found.low, found.high] == pytest.approx([0.7 - math.hypot(0.1, 0.3) / 2, 0.7 + math.hypot(0.2, 0.1) / 2])


# ---- pairing, loyalty, groups -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda samples: samples.iloc[:-1], "same --limit"),
        (lambda samples: samples.assign(prompt="another"), "40 of 40 questions differ"),
        (lambda samples: samples.assign(target=["no", *samples["target"][1:]]), r"first: doc_id 0"),
        (lambda samples: samples.assign(image="x"), "same data"),
    ],
)
def test_other_questions_cannot_be_paired(change, says):
    samples = frame(np.repeat(np.arange(10).astype(str), 4), np.ones(40))
    with pytest.raises(DataError, match=says):
        measure("exact_match", [samples, change(samples)])
    with pytest.raises(DataError, match=says):
        loyalty(samples, [change(samples)])
    with pytest.raises(DataError, match=says):
        difficulty(samples, change(samples), [samples])


def test_loyalty_reads_answers_as_scorers_do():
    assert normalised(" The  Dog. ") == normalised("the dog") == normalised("(the 'dog')") == "the dog"
    for one, other in (("3.5", "35"), ("-5", "5"), ("c++", "c"), ("?", ""), ("12:30", "1230"), ("t-shirt", "tshirt")):
        assert normalised(one) != normalised(other)
    dense = frame(list("aabb"), [1, 0, 1, 0], answer=["Yes.", "two  dogs", "red", "no"])
    runs = [dense.assign(answer=["yes", "Two dogs!", "blue", "no"]), dense.assign(answer=["no", "cat", "red", "no"])]
    measured = loyalty(dense, runs)
    assert measured.value == pytest.approx((3 + 2) / 8)
    assert measured.images == 2


def test_difficulty_groups():
    images = [str(i) for i in range(6)]
    dense, small = frame(images, [1, 1, 1, 1, 0, 0]), frame(images, [1, 1, 0, 0, 1, 0])
    groups = difficulty(dense, small, [frame(images, [1, 0, 1, 1, 1, 1])])
    assert {name: (group.value, group.questions) for name, group in groups.items()} == {"A": (1, 2), "B": (0.5, 2)}
    assert set(difficulty(dense, dense, [dense])) == {"B"}


# ---- visibench compare --------------------------------------------------------------------------------------------


@pytest.fixture
def run_compare(monkeypatch, capsys):
    def call(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["visibench", "compare", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return stopped.value.code, captured.out, captured.err

    return call


def test_compare_two_cells(contest, run_compare):
    code, out, err = run_compare(f"{contest.root}#tome:gqa", f"{contest.root}#none:gqa", "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    frames = {cell.config.label: cell.samples() for cell in contest.cells()}
    differ = frames["tome"]["score"] != frames["none"]["score"]
    (metric,) = result["metrics"]
    by_hand = frames["tome"]["score"].mean() - frames["none"]["score"].mean()
    assert metric["comparison"]["difference"] == pytest.approx(by_hand)
    assert [row["question_id"] for row in result["discordant"]] == frames["tome"]["question_id"][differ].tolist()
    assert result["discordant"][0]["first"] == {"score": 0.0, "answers": ["no"]}
    assert metric["comparison"]["worse"] == differ.sum()
    code, text, _ = run_compare(f"{contest.root}#tome:gqa", f"{contest.root}#none:gqa", "--show", 2)
    assert code == 0
    assert "120 questions of 750, 40 images. SUBSET" in text
    assert f"and {differ.sum() - 2} more" in text
    assert "Question" in text
    assert "Answer shortly" not in text


def test_a_mean_over_seeds_that_is_rounded_is_no_other_score(store):
    right = [0.7] * 6  # (0.7 + 0.7 + 0.7) / 3 is 0.6999999999999998
    first = [answered(store, "fastv", right)]
    second = [answered(store, "random", [*right[:5], score], seed=seed) for seed, score in enumerate((0.7, 0.7, 0.4))]
    found = pair(first, second)
    assert [row["doc_id"] for row in found.discordant] == [5]
    assert (found.metrics[0].comparison.better, found.metrics[0].comparison.worse) == (1, 0)


def test_compare_calls_nothing_equal_without_a_test_of_a_margin(contest, run_compare):
    sides = f"{contest.root}#fastv:gqa", f"{contest.root}#none:gqa"
    code, text, _ = run_compare(*sides)
    assert code == 0
    assert "one-sided" not in text
    code, text, _ = run_compare(*sides, "--margin", "12")
    assert code == 0
    assert "exact match: a difference of less than 12 % of the best score is shown (two one-sided tests, p 0.0" in text
    assert "is not shown (two one-sided tests" in run_compare(*sides, "--margin", "2")[1]
    (metric,) = json.loads(run_compare(*sides, "--margin", "12", "--json")[1])["metrics"]
    assert metric["p_equivalent"] < 0.05
    code, out, err = run_compare(*sides, "--margin", "0")
    assert (code, out) == (2, "")
    assert "--margin 0 is no share of a score" in err


def test_compare_takes_folders_and_all_seeds_of_a_label(contest, run_compare):
    folders = {cell.config.label: cell.path for cell in contest.cells()}
    code, out, _ = run_compare(folders["tome"], folders["none"], "--json")
    assert code == 0
    assert json.loads(out) == json.loads(
        run_compare(f"{contest.root}#tome:gqa", f"{contest.root}#none:gqa", "--json")[1]
    )
    code, out, _ = run_compare(f"{contest.root}#fastv:gqa", f"{contest.root}#random:8:gqa", "--json")
    result = json.loads(out)
    scores = [cell.metrics.scores[0].value for cell in contest.cells() if cell.config.label == "random:8"]
    assert result["metrics"][0]["second"]["value"] == pytest.approx(statistics.fmean(scores))
    assert len(result["discordant"][0]["second"]["answers"]) == 3
    assert result["agreement"] is None

    code, out, err = run_compare(f"{contest.root}#fastv:gqa", f"{contest.root}#random:8:gqa")
    assert (code, err) == (0, "")
    assert "seed 0, 1, 2" in out
    assert "questions tell them apart" in out
    assert "McNemar" not in out, "answers of several seeds are no pairs of 0 and 1"


def test_compare_says_what_else_differs(contest, run_compare, tmp_path):
    other = Store(tmp_path / "other")
    answered(other, "none", np.arange(120) % 2 == 0, versions={"torch": "3"})
    code, out, _ = run_compare(f"{other.root}#none:gqa", f"{contest.root}#none:gqa")
    assert code == 0
    assert "environment.versions.torch differs: A 3, B 2" in out


@pytest.mark.parametrize(
    ("one", "other", "says"),
    [
        ("{run}", "{run}#none:gqa", "DIR#LABEL:TASK"),
        ("{run}#nane:gqa", "{run}#none:gqa", "did you mean 'none:gqa'"),
        ("{run}#none:gqa", "{run}#none:pope", "one task"),
        ("{run}#none:gqa", "{short}#none:gqa", "same --limit"),
        ("{run}#none:gqa", "{pixels}#none:gqa", "pixels"),
        ("{run}/cells/nothing", "{run}#none:gqa", "no folder"),
        ("nowhere", "{run}#none:gqa", "no folder"),
    ],
)
def test_compare_refuses_what_cannot_be_paired(one, other, says, contest, run_compare, tmp_path):
    answered(contest, "none", np.ones(120), task="pope")
    answered(Store(tmp_path / "short"), "none", np.ones(60))
    answered(Store(tmp_path / "pixels"), "none", np.ones(120), data="d1")
    places = {name: tmp_path / name for name in ("run", "short", "pixels")}
    code, out, err = run_compare(one.format(**places), other.format(**places))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err
