"""What is printed fits a terminal, and cuts no number."""

import pandas as pd
import pytest
import visibench
import yaml
from storing import SAMPLES, config, put
from visibench.commands import compare
from visibench.commands.shared import spelled_p
from visibench.results.store.records import ScoreRecord
from visibench.results.store.store import Store
from visibench.results.tables.render import fitted
from visibench.results.tables.tables import build

ROOT = visibench.__path__[0]


@pytest.fixture
def store(tmp_path):
    """Two methods on one task, each answer scored."""
    store = Store(tmp_path)
    for method, right in (("none", 0.8), ("fastv", 0.6)):
        rows = pd.concat([SAMPLES.iloc[:1]] * 200, ignore_index=True)
        scores = [float(i < 200 * right) for i in range(200)]
        rows = rows.assign(doc_id=range(200), image=[str(i) for i in range(200)], score=scores)
        score = ScoreRecord(key="exact_match", title="exact match", value=right, maximum=1)
        put(store, config(method, "gqa"), samples=rows, scores=[score], metrics={"exact_match": right})
    return store


@pytest.mark.parametrize("columns", [80, 120, 200])
def test_tables_fit_and_hold_every_number(store, columns):
    wide, text = fitted(build(store.cells()), None, None), fitted(build(store.cells()), None, columns)
    assert max(map(len, text.splitlines())) <= columns
    assert "…" not in text
    for number in ("80.0", "60.0", "75.0", "12.0", "2.00"):
        assert text.count(number) >= wide.count(number)


@pytest.mark.parametrize("columns", [80, 120, 200])
def test_compare_cuts_no_interval(store, columns, monkeypatch, capsys):
    monkeypatch.setattr(compare, "width", lambda: columns)
    compare.compare(f"{store.root}#none:gqa", f"{store.root}#fastv:gqa", show=0)
    out = capsys.readouterr().out
    assert "…" not in out
    assert out.count("[") == out.count("]") >= 3
    table = [line.rstrip() for line in out.splitlines() if "]" in line or "─" in line]
    assert max(map(len, table)) <= (80 if columns < compare.WIDE else columns)
    assert max(map(len, out.splitlines())) <= max(columns, 140)


def test_no_p_value_is_nought():
    assert [spelled_p(p) for p in (0.0, 0.00004, 0.0001, 0.0412)] == ["< 0.0001", "< 0.0001", "0.0001", "0.0412"]


def test_help_is_asked_for_in_short(cli):
    assert cli("-h")[1] == cli("--help")[1]
    assert "--install-completion" in cli("-h")[1]
    assert "FILE.jsonl" in cli("run", "-h")[1]


def test_a_model_is_shown_in_one_line():
    shown = repr(visibench.load_model("tiny", device="cpu"))
    assert shown.startswith("LoadedModel('tiny', LlavaForConditionalGeneration, 3.")
    assert len(shown) < 120


def test_citation_and_workflow_can_be_read():
    with open(f"{ROOT}/CITATION.cff") as cff, open(f"{ROOT}/.github/workflows/ci.yml") as workflow:
        assert yaml.safe_load(cff)["title"] == "visibench"
        (job,) = yaml.safe_load(workflow)["jobs"].values()
    assert job["steps"][-1]["run"] == ".ci/run"
