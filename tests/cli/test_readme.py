"""The README says what the code does."""

import json
import re
from pathlib import Path
from statistics import fmean, median

import pytest
import visibench
from support import GOLDEN
from visibench.evals.sweeps.__main__ import TABLES
from visibench.evals.sweeps.__main__ import markdown as keys
from visibench.methods.__main__ import markdown

ROOT = Path(visibench.__file__).parent
README = (ROOT / "README.md").read_text()
PAGES = {page.name: page.read_text() for page in (ROOT / "docs").glob("*.md")}


def test_table_of_methods_is_the_registry():
    """If this fails: put the output of ``python -m visibench.methods`` into docs/methods.md."""
    assert markdown() in PAGES["methods.md"]


def test_keys_of_configurations_are_those_of_the_code():
    """If this fails: put the output of ``python -m visibench.evals.sweeps`` into docs/sweeps.md."""
    assert keys() in PAGES["sweeps.md"]
    for kind, _ in TABLES.values():
        assert [name for name, field in kind.model_fields.items() if not field.description] == []


def test_table_of_the_readme_is_part_of_the_table_of_the_first_run():
    rows = [dict(zip(head, row, strict=True)) for head, *body in [_cells(PAGES["tables.md"])] for row in body]
    values = {row["method"]: {key: re.match(r"[*]*([\d.]+)", cell) for key, cell in row.items()} for row in rows}
    names = ("gqa exact match %", "mme perception /1000", "textvqa_val VQA accuracy %", "visual tokens T")
    _, *ours = next(table for table in map(_cells, README.split("\n\n")) if table and table[0][0] == "method")
    assert len(ours) == 6
    for method, *figures in ours:
        stored = values[method]
        assert figures == [stored[name][1] for name in (*names, "compute alone, GFLOPs")]


def _cells(text):
    """The cells of a page's lines of a table; those of its first line, whose titles count, are the header."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    width = len(lines[0]) if lines else 0
    return [[cell.strip() for cell in line] for line in lines if len(line) == width]


def test_readme_is_short_and_the_index_names_every_page():
    assert len(README.split()) <= 1500
    assert {*PAGES} - {"README.md"} <= {*re.findall(r"\]\(([a-z_]+\.md)\)", PAGES["README.md"])}


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *(f"docs/{name}" for name in sorted(PAGES))])
def test_links_within_the_project_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", (ROOT / page).read_text()):
        assert link.startswith("http") or ((ROOT / page).parent / link).exists(), link


def test_every_method_of_other_authors_has_vectors_from_their_code():
    for name, method in visibench.list_methods().items():
        assert bool(method.source) == bool(method.paper)
        if method.source:
            assert (GOLDEN / f"{name.split('_')[0]}.npz").exists()


def test_readme_names_the_commands_that_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text()
    assert "\nmake test\n" in ci
    assert 'pip install -c constraints.txt -e ".[dev]"     &&  make test' in README
    assert "pip install -c constraints.txt -e .            &&  visibench sweep configs/quick.yaml" in README


@pytest.mark.parametrize("file", sorted((ROOT / "results" / "measured").glob("profile_cpu_*.json")), ids=str)
def test_tables_of_times_are_the_stored_profiles(file):
    assert f"results/measured/{file.name}" in PAGES["speed.md"]
    for row in json.loads(file.read_text())["rows"]:
        prefill, speedup = row["ms"]["prefill"], row["speedup"]["prefill"]
        begins = (
            f"| {row['method']} | {fmean(row['visual_tokens']):.0f} | {prefill['median']:.0f} ± {prefill['iqr']:.0f} "
            f"| {row['promised']:.2f} | {speedup:.2f} | {speedup / row['promised']:.0%} |".replace("% |", " % |")
        )
        (line,) = (line for line in PAGES["speed.md"].splitlines() if line.startswith(begins))
        if row["plain_ms"]:
            shares = [plain / own for plain, own in zip(row["plain_ms"]["times"], prefill["times"], strict=True)]
            assert f"| {median(shares):.0%} ± ".replace("%", " %") in line
