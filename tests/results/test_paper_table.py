"""The table that goes into a paper: display names, values alone, notes as comments."""

import re

import pytest
from storing import full
from visibench.results.store.store import Store


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


def test_it_belongs_to_latex(cli, tmp_path):
    full(Store(tmp_path))
    latex = ["--format", "latex"]
    for options in (["--style", "paper"], [*latex, "--caption", "x"], [*latex, "--style", "x"]):
        code, _, err = cli("table", str(tmp_path), *options)
        assert code == 2
        assert "belongs to --format latex" in " ".join(err.split())
