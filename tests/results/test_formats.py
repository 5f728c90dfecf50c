"""Tables in text, LaTeX and HTML, rows grouped by budget, what is bold, and the choice of columns."""

import io
import itertools
import random
import re
import shutil
import subprocess

import numpy as np
import pytest
from markdown_it import MarkdownIt
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from storing import config, full, put
from tabled import HOSTILE, Reader, answered, fields
from visibench.results.statistics.comparison import compare
from visibench.results.statistics.inference import ALPHA, MethodRuns, budget_groups
from visibench.results.store.store import Store
from visibench.results.tables.columns import columns
from visibench.results.tables.render import _grid, _Layout, render
from visibench.results.tables.tables import build

# ---- text ---------------------------------------------------------------------------------------------------------


def by_rich(table, chosen, layout) -> str:
    grid, stream = Table(box=box.SIMPLE_HEAD, pad_edge=False), io.StringIO()
    for column in chosen:
        if column.words:
            grid.add_column(column.title, max_width=layout.label, overflow="fold")
        else:
            grid.add_column(layout.title(table, column), justify="right", no_wrap=True)
    for title, rows in table.grouped():
        if title:
            grid.add_row()
            grid.add_row(Text(title))
        for row in rows:
            grid.add_row(*(Text(layout.entry(column, row)) for column in chosen))
    Console(file=stream, width=1000, no_color=True).print(grid)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


@pytest.mark.parametrize("room", [60, 24, 12])
@pytest.mark.parametrize("spell", ["text", "stacked", "brief"])
def test_text_stands_as_rich_would_set_it(store, spell, room):
    labels = ["none", "ours with words and keep=0.5,layers=scaled", "模型方法" * 9, HOSTILE, "a:b=1,c=2" * 9, "x" * 130]
    for place, label in enumerate(labels):
        answered(store, "none" if label == "none" else "fastv", [1, 0, 1, place % 2], 16.0 - place, label=label)
    (table,) = build(store.cells())
    layout = _Layout(lambda entry: getattr(entry, spell)("{}*"), room, narrow=spell == "brief")
    assert _grid(table, columns(table), layout).split("\n") == by_rich(table, columns(table), layout).split("\n")


# ---- budgets ------------------------------------------------------------------------------------------------------


def test_budgets_are_neighbours_within_a_quarter():
    rng = random.Random(0)
    for _ in range(100):
        means = [rng.choice((0, 16, 20, 25, 32, 40, 50, rng.uniform(1, 144))) for _ in range(rng.randrange(1, 20))]
        found = budget_groups(means)
        members = [[m for m, b in zip(means, found, strict=True) if b == budget] for budget in range(max(found) + 1)]
        assert all(0.8 * max(group) <= min(group) + 1e-6 for group in members)
        # Greedy from the largest: the first of each group would not fit into the one before.
        assert all(max(after) < 0.8 * max(before) for before, after in itertools.pairwise(members))


def test_a_quarter_itself_is_one_budget():
    assert budget_groups([40.0, 32.0, 31.9, 0.0, 0.0]) == [0, 0, 1, 2, 2]


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
