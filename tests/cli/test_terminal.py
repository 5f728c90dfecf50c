"""What is printed fits a terminal, and cuts no number."""

from io import StringIO

import pandas as pd
import pytest
import visibench
import yaml
from rich.console import Console
from storing import SAMPLES, config, put
from visibench.commands import check, compare, shared
from visibench.commands.shared import spelled_p
from visibench.evals.sweeps import events
from visibench.results.store.records import ScoreRecord
from visibench.results.store.store import Store
from visibench.results.tables.render import fitted
from visibench.results.tables.tables import build
from visibench.utils.rows import laid_out

ROOT = visibench.__path__[0]


@pytest.fixture
def store(tmp_path):
    """Two methods on one task, each answer scored."""
    store = Store(tmp_path)
    for method, right in (("none", 0.8), ("fastv", 0.6)):
        rows = pd.concat([SAMPLES.iloc[:1]] * 200, ignore_index=True)
        scores = [float(i < 200 * right) for i in range(200)]
        rows = rows.assign(doc_id=range(200), image=[str(i) for i in range(200)], score=scores)
        rows = rows.assign(kv_lengths=[[9, 9]] * 200, executed_macs=1e8)
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


@pytest.mark.parametrize("columns", [80, 120, 200])
def test_the_gate_wraps_what_it_says_at_words(store, columns, monkeypatch, capsys):
    for module in (check, shared):
        monkeypatch.setattr(module, "terminal", lambda: columns)
    check.check(store.root, baseline=store.root / "b.json", update=True)
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if str(store.root) not in line]  # a path is not cut
    assert max(map(len, lines)) <= min(columns, 120)
    told = " ".join(out.split())
    assert "ok the run as a whole: mean score of all questions 70.00 %, now 70.00, change 0.00 [" in told
    assert "PASS: 2 cells keep and compute the same; no drop of a score is shown; not seen would be one below" in told


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


@pytest.mark.parametrize("columns", [80, 120, 200])
def test_a_terminal_shows_scores_with_one_mark_and_a_note_for_that_alone(store, columns):
    short = fitted(build(store.cells()), None, columns)
    wide = fitted(build(store.cells()), None, columns, wide=True)
    assert max(map(len, short.splitlines())) <= columns
    (row,) = [line.split() for line in short.splitlines() if line.strip().startswith("fastv")]
    assert row == ["fastv", "60.0", "↓d", "75.0", "12.0", "2.00"]
    assert "interval" not in short.replace("Intervals, other scores and costs: --wide", "")
    assert "95 % interval" in " ".join(wide.split())
    assert len(short.splitlines()) < len(wide.splitlines())
    bare = fitted(build(store.cells()), None, columns, noted=False)
    assert bare == short[: len(bare)]
    assert "Questions" not in bare


def test_tables_come_without_notes_in_every_form(cli, store):
    for form in ("text", "md", "latex", "html"):
        code, out, _ = cli("table", str(store.root), "--format", form, "--no-notes")
        assert code == 0
        assert "60.0" in out
        assert "Questions:" not in out


def test_no_line_of_help_is_cut(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for command in ([], ["run"], ["sweep"], ["table"], ["wandb"], ["wandb", "sync"]):
        code, out, _ = cli(*command, "-h")
        assert code == 0
        assert "..." not in out.partition("\n")[2]
        assert not [line for line in out.splitlines() if line.endswith("…")]
        assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("columns", [80, 120, 200])
def test_bars_drop_the_latest_score_first_and_no_number(columns):
    console = Console(file=StringIO(), force_terminal=True, width=columns)
    names = {"model": "m", "method": "visipruner", "task": "textvqa_val", "seed": 0, "of": 2, "questions": 5000}
    cell = events.Named(**names, label="visipruner:shallow_layers=4,layer_threshold=0.9", number=1, folder="f")
    with events.Bars(console) as tell:
        tell(events.ModelStarted(model="m", cells=2, done=0, questions=10000))
        tell(events.CellStarted(cell=cell))
        tell(events.Answered(cell=cell, answered=4321, seconds=1))
        shown = Console(file=StringIO(), width=columns)
        shown.print(tell.bars.make_tasks_table(tell.bars.tasks))
    (line,) = [line for line in shown.file.getvalue().splitlines() if "5000" in line]
    assert "4321/5000" in line
    assert "left" in line
    assert len(tell.bars.columns) == (8 if columns == 200 else 7)


def test_rows_are_a_table_or_records_and_no_number_is_cut():
    header, rows = ["name", "score\n%", "about"], [["one", "12.34", "some words that wrap"], ["two", "–", "few"]]
    assert laid_out(header, rows, None, ["score\n%"]).splitlines() == [
        "name  score  about", "          %", "one   12.34  some words that wrap", "two       –  few",
    ]  # fmt: skip
    assert "12.34  some words" in laid_out(header, rows, 24, ["score\n%"])
    assert laid_out(header, rows, 16).splitlines() == [
        "one",
        "  score %  12.34",
        "  about    some",
        "           words",
        "           that",
        "           wrap",
        "two",
        "  about    few",
    ]
