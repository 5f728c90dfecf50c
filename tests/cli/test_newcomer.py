"""What a person does who has only the README and ``--help``: each step as a command of its own."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import visibench
from PIL import Image, ImageDraw

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
ROOT = Path(visibench.__file__).parent
METHOD = """from visibench.methods import Scored, register
@register("norm", "Norm")
class Norm(Scored):
    hook_points = ("projector",)
    def score(self, view): return view.projected.norm(dim=2)
"""
SWEEP = """model: tiny
tasks: [mine.jsonl]
timing: null
methods: [none, "random:keep=0.25", "fastv:keep=0.25", {name: norm, path: norm.py, keep: 0.25}]
"""
COLOURS = ("red", "green", "blue", "yellow")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return tmp_path_factory.mktemp("newcomer")


@pytest.fixture(scope="module")
def visit(here):
    """Runs a command there, in a terminal's 80 columns; gives what it printed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT.parent), "COLUMNS": "80"}

    def call(*arguments: str) -> str:
        command = [sys.executable, "-m", "visibench", *arguments]
        done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    return call


@pytest.fixture(scope="module")
def swept(here, visit):
    """Own questions and an own method, run beside baselines."""
    lines = []
    for number in range(20):
        colour, picture = COLOURS[number % 4], Image.new("RGB", (96, 96), "white")
        ImageDraw.Draw(picture).ellipse((20, 20, 76, 76), fill=colour)
        picture.save(here / f"{number}.png")
        lines.append({"image": f"{number}.png", "question": "What color is the circle?", "answers": [colour]})
    (here / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (here / "norm.py").write_text(METHOD)
    (here / "mine.yaml").write_text(SWEEP)
    return visit("sweep", "mine.yaml", "--out", "runs/mine")


def test_first_table(visit):
    said = visit(
        "sweep", "quick", "--limit", "4", "--only", "fastv:keep=0.5", "--only-tasks", "gqa", "--out", "runs/quick"
    )
    assert re.search(r"^ fastv:keep=0\.5 +\d", said, re.MULTILINE), said
    assert "SUBSET" in said


def test_own_method_beside_baselines_on_own_questions(swept):
    for row in ("none", "random:keep=0.25", "fastv:keep=0.25", "norm"):
        assert re.search(rf"^ {row}", swept, re.MULTILINE), swept
    assert "mine 20 of 20" in swept


def test_an_edited_method_gets_new_numbers(here, swept, visit):
    before = json.loads(visit("table", "runs/mine", "--format", "json"))["tables"]
    (here / "norm.py").write_text(METHOD.replace("view.projected.norm", "-view.projected.norm"))
    again = visit("sweep", "mine.yaml", "--out", "runs/mine")
    assert "3 of 4 cells are done already" in again
    after = json.loads(visit("table", "runs/mine", "--format", "json"))["tables"]
    rows = [sum(row["method"] == "norm" for table in tables for row in table["rows"]) for tables in (before, after)]
    assert rows == [1, 2], "the old row stays, as of other code"


def test_a_table_and_a_figure_for_a_two_column_paper(here, swept, visit):
    styled = ("--format", "latex", "--style", "paper", "--caption", "Ours.", "--label", "tab:us")
    table = visit("table", "runs/mine", *styled, "--current")  # without the edited method's old row
    assert table.count(r"\begin{table}") == 1
    assert "Norm (keep=0.25)" in table
    figure = here / "pareto.pdf"
    visit("plot", "runs/mine", "--kind", "pareto", "--width", "column", "--no-notes", "--out", str(figure), "--current")
    assert figure.read_bytes().startswith(b"%PDF")
    if shutil.which("pdflatex"):
        head = r"\documentclass[twocolumn]{article}\usepackage{booktabs,graphicx}\begin{document}"
        (here / "paper.tex").write_text(
            "\n".join([head, table, rf"\noindent\includegraphics{{{figure}}}", r"\end{document}"])
        )
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout[-2000:]
        assert "Overfull" not in done.stdout


def test_a_part_of_the_ci_sweep_passes_the_packaged_baseline(visit):
    visit(
        "sweep", "ci", "--limit", "9", "--only-tasks", "gqa", "--only", "fastv:layer=3,keep=0.5", "--out", "runs/part"
    )
    said = visit("check", "runs/part", "--subset")
    assert "PASS: 2 cells keep and compute the same" in said
    assert "Not compared: 18 of 20 cells, 141 of 150 questions of gqa of the baseline." in said
    assert not re.search(r"answers changed,", said)


def test_what_a_paper_would_cost(visit):
    said = visit("reproduce", "visipruner", "--dry-run")
    assert re.search(r"[\d.]+ GPU-hours", said), said
