"""The regression gate: what passes, what fails, and what cannot be compared."""

import json
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
from refusals import assert_refused
from rich.console import Console
from storing import config, frame, put
from visibench.errors import DataError
from visibench.evals.sweeps.cells import cell_specs
from visibench.evals.sweeps.config import load_config, parse_config
from visibench.evals.sweeps.sweep import sweep
from visibench.methods import fastv, registry
from visibench.results.gate import baseline as baselines
from visibench.results.gate.gate import ALPHA, check
from visibench.results.store.records import ScoreRecord
from visibench.results.store.store import Store

IMAGES, EACH = 40, 3
LABELS = ("none", "fastv", "random")


def samples(right, answers=None) -> pd.DataFrame:
    """Samples of a run; ``right`` (images, questions an image), 0 or 1."""
    images, each = right.shape
    score = right.ravel().astype(float)
    n = score.size
    answer = ["yes" if s else "no" for s in score] if answers is None else answers
    return frame(
        np.repeat([f"s{i}" for i in range(images)], each),
        score,
        answer=answer,
        visual_tokens=[[16, 8, 8]] * n,
        kv_lengths=[[20 + i % each, 12, 12] for i in range(n)],
        executed_macs=[1e8 + i % each for i in range(n)],
    )


def store_run(root, right, **changes) -> Store:
    """A run of one cell a label on one task; ``right``: by label."""
    store = Store(root)
    for label, scores in right.items():
        write(store, config(label, **changes), samples(scores))
    return store


def write(store, cell, table, **changes) -> None:
    score = ScoreRecord(key="exact_match", title="exact match", value=table["score"].mean(), maximum=1)
    put(store, cell, samples=table, **{"scores": [score]} | changes)


@pytest.fixture
def right() -> dict:
    rng = np.random.default_rng(0)
    return {label: (rng.random((IMAGES, EACH)) < 0.8).astype(int) for label in LABELS}


@pytest.fixture
def run(tmp_path, right) -> Store:
    return store_run(tmp_path / "run", right)


@pytest.fixture
def stored(run):
    """Its baseline."""
    return baselines.baseline_of(run.cells())


def test_a_run_too_small_to_show_a_drop_passes_and_says_that(right, tmp_path, cli):
    few = {label: answers[:4] for label, answers in right.items()}
    root = store_run(tmp_path / "few", few).root
    code, out, _ = cli("check", root, "--baseline", "few.json", "--update")
    assert code == 0
    assert "PASS: 3 cells keep and compute the same; none of their scores could have shown a drop." in out


# ---- what passes and what fails -----------------------------------------------------------------------------------


def test_an_unchanged_run_passes_and_says_what_it_could_have_seen(cli, run, tmp_path):
    code, out, err = cli("check", run.root, "--baseline", "b.json", "--update")
    assert (code, err) == (0, "")
    code, out, err = cli("check", run.root, "--baseline", "b.json")
    assert (code, err) == (0, "")
    assert "PASS: 3 cells keep and compute the same; no drop of a score is shown; not seen would be one below" in out
    report = json.loads(cli("check", run.root, "--baseline", "b.json", "--json")[1])
    assert report["passed"]
    assert report["tests"] == 3
    for cell in report["cells"]:
        (metric,) = cell["metrics"]
        assert (cell["answers"], cell["facts"]) == (0, [])
        assert f"{100 * metric['verdict']['detectable']:.2f}" in out


def test_other_answers_of_equal_accuracy_pass(run, right, stored, tmp_path):
    other = {label: scores.copy() for label, scores in right.items()}
    wrong, good = np.argwhere(right["fastv"] == 0)[:9], np.argwhere(right["fastv"] == 1)[:9]
    other["fastv"][tuple(wrong.T)], other["fastv"][tuple(good.T)] = 1, 0
    report = check(store_run(tmp_path / "other", other).cells(), stored)
    assert report.passed
    assert {cell.name: cell.answers for cell in report.cells if cell.answers} == {"fastv · gqa · seed 0": 18}
    (change,) = (cell for cell in report.cells if cell.answers)
    comparison = change.metrics[0].verdict.comparison
    assert (comparison.better, comparison.worse, comparison.difference) == (9, 9, 0)


def test_other_words_for_the_same_score_pass_and_are_counted(run, right, stored):
    table = samples(right["none"], answers=["other"] * (IMAGES * EACH))
    write(run, config("none"), table)
    report = check(run.cells(), stored)
    assert report.passed
    assert [cell.answers for cell in report.cells] == [0, IMAGES * EACH, 0]


@pytest.mark.parametrize(("lost", "passes"), [(0.5, False), (0.02, True)])
def test_a_drop_fails_only_if_it_is_shown(lost, passes, run, right, stored, cli, tmp_path):
    rng = np.random.default_rng(1)
    other = right | {"fastv": right["fastv"] * (rng.random((IMAGES, EACH)) >= lost)}
    assert other["fastv"].sum() < right["fastv"].sum()
    baselines.save(stored, tmp_path / "b.json")
    code, out, err = cli("check", store_run(tmp_path / "other", other).root, "--baseline", "b.json")
    assert (code, err) == (0 if passes else 1, "")
    assert ("FAIL fastv · gqa · seed 0: exact match dropped" in out) is not passes
    assert ("ok fastv · gqa · seed 0:" in out) is passes
    assert ("FAIL the run as a whole" in out) is not passes
    assert out.count("FAIL") == (0 if passes else 3)


def test_a_small_drop_in_all_cells_fails_the_run_as_a_whole(tmp_path, cli):
    """Ten of 120 answers lost in each of 20 cells, on other images each: no cell shows it by itself."""
    rng = np.random.default_rng(6)
    answers = {f"m{i}": (rng.random((IMAGES, EACH)) < 0.8).astype(int) for i in range(20)}
    after = {label: scores.copy() for label, scores in answers.items()}
    for scores in after.values():
        hit = rng.permutation(np.argwhere(scores == 1))[:10]
        scores[tuple(hit.T)] = 0
        hit = rng.permutation(np.argwhere(scores == 0))[:3]
        scores[tuple(hit.T)] = 1
    baselines.save(baselines.baseline_of(store_run(tmp_path / "run", answers).cells()), tmp_path / "b.json")
    root = store_run(tmp_path / "after", after).root
    report = json.loads(cli("check", root, "--baseline", "b.json", "--json")[1])
    assert not report["passed"]
    assert not any(metric["verdict"]["p_holm"] < ALPHA for cell in report["cells"] for metric in cell["metrics"])
    whole = report["whole"]
    assert whole["verdict"]["p_holm"] < ALPHA
    comparison = whole["verdict"]["comparison"]
    assert (comparison["questions"], comparison["images"]) == (20 * IMAGES * EACH, IMAGES)
    lost = sum(after[label].mean() - answers[label].mean() for label in answers) / 20
    assert comparison["difference"] == whole["now"] - whole["before"] == pytest.approx(lost)
    code, out, _ = cli("check", root, "--baseline", "b.json")
    assert code == 1
    assert "FAIL: the run as a whole." in out


def test_a_rise_is_no_drop(run, right, stored, tmp_path):
    other = right | {"fastv": np.ones_like(right["fastv"])}
    assert check(store_run(tmp_path / "other", other).cells(), stored).passed


@pytest.mark.parametrize(
    ("column", "value", "fact"),
    [
        ("visual_tokens", [16, 9, 8], "visual tokens by layer"),
        ("kv_lengths", [21, 12, 13], "KV lengths by layer"),
        ("executed_macs", (1e8 + 1) * (1 + 1e-8), "executed MACs"),
    ],
)
def test_one_question_with_other_counts_fails(column, value, fact, run, right, stored):
    table = samples(right["none"])
    table.at[7, column] = value
    write(run, config("none"), table)
    report = check(run.cells(), stored)
    assert not report.passed
    ((change,),) = (cell.facts for cell in report.cells if cell.failed)
    assert (change.fact, change.questions, change.doc_id) == (fact, 1, 7)
    assert change.now == (tuple(value) if isinstance(value, list) else value)


def test_rounding_of_macs_passes(run, right, stored):
    table = samples(right["none"])
    write(run, config("none"), table.assign(executed_macs=table["executed_macs"] * (1 + 1e-12)))
    assert check(run.cells(), stored).passed


def test_versions_and_options_of_one_side_are_noted_and_pass(run, right, stored):
    for label in LABELS:
        cell = config(label)
        newer = cell.model_copy(update={"options": cell.options | {"added": 1}})
        (old,) = (found for found in run.cells() if found.config == cell)
        for file in old.path.iterdir():
            file.unlink()
        write(run, newer, samples(right[label]), versions={"torch": "3"})
    report = check(run.cells(), stored)
    assert report.passed
    assert "versions: torch was 2 and is 3" in report.notes
    assert "fastv: option added is new, 1" in report.notes


# ---- methods that break -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WrongWayRound(fastv.FastV):
    """Drops what the last prompt token attends to most."""

    def score(self, view):
        return -super().score(view)


@dataclass(frozen=True)
class OneMore(fastv.FastV):
    def budget(self, visual_tokens):
        return super().budget(visual_tokens) + 1


def run_fastv(out, **settings) -> list:
    content = {"methods": ["fastv:keep=0.5"], "tasks": ["gqa"], "timing": None, "model": "tiny"}
    return sweep(parse_config(content | settings, "test"), out, Console(quiet=True), dense=False)


@pytest.mark.slow
def test_keeping_the_wrong_tokens_is_a_shown_drop(tmp_path, monkeypatch, cli):
    text = {"tasks": ["textvqa_val"], "limit": 40}
    before = run_fastv(tmp_path / "before", **text)
    baselines.save(baselines.baseline_of(before), tmp_path / "b.json")
    monkeypatch.setitem(registry._methods, "fastv", WrongWayRound)
    run_fastv(tmp_path / "after", **text)
    code, out, _ = cli("check", tmp_path / "after", "--baseline", "b.json", "--json")
    report = json.loads(out)
    assert code == 1
    assert report["cells"][0]["facts"] == [], "as many tokens and as much compute as before"
    assert report["cells"][0]["metrics"][0]["verdict"]["p_holm"] < ALPHA


@pytest.mark.slow
def test_one_token_more_fails_on_every_question(tmp_path, monkeypatch, checkpoint, disk_data):
    small = {"model": str(checkpoint), "data": str(disk_data)}
    baseline = baselines.baseline_of(run_fastv(tmp_path / "before", **small))
    assert check(run_fastv(tmp_path / "again", **small), baseline).passed
    monkeypatch.setitem(registry._methods, "fastv", OneMore)
    report = check(run_fastv(tmp_path / "after", **small), baseline)
    assert not report.passed
    assert [(fact.fact, fact.questions) for fact in report.cells[0].facts] == [
        (fact, 8) for fact in baselines.FACTS.values()
    ]
    tokens = report.cells[0].facts[0]
    assert [now - before for before, now in zip(tokens.before, tokens.now, strict=True)][:4] == [0, 0, 1, 1]


# ---- what cannot be compared --------------------------------------------------------------------------------------


def spoilt(content: str, **changes) -> str:
    return json.dumps(json.loads(content) | changes)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda text: text[: len(text) // 2], "no baseline of this version"),
        (lambda text: "", "no baseline of this version"),
        (lambda text: "[]", "no baseline of this version"),
        (lambda text: '{"rows": []}', "no baseline of this version"),
        (lambda text: spoilt(text, schema_version=2), "schema_version"),
        (lambda text: spoilt(text, more=1), "more"),
        (lambda text: text.replace('"yes"', '"no"', 1), "checksum"),
        (lambda text: spoilt(text, checksum=""), "checksum"),
    ],
)
def test_a_damaged_or_foreign_baseline(damage, says, run, stored, tmp_path, cli):
    file = tmp_path / "b.json"
    baselines.save(stored, file)
    file.write_text(damage(file.read_text()))
    assert_refused(cli("check", run.root, "--baseline", file), says)


def test_a_baseline_that_cannot_be_read_or_written(run, tmp_path, cli):
    assert_refused(cli("check", run.root, "--baseline", "none.json"), "cannot read the baseline none.json")
    assert_refused(cli("check", run.root, "--baseline", tmp_path), "cannot read the baseline")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    assert_refused(cli("check", run.root, "--baseline", "bytes.json"), "it is not text")
    assert_refused(cli("check", run.root, "--baseline", tmp_path, "--update"), "cannot write")
    assert_refused(cli("check", tmp_path / "nowhere"), "no folder")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"checkpoint": "other"}, "fingerprint other"),
        ({"model": "another"}, "model another"),
        ({"limit": 7}, "ran with limit 7, the baseline with None"),
        ({"batch_size": 3}, "batch_size 3"),
        ({"options": {"keep": 0.25}}, "option keep 0.25"),
        ({"task": "pope"}, "lacks 3 of the baseline's 3 cells"),
    ],
)
def test_another_model_or_other_settings(changes, says, right, tmp_path, cli):
    before = {"options": {"keep": 0.5}}
    baselines.save(baselines.baseline_of(store_run(tmp_path / "run", right, **before).cells()), tmp_path / "b.json")
    other = store_run(tmp_path / "other", right, **before | changes)
    assert_refused(cli("check", other.root, "--baseline", "b.json"), says)


def test_other_cells_questions_and_metrics(run, right, stored, tmp_path, cli):
    baselines.save(stored, tmp_path / "b.json")
    fewer = store_run(tmp_path / "fewer", {label: right[label] for label in LABELS[:2]})
    assert_refused(cli("check", fewer.root, "--baseline", "b.json"), "lacks 1 of the baseline's 3 cells")
    renamed = store_run(tmp_path / "renamed", {label: right[label] for label in LABELS[:2]} | {"dart": right["none"]})
    says = "lacks 1 of the baseline's 3 cells"
    assert_refused(cli("check", renamed.root, "--baseline", "b.json"), says)
    assert "has 1 that it does not know (first: dart" in cli("check", renamed.root, "--baseline", "b.json")[2]
    more = store_run(tmp_path / "more", right | {"dart": right["none"]})
    assert_refused(cli("check", more.root, "--baseline", "b.json"), "the baseline lacks 1 of the run's cells")
    write(run, config("none"), samples(right["none"]), data_hash="new")
    assert_refused(cli("check", run.root, "--baseline", "b.json"), "other questions")
    assert_refused(cli("check", run.root, "--baseline", "b.json", "--update"), "other questions")
    unknown = ScoreRecord(key="other", title="other", value=right["none"].mean(), maximum=1)
    write(run, config("none"), samples(right["none"]), scores=[unknown])
    assert_refused(cli("check", run.root, "--baseline", "b.json"), "scored by other")
    write(run, config("none"), samples(right["none"]), scores=[unknown.model_copy(update={"value": 0.123})])
    assert_refused(cli("check", run.root, "--baseline", "b.json", "--update"), "do not add up")


def test_a_part_of_a_run_is_gated_against_the_whole_baseline(right, tmp_path, cli):
    pixels = {label: samples(scores).assign(pixels="p") for label, scores in right.items()}
    whole, part = Store(tmp_path / "whole"), Store(tmp_path / "part")
    for label in LABELS:
        write(whole, config(label), pixels[label])
    for label in LABELS[:2]:
        write(part, config(label, limit=90), pixels[label][:90], data_hash="of the first 90")
    baselines.save(baselines.baseline_of(whole.cells()), tmp_path / "b.json")
    assert_refused(cli("check", part.root, "--baseline", "b.json"), "lacks 1 of the baseline's 3 cells")
    code, out, _ = cli("check", part.root, "--baseline", "b.json", "--subset")
    assert code == 0
    (told,) = [line for line in out.splitlines() if line.startswith("PASS")]
    assert told.endswith("Not compared: 1 of 3 cells, 30 of 120 questions of gqa of the baseline.")
    first = pixels["none"][:90].assign(score=0.0, answer="no")
    write(part, config("none", limit=90), first, data_hash="of the first 90")
    assert cli("check", part.root, "--baseline", "b.json", "--subset")[0] == 1
    write(part, config("none", limit=90), first.assign(pixels="others"), data_hash="of others")
    assert_refused(cli("check", part.root, "--baseline", "b.json", "--subset"), "90 of 90 questions of gqa are not in")
    assert_refused(cli("check", part.root, "--baseline", "b.json", "--subset", "--update"), "leave --subset out")


def test_a_folder_with_several_runs(run, right, stored, tmp_path, cli):
    baselines.save(stored, tmp_path / "b.json")
    store_run(run.root, {"none": right["none"]}, limit=9)
    assert_refused(cli("check", run.root, "--baseline", "b.json"), "several times")


def test_other_hub_names_are_other_models_and_folders_are_not(right, tmp_path):
    local = store_run(tmp_path / "a", right, model="/here", checkpoint="f")
    moved = store_run(tmp_path / "b", right, model="/there", checkpoint="f", origin="/data")
    assert check(moved.cells(), baselines.baseline_of(local.cells())).passed


# ---- the file -----------------------------------------------------------------------------------------------------


def test_a_baseline_comes_back_as_it_was_written(stored, tmp_path):
    baselines.save(stored, tmp_path / "b.json")
    assert baselines.load(tmp_path / "b.json") == stored
    assert len(stored.cells[0].prefills) == EACH, "prefills that repeat are stored once"


def test_a_failed_update_leaves_the_old_baseline(stored, tmp_path, monkeypatch):
    file = tmp_path / "b.json"
    baselines.save(stored, file)
    before = file.read_text()

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(DataError, match="No space left"):
        baselines.save(stored.model_copy(update={"cells": []}), file)
    assert file.read_text() == before


def test_the_packaged_baseline_is_that_of_the_ci_sweep():
    packaged = baselines.load(baselines.PACKAGED)
    assert baselines.PACKAGED.stat().st_size < 200_000
    for asked in packaged.questions.values():
        assert len(asked.hashes) == len(asked.doc_ids) > 0, "a subset of questions can be compared"
    planned = {baselines.name_of(cell.config): cell.config for cell in cell_specs(load_config("ci")[0])}
    assert {baselines.name_of(cell.config) for cell in packaged.cells} == set(planned)
    for cell in packaged.cells:
        now = planned[baselines.name_of(cell.config)]
        assert baselines.model_of(cell.config) == baselines.model_of(now), "write it anew: visibench check DIR --update"
        assert cell.config.limit == now.limit


def test_the_ci_sweep_holds_every_kind_of_method():
    methods = {variant.method.name for variant in cell_specs(load_config("ci")[0])}
    assert methods == {"none", "random", "fastv", "visipruner", "visionzip"}
