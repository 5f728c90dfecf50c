"""Printed figures beside ours: verdicts by hand, and the command on miniatures laid out as the hub lays them out."""

import json
import shutil

import pandas as pd
import pytest
from storing import SAMPLES, config, put
from visibench.errors import UnknownNameError
from visibench.evals.sweeps.cells import cell_specs
from visibench.evals.sweeps.papers import known, load_paper
from visibench.results.published.reproduction import paper_of, reproduced
from visibench.results.store.records import ScoreRecord
from visibench.results.store.store import Store

HUB = "llava-hf/llava-1.5-7b-hf"


def gqa(folder, questions, right, method="none", **options):
    """A cell of GQA with so many questions about as many images, of which a share is right."""
    rows = pd.concat([SAMPLES.iloc[:1]] * questions, ignore_index=True)
    scores = [float(i < round(right * questions)) for i in range(questions)]
    rows = rows.assign(doc_id=range(questions), image=[str(i) for i in range(questions)], score=scores)
    score = ScoreRecord(key="exact_match", title="exact match", value=sum(scores) / questions, maximum=1)
    cell = config(method, model=HUB, options=options, origin="hub")
    changes = {"total": 12_578, "scores": [score], "metrics": {"exact_match": score.value}}
    return put(Store(folder), cell, samples=rows, **changes)


@pytest.mark.parametrize(
    ("questions", "right", "verdict"),
    [
        (12_578, 0.62, "reproduced within error"),
        (12_578, 0.55, "not reproduced"),
        (100, 0.62, "cannot be told"),
        (100, 0.20, "not reproduced"),
    ],
)
def test_verdicts_follow_from_the_interval_of_the_gap(questions, right, verdict, tmp_path):
    """Dense GQA of VisiPruner's Table 5: 62.0. By hand: a share of 0.62 has a standard error of √(0.62·0.38/n)."""
    cell = gqa(tmp_path, questions, right)
    found = [one for one in reproduced([cell], paper_of("visipruner")) if one.figure.printed == "62.0"]
    assert {one.verdict for one in found} == {verdict}
    one = found[0]
    half = 196 * (right * (1 - right) / questions) ** 0.5 + 0.05
    assert one.gap == pytest.approx(100 * right - 62.0, abs=100 / questions)
    assert (one.high - one.low) / 2 == pytest.approx(half, rel=0.1)


def test_only_figures_of_the_same_setting_are_compared(tmp_path):
    options = {"layer": 3, "keep": 0.25, "tokens": None, "positions": "keep"}
    found = reproduced([gqa(tmp_path, 50, 0.6, "fastv", **options)], paper_of("visipruner"))
    assert [one.figure.printed for one in found] == ["57.5"]
    assert reproduced([gqa(tmp_path / "b", 50, 0.6, "fastv", **options | {"keep": 0.3})], paper_of("visipruner")) == []


@pytest.mark.parametrize("name", known())
def test_settings_of_papers_name_figures_that_are_printed(name):
    """Every method of a paper's sweep has a figure with its options or its nominal budget."""
    paper = load_paper(name)
    rows = [row for table in paper_of(paper.paper).tables for row in table.rows if table.model == "llava-1.5-7b"]
    for spec in cell_specs(paper):
        config = spec.config.model_dump(mode="json")["options"]
        same = [row for row in rows if row.method == spec.config.method]
        agreeing = [
            row
            for row in same
            if spec.config.method == "none"
            or (row.options and all(config.get(key) == value for key, value in row.options.items()))
            or (row.tokens is not None and row.tokens == config.get("tokens"))
        ]
        assert agreeing or (spec.config.method == "none" and not same), spec.config.label
        assert spec.config.protocol["name"] == "llava-1.5"


def test_an_unknown_paper_is_refused_by_name():
    with pytest.raises(UnknownNameError, match="did you mean 'visipruner'"):
        load_paper("visipruner2")


def test_the_command_prices_a_paper_without_a_download(cli):
    code, out, err = cli("reproduce", "visipruner", "--dry-run", "--rate", "100")
    assert code == 0, err
    assert "12 cells: 0 done" in out
    assert "GPU-hours" in out
    assert "Memory: about" in out


@pytest.mark.slow
def test_the_command_runs_end_to_end_on_a_miniature_laid_out_like_the_hub(
    cli, checkpoint, hub_data, tmp_path, monkeypatch
):
    """Its folder has the name of the checkpoint's repository; scores are chance, and the verdicts say so."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint, "llava-1.5-7b-hf")
    command = ["reproduce", "fastv", "--model", "./llava-1.5-7b-hf", "--data", str(hub_data), "--set", "batch_size=4"]
    code, out, err = cli(*command)
    assert code == 0, err
    assert "README (lmms-eval)" in out
    assert "cannot be told" in out or "not reproduced" in out
    assert "Executed here, fastv:keep=0.5,layer=3 on gqa" in out
    assert "Table 1, dense: printed 99.3 GFLOPs a layer, by its formula 99.33 ✓" in out
    told = json.loads(cli(*command, "--json")[1])
    verdicts = {one["verdict"] for one in told["figures"]}
    assert verdicts <= {"cannot be told", "not reproduced", "reproduced within error"}
