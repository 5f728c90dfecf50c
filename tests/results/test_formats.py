"""Tables in LaTeX and HTML, rows grouped by budget, what is bold, and the choice of columns."""

import csv
import dataclasses
import io
import itertools
import json
import random
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from markdown_it import MarkdownIt
from simulated import of_scores
from storing import config, frame, full, put
from visibench.cli import main
from visibench.errors import OptionError
from visibench.reports.html.report import report
from visibench.results.statistics.comparison import compare
from visibench.results.statistics.inference import ALPHA, Contrast, MethodRuns, budgets
from visibench.results.store.records import Compute, ScoreRecord, VisualTokens
from visibench.results.store.store import Store
from visibench.results.tables import formats
from visibench.results.tables.columns import COLUMNS, Column, TableEntry, add_column, listing
from visibench.results.tables.columns.scores import mark_of
from visibench.results.tables.render import render
from visibench.results.tables.tables import build

HOSTILE = r"a_b%c&d#$e{f}~^\g<script>alert(1)</script>"


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "run")


def answered(store, method, right, tokens=8.0, task="gqa", label=None, seed=0, **changes):
    """A cell whose questions, three about each image, are answered right where ``right`` says so."""
    samples = frame([f"i{i // 3}" for i in range(len(right))], right)
    score = ScoreRecord(key="exact_match", title="exact match", value=float(np.mean(right)), maximum=1)
    visual = VisualTokens(prompt=16, per_layer=[tokens, tokens])
    cell = config(method, task, seed, label=label or method, **changes)
    return put(store, cell, samples=samples, scores=[score], visual_tokens=visual, size=len(right), total=750)


def fields(line):
    """Entries of a line of a LaTeX table."""
    return re.split(r"(?<!\\)&", line.removesuffix(r" \\"))


# ---- budgets ------------------------------------------------------------------------------------------------------


def test_budgets_are_neighbours_within_a_quarter():
    rng = random.Random(0)
    for _ in range(100):
        means = [rng.choice((0, 16, 20, 25, 32, 40, 50, rng.uniform(1, 144))) for _ in range(rng.randrange(1, 20))]
        found = budgets(means)
        members = [[m for m, b in zip(means, found, strict=True) if b == budget] for budget in range(max(found) + 1)]
        assert all(0.8 * max(group) <= min(group) + 1e-6 for group in members)
        # Greedy from the largest: the first of each group would not fit into the one before.
        assert all(max(after) < 0.8 * max(before) for before, after in itertools.pairwise(members))


def test_a_quarter_itself_is_one_budget():
    assert budgets([40.0, 32.0, 31.9, 0.0, 0.0]) == [0, 0, 1, 2, 2]


def test_rows_stand_by_budget_with_dense_first(store):
    for method, tokens in (("none", 16.0), ("fastv", 4.0), ("tome", 8.0), ("dart", 8.0), ("vtw", 7.0)):
        answered(store, method, [1, 0, 1], tokens)
    found = [(title, [row.label for row in rows]) for title, rows in build(store.cells())[0].grouped()]
    assert found == [
        ("", ["none"]),
        ("T = 7.0 to 8.0 of 16 visual tokens (48 %)", ["dart", "tome", "vtw"]),
        ("T = 4.0 of 16 visual tokens (25 %)", ["fastv"]),
    ]


# ---- what is bold -------------------------------------------------------------------------------------------------


@pytest.fixture
def contest(store) -> Store:
    """At the larger budget tome leads clearly, at the smaller one dart only a little; vtw stands alone."""
    rng = np.random.default_rng(0)
    ease = rng.random(150)
    answered(store, "none", ease < 0.95, 16.0)
    for method, share, tokens in (("tome", 0.9, 8.0), ("fastv", 0.6, 8.0), ("divprune", 0.5, 7.0), ("vtw", 0.9, 2.0)):
        answered(store, method, ease < share, tokens)
    answered(store, "dart", (ease < 0.5) ^ (rng.random(150) < 0.1), 4.0)
    answered(store, "visionzip", (ease < 0.5) ^ (rng.random(150) < 0.1), 4.0)
    return store


def test_bold_is_the_best_shown_to_be_so(contest):
    (table,) = build(contest.cells())
    latex, page = render([table], "latex"), render([table], "html")
    (bold,) = [line for line in latex.splitlines() if r"\textbf" in line]
    assert bold.startswith("tome & \\textbf{")
    assert latex.count(r"\textbf") == page.count("<strong>") == render([table], "md").count("**") / 2 == 1
    assert re.search(r"tome +8\d\.\d\* [±+]", render([table]))
    assert "Bold: higher than all others of its group" in latex


def test_the_leader_must_beat_every_other_row(contest):
    """Its p is the largest over the others, adjusted over the two groups."""
    (table,) = build(contest.cells())
    cells = {cell.config.label: cell for cell in contest.cells()}
    measured = {label: MethodRuns([cell]).measured["gqa", "exact_match"] for label, cell in cells.items()}
    largest = max(compare(measured["tome"], measured[other]).p for other in ("fastv", "divprune"))
    runner_up = compare(measured["dart"], measured["visionzip"]).p
    assert largest < ALPHA < runner_up
    best = {row.label: row.evidence.best["gqa"]["exact_match"] for row in table.rows if row.evidence.best.get("gqa")}
    assert best.keys() - {"tome"} <= {"dart", "visionzip"}
    assert best["tome"] == pytest.approx(2 * largest, rel=1e-9, abs=0)


def test_of_two_rows_the_best_is_the_one_that_is_shown_above_the_other(tmp_path):
    bold = 0
    for seed in range(8):
        rng, store = np.random.default_rng(seed), Store(tmp_path / str(seed))
        for method, share in (("none", 0.8), ("random", 0.3), ("tome", 0.6)):
            answered(store, method, rng.random(36) < share)
        tome = {row.label: row.evidence for row in build(store.cells())[0].rows}["tome"]
        verdict, best = tome.against["random"]["gqa"]["exact_match"], tome.best["gqa"]["exact_match"]
        assert (best < ALPHA) == (verdict.sign == 1)
        bold += best < ALPHA
    assert 0 < bold < 8


@pytest.mark.slow
def test_equal_methods_are_seldom_bold(tmp_path):
    """Of three methods alike, one is called the best in at most 5 % of tables, though the best of each was selected."""
    rng, bold = np.random.default_rng(1), 0
    for trial in range(60):
        store = Store(tmp_path / str(trial))
        for method in ("fastv", "tome", "dart"):
            answered(store, method, rng.random(24) < 0.5)
        (table,) = build(store.cells())
        bold += any(p < ALPHA for row in table.rows for by in row.evidence.best.values() for p in by.values())
    # 60 tables at 5 %: 8 or more would happen once in 100 times.
    assert bold < 8


# ---- LaTeX --------------------------------------------------------------------------------------------------------


def test_latex_is_well_formed(store):
    full(store)
    put(store, config("tome", "gqa", label=HOSTILE), 0.5)
    put(store, config("vtw", "gqa", model="other_model"), 0.5)
    text = render(build(store.cells()), "latex")
    assert text.isascii()
    assert "random & 50.0$_{\\,(\\mathrm{sd}\\,10.0)}$" in text
    text = text.replace(r"{!}{%", "{!}{")
    plain = re.sub(r"\\[\\&%$#_{}]", "", text)
    depth = 0
    for character in plain:
        depth += {"{": 1, "}": -1}.get(character, 0)
        assert depth >= 0
    assert depth == 0
    assert plain.count("$") % 2 == 0
    opened = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+\*?)\}", text):
        assert kind == "begin" or opened.pop() == name
        opened += [name] if kind == "begin" else []
    assert not opened
    assert text.count(r"\begin{tabular}") == text.count(r"\toprule") == text.count(r"\bottomrule") == 2
    # A percent sign would hide the rest of its line.
    assert not re.search(r"(?<!\\)%", text.removeprefix("% \\usepackage{booktabs,graphicx}"))


def test_latex_lines_have_an_entry_a_column(store):
    (table,) = build(full(store).cells())
    text = render([table], "latex")
    columns = re.search(r"\\begin\{tabular\}\{(\w+)\}", text).group(1)
    lines = [line for line in text.splitlines() if line.endswith(r" \\") and "multicolumn" not in line]
    assert columns == "l" + "r" * 7
    assert [len(fields(line)) for line in lines] == [8] * 5
    fastv = ["fastv", "60.0", "600.0", "75.0", r"100.0$_{+0.0\,-69.8}$", "12.0", "8.0", "2.00"]
    assert [entry.strip() for entry in fields(lines[-1])] == fastv


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="needs a LaTeX")
def test_latex_compiles_and_fits_the_page(contest, tmp_path):
    answered(contest, "tome", [1, 0, 1] * 50, label=HOSTILE)
    for method in ("vtw", "dart"):
        answered(contest, method, [1, 0, 1] * 10, model="other", label=f"{method} " + "of a long name " * 5)
    text = render(build(contest.cells()), "latex")
    packages = r"\usepackage{booktabs,graphicx}"
    document = rf"\documentclass[twocolumn]{{article}}{packages}\begin{{document}}{text}\end{{document}}"
    (tmp_path / "table.tex").write_text(document)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "table.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull \\hbox" not in done.stdout


@pytest.mark.parametrize("label", ["[red]", "*"])
def test_latex_rows_begin_with_no_argument_of_the_row_before(store, label):
    answered(store, "none", np.ones(9), 16)
    answered(store, "fastv", np.zeros(9), label=f"{label}x")
    assert not re.search(r"\\\\\s*[\[*]", render(build(store.cells()), "latex"))


@pytest.mark.parametrize(
    "label", [HOSTILE, "<b>x</b>&amp;", "x|y`z`*w*", "_k_ a_b __c__", "[u](http://e)", "~~s~~", r"\*", "fastv:keep=0.5"]
)
def test_labels_are_no_markdown(store, label):
    answered(store, "none", np.ones(9), 16)
    answered(store, "fastv", np.zeros(9), label=label)
    text = render(build(store.cells()), "md")
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(text)
    entries = [inline.children for inline in tokens if inline.type == "inline"]
    assert [label] in [[child.content for child in entry if child.type == "text"] for entry in entries]


def test_latex_escapes_labels(store):
    put(store, config("tome", "gqa", label=HOSTILE), 0.5)
    escaped = r"a\_b\%c\&d\#\$e\{f\}\textasciitilde{}\textasciicircum{}\textbackslash{}g"
    assert escaped + r"\textless{}script" in render(build(store.cells()), "latex")


# ---- HTML ---------------------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Rows of a page's tables as text; fails where tags do not nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.rows = [], set(), []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def test_html_holds_the_rows_of_the_text_table(contest):
    tables = build(contest.cells())
    page = Reader(render(tables, "html"))
    assert page.tags <= set(
        "html head meta title style body div table caption thead tbody tr th td br strong small p".split()
    )
    shown = {row[0]: row for row in page.rows if len(row) > 1}
    for line in render(tables, "md").splitlines():
        if line.startswith("|") and not line.startswith(("| ---", "| method")):
            entries = [entry.strip().replace("**", "") for entry in line.strip("|").split("|")]
            if not entries[0].startswith("*T"):
                assert shown[entries[0]][: len(entries)] == entries


def test_html_shows_hostile_labels_as_text(store):
    put(store, config("tome", "gqa", label=HOSTILE, model="<b>"), 0.5)
    put(store, config("tome", "gqa", label="x", model="other"), 0.5)
    page = Reader(render(build(store.cells()), "html"))
    assert "script" not in page.tags
    assert HOSTILE in [row[0] for row in page.rows]


# ---- columns ------------------------------------------------------------------------------------------------------


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
