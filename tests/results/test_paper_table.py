"""The table that goes into a paper: display names, values alone, notes as comments."""

import re
import shutil
import subprocess
import sys

import pytest
from storing import config, frame, full, put
from visibench.methods import list_methods
from visibench.methods.explained import about, how
from visibench.results.store.records import ScoreRecord
from visibench.results.store.store import Store
from visibench.results.tables import method_facts
from visibench.results.tables.columns import choose
from visibench.results.tables.method_facts import MethodFacts
from visibench.results.tables.paper import paper
from visibench.results.tables.tables import build


@pytest.fixture
def printed(cli, tmp_path):
    full(Store(tmp_path))
    code, out, err = cli(
        "table", str(tmp_path), "--format", "latex", "--style", "paper", "--caption", "A & B", "--label", "tab:main"
    )
    assert code == 0, err
    return out


def test_it_is_one_column_wide_with_display_names_and_values_alone(printed):
    assert r"\begin{table}" in printed
    assert "table*" not in printed
    assert r"\caption{A \& B}" in printed
    assert r"\label{tab:main}" in printed
    head = next(line for line in printed.splitlines() if line.startswith("Method"))
    assert head.startswith("Method & GQA & MME")
    rows = [line for line in printed.splitlines() if line.endswith(r"\\")]
    assert {line.count("&") for line in rows} == {head.count("&")}
    assert [row.partition(" &")[0] for row in rows[1:]] == ["Dense", "Random tokens", "FastV"]
    assert not any(mark in line for line in rows for mark in ("pm", "arrow", "mathrm"))


def test_notes_are_comments_alone(printed):
    inside = printed[printed.index(r"\end{tabular}") :].splitlines()[1:-1]
    assert inside
    assert all(line.startswith("%") for line in inside)
    braces = re.sub(r"\\[{}]", "", re.sub(r"(?m)^%.*$", "", printed))
    assert braces.count("{") == braces.count("}")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("pdflatex"), reason="needs pdflatex")
@pytest.mark.parametrize("columns", ["onecolumn", "twocolumn"])
def test_table_and_figure_go_into_a_paper_unchanged(columns, printed, cli, tmp_path):
    """Nothing is wider than its column, nothing is undefined."""
    figure = tmp_path / "pareto.pdf"
    assert (
        cli("plot", str(tmp_path), "--kind", "pareto", "--width", "column", "--no-notes", "--out", str(figure))[0] == 0
    )
    assert cli("table", str(tmp_path), "--format", "latex")[0] == 0
    included = r"\begin{figure}\includegraphics{pareto.pdf}\caption{Front}\end{figure}"
    head = rf"\documentclass[{columns}]{{article}}\usepackage{{booktabs,graphicx}}\begin{{document}}"
    (tmp_path / "paper.tex").write_text(
        "\n".join([head, printed, r"Table~\ref{tab:main}.", included, r"\end{document}"])
    )
    for _ in range(2):
        ran = subprocess.run(
            ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"],
            cwd=tmp_path, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-2000:]
    assert "Overfull" not in ran.stdout
    assert "undefined" not in ran.stdout


def test_two_scores_of_a_task_have_two_titles(tmp_path):
    samples = frame(["a", "b"], [1, 0], target=["yes", "no"], answer="yes")
    scores = [
        ScoreRecord(key="pope_f1_score", title="F1", value=2 / 3, maximum=1),
        ScoreRecord(key="pope_accuracy", title="accuracy", value=0.5, maximum=1),
    ]
    put(Store(tmp_path), config("none", "pope"), samples=samples, scores=scores)
    tables = build(Store(tmp_path).cells())
    head = [r"Method & POPE F1 \% & POPE accuracy \% & GFLOPs \\", r"Method & POPE & GFLOPs \\"]
    for names, titles in zip(
        (["method", "pope", "compute"], ["method", "pope:pope_f1_score", "compute"]), head, strict=True
    ):
        assert titles in paper(tables, choose(tables, names)).splitlines()


@pytest.mark.parametrize(("width", "inches"), [("column", 3.0), ("page", 6.3), ("4.5", 4.5)])
def test_a_figure_for_a_paper_has_its_width_and_display_names(width, inches, cli, tmp_path):
    full(Store(tmp_path))
    file = tmp_path / "p.svg"
    code, _, err = cli("plot", str(tmp_path), "--kind", "pareto", "--width", width, "--no-notes", "--out", str(file))
    assert code == 0, err
    assert float(re.search(r'width="([\d.]+)pt"', file.read_text())[1]) == pytest.approx(72 * inches, abs=0.1)
    comments = re.findall(r"<!-- (.*?) -->", file.read_text())
    assert {"GQA", "FastV", "Random tokens", "Dense"} <= {*comments}
    assert not any("Questions" in one for one in comments)
    assert cli("plot", str(tmp_path), "--width", "wide")[0] == 2


def test_it_belongs_to_latex(cli, tmp_path):
    full(Store(tmp_path))
    latex = ["--format", "latex"]
    for options in (["--style", "paper"], [*latex, "--caption", "x"], [*latex, "--style", "x"]):
        code, _, err = cli("table", str(tmp_path), *options)
        assert code == 2
        assert "belongs to --format latex" in " ".join(err.split())


def test_what_sources_say_of_methods_is_what_they_are_registered_with():
    assert method_facts.built_in() == {
        name: MethodFacts(cls.title, about(cls), how(cls), cls.paper, cls.source, cls.hook_points)
        for name, cls in list_methods().items()
    }


@pytest.mark.slow
def test_a_table_with_display_names_imports_no_torch():
    code = "import sys; from visibench.results.tables import paper, titles; titles.method_title('fastv')"
    subprocess.run([sys.executable, "-c", f"{code}; sys.exit('torch' in sys.modules)"], check=True)
