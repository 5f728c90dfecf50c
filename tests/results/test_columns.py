"""Columns: one class each, chosen by name, with the notes that they need."""

import csv
import dataclasses
import io
import json
import re
import sys

import numpy as np
import pytest
from simulated import of_scores
from storing import config, full, put
from tabled import Reader, answered
from visibench.cli import main
from visibench.errors import OptionError
from visibench.reports.html.report import report
from visibench.results.statistics.comparison import compare
from visibench.results.statistics.inference import ALPHA, Contrast
from visibench.results.store.records import Compute, ScoreRecord
from visibench.results.tables import formats
from visibench.results.tables.columns import COLUMNS, Column, TableEntry, add_column, listing
from visibench.results.tables.columns.scores import mark_of
from visibench.results.tables.render import render
from visibench.results.tables.tables import build


@pytest.fixture
def seeds_column():
    """A column as its author would write it, in a file of its own."""

    @add_column
    class SeedsColumn(Column):
        name, title, about = "draws", "random\ndraws", "how often a method was drawn anew"

        def show(self, row):
            return TableEntry(f"{len(row.seeds)} of {len(self.table.rows)}")

        def figures(self, row):
            return {"draws_count": len(row.seeds)}

        def notes(self, bold):
            return ["Draws: seeds of a row."]

    yield SeedsColumn
    COLUMNS.remove(SeedsColumn)


@pytest.mark.usefixtures("seeds_column")
def test_a_new_column_is_one_class(store, cli):
    """It stands in every form, by default and by name, and in the list of columns, with nothing else told of it."""
    tables = build(full(store).cells())
    for names in (None, ["method", "draws"]):
        text, markdown = render(tables, "text", names), render(tables, "md", names)
        (line,) = [line for line in text.splitlines() if line.strip().startswith("random  ")]
        assert line.endswith("3 of 3")
        assert "| random draws |" in markdown
        assert re.search(r"^\| random \|.* 3 of 3 \|$", markdown, re.M)
        latex, page = render(tables, "latex", names), Reader(render(tables, "html", names))
        assert re.search(r"^random &.*3 of 3 \\\\$", latex, re.M)
        assert {row[0]: row[-1] for row in page.rows if len(row) > 1}["random"] == "3 of 3"
        rows = list(csv.DictReader(io.StringIO(render(tables, "csv", names))))
        assert [row["draws_count"] for row in rows] == ["1", "3", "1"]
        assert all(each.count("Draws: seeds of a row.") == 1 for each in (text, markdown, latex))
    (table,) = json.loads(render(tables, "json"))["tables"]
    assert [row["draws_count"] for row in table["rows"]] == [1, 3, 1]
    assert ("draws", "how often a method was drawn anew") in listing(tables)
    code, out, _ = cli("table", str(store.root), "--columns", "list")
    assert code == 0
    assert re.search(r"^draws +how often a method was drawn anew *$", out, re.M)
    assert "draws" in report(tables, "run", questions=0)
    assert "Draws: seeds of a row." not in render(tables, "md", ["method", "gqa"])


def test_a_column_left_out_by_default_is_there_by_name_and_in_the_list(store, cli):
    tables = build(full(store).cells())
    assert "prefill" not in render(tables, "md").splitlines()[0]
    assert "prefill ms" in render(tables, "md", ["method", "prefill"]).splitlines()[0]
    assert "cells are timed one after another" in render(tables, "md", ["method", "prefill"])
    (row, *_) = csv.DictReader(io.StringIO(render(tables, "csv")))
    assert float(row["prefill_ms_cell_after_cell_median"]) == 2
    code, out, _ = cli("table", str(store.root), "--columns", "list")
    told = dict(line.split(maxsplit=1) for line in out.splitlines()[1:])
    assert code == 0
    assert "only where named" in told["prefill"]
    assert "only where named" not in told["gqa:s"]
    code, out, _ = cli("table", str(store.root), "--columns", ",".join(told), "--format", "md")
    assert (code, out.splitlines()[0].count("|")) == (0, len(told) + 1)


def test_columns_stand_in_the_order_asked_for(store):
    tables = build(full(store).cells())
    lines = [line for line in render(tables, "md", ["compute", "mme", "method"]).splitlines() if line.startswith("|")]
    assert lines[0] == "| compute alone, GFLOPs | mme score /1000 | method |"
    assert lines[4] == "| 1.00 | 500.0 (sd 100.0) | random |"
    rows = list(csv.DictReader(io.StringIO(render(tables, "csv", ["method", "gqa:s"]))))
    assert [row["method"] for row in rows] == ["none", "random", "fastv"]
    assert "visual_tokens_mean_over_layers" not in rows[0]
    assert float(rows[1]["gqa:s"]) == pytest.approx(0.5)
    assert r"\begin{tabular}{rl}" in render(tables, "latex", ["tokens", "method"])
    assert "visual" in render(tables, "text", ["tokens", "method"]).splitlines()[1]


def test_notes_are_about_the_columns_shown(store):
    tables = build(full(store).cells())
    told = ("Retained:", "Loyalty:", "Visual tokens:", "FLOPs:", "Prefill:")
    assert [start for start in told if start not in render(tables)] == ["Prefill:"]
    assert [start for start in told if start in render(tables, "md", ["method", "gqa", "retained"])] == ["Retained:"]
    found = [start for start in told if start in render(tables, "latex", ["method", "tokens", "prefill"])]
    assert found == ["Visual tokens:", "Prefill:"]


def test_a_task_names_all_its_scores(store):
    scores = [ScoreRecord(key=key, title=key, value=0.5, maximum=1) for key in ("f1", "accuracy")]
    put(store, config("tome", "pope"), scores=scores)
    tables = build(store.cells())
    header = render(tables, "md", ["pope"]).splitlines()[0]
    assert header == "| pope f1 % | pope accuracy % |"
    assert render(tables, "md", ["pope:accuracy"]).splitlines()[0] == "| pope accuracy % |"


def test_what_batches_executed_stands_beside_what_each_question_executes_alone(store):
    for task in ("gqa", "mme"):
        put(store, config("none", task), compute=Compute(macs=2e9, macs_sd=0, components={}, batch_macs=2e9))
        batch = 3e9 if task == "gqa" else 2e9
        put(store, config("visipruner", task), compute=Compute(macs=1e9, macs_sd=0, components={}, batch_macs=batch))
    tables = build(store.cells())
    lines = [line for line in render(tables, "md", ["compute", "batch_compute"]).splitlines() if line.startswith("|")]
    assert lines[0] == "| compute alone, GFLOPs | compute in batch, GFLOPs |"
    assert lines[-1] == "| 1.00 | 2.50 |"
    assert "batches of 8 executed, divided by their questions: with what rows were padded" in render(tables)
    rows = list(csv.DictReader(io.StringIO(render(tables, "csv"))))
    alone, batch = "executed_tmacs_question_alone", "executed_tmacs_in_batch"
    assert [(float(row[alone]), float(row[batch])) for row in rows] == [(2e-3, 2e-3), (1e-3, 2.5e-3)]
    (table,) = json.loads(render(tables, "json"))["tables"]
    assert [row["batch_executed_macs"] for row in table["rows"]] == [2e9, 2.5e9]


def test_what_batches_executed_is_not_told_where_a_cell_did_not_record_it(store):
    put(store, config("none", "gqa"), compute=Compute(macs=2e9, macs_sd=0, components={}, batch_macs=2e9))
    put(store, config("none", "mme"))
    tables = build(store.cells())
    assert "in batch" not in render(tables)
    (table,) = json.loads(render(tables, "json"))["tables"]
    assert table["rows"][0]["batch_executed_macs"] is None


@pytest.mark.parametrize(
    ("p", "p_holm", "p_equivalent", "difference", "arrow"),
    [
        (0.001, 0.01, None, 0.2, "↑"),
        (0.001, 0.01, 0.01, -0.2, "↓"),
        (0.01, 0.08, None, 0.2, "↗"),
        (0.01, 0.08, 0.3, -0.2, "↘"),
        (0.2, 1.0, None, -0.2, "·"),
        (0.2, 1.0, 0.3, 0.2, "·"),
        (0.2, 1.0, 0.01, 0.2, "≈"),
    ],
)
def test_marks_tell_what_is_shown_from_what_is_not(p, p_holm, p_equivalent, difference, arrow):
    one = compare(of_scores(np.ones((8, 1))), of_scores(np.zeros((8, 1))))
    comparison = dataclasses.replace(one, difference=difference, p=p)
    mark = mark_of("random", Contrast("random", comparison, p_holm, 8, None, p_equivalent))
    assert str(mark) == f"{arrow}r"
    assert "random" in mark.meaning
    assert "equal" not in mark.meaning
    assert arrow.translate(formats._LATEX).isascii()


def test_equivalence_is_said_only_with_a_margin_and_in_every_form(store, cli):
    ease = np.random.default_rng(0).random(600)
    answered(store, "none", ease < 0.9, 16.0)
    answered(store, "fastv", ease < 0.9)
    answered(store, "tome", ease < 0.5)
    without = render(build(store.cells()))
    assert "≈" not in without
    assert "·d" in next(line for line in without.splitlines() if line.startswith(" fastv"))
    text = render(build(store.cells(), 0.1))
    assert "≈d" in next(line for line in text.splitlines() if line.startswith(" fastv"))
    assert "↓d" in next(line for line in text.splitlines() if line.startswith(" tome"))
    assert "≈: differs by less than 10 % of the best possible score (two one-sided tests" in text
    code, out, _ = cli("table", str(store.root), "--margin", "10", "--format", "json")
    (row,) = (row for row in json.loads(out)["tables"][0]["rows"] if row["label"] == "fastv")
    against = row["scores"]["gqa"]["exact_match"]["against"]["dense"]
    assert (code, against["verdict"], against["p_equivalent"] < 0.05) == (0, "equivalent within the margin", True)
    assert cli("table", str(store.root), "--margin", "0")[0] == 2


def test_unknown_columns_are_one_line(store):
    tables = build(full(store).cells())
    with pytest.raises(OptionError, match="did you mean 'tokens'"):
        render(tables, "md", ["method", "token"])
    with pytest.raises(OptionError, match="JSON holds everything"):
        render(tables, "json", ["method"])


def test_json_says_budget_and_best(contest):
    (table,) = json.loads(render(build(contest.cells()), "json"))["tables"]
    rows = {row["label"]: row for row in table["rows"]}
    assert [rows[name]["budget_group"] for name in ("none", "tome", "divprune", "dart", "vtw")] == [None, 0, 0, 1, 2]
    assert rows["tome"]["scores"]["gqa"]["exact_match"]["best_p_holm"] < ALPHA
    assert rows["vtw"]["scores"]["gqa"]["exact_match"]["best_p_holm"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--columns", "methd"], "did you mean 'method'"),
        (["--format", "tex"], "choose text, md, latex, html, csv, json"),
        (["--columns", "method", "--against", "published"], "exclude each other"),
    ],
)
def test_the_command_ends_with_one_line(arguments, message, store, monkeypatch, capsys):
    full(store)
    monkeypatch.setattr(sys, "argv", ["visibench", "table", str(store.root), *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capsys.readouterr()
    assert (stopped.value.code, out, err.count("\n")) == (2, "", 1)
    assert message in err
