"""The README says what the code does."""

import json
from pathlib import Path
from statistics import fmean

import visibench
from support import GOLDEN
from visibench.methods.__main__ import markdown

README = (Path(visibench.__file__).parent / "README.md").read_text()


def test_table_of_methods_is_the_registry():
    """If this fails: put the output of ``python -m visibench.methods`` into the README."""
    assert markdown() in README


def test_every_method_of_other_authors_has_vectors_from_their_code():
    for name, method in visibench.list_methods().items():
        assert bool(method.source) == bool(method.paper)
        if method.source:
            assert (GOLDEN / f"{name.split('_')[0]}.npz").exists()


def test_readme_names_the_commands_that_ci_runs():
    ci = (Path(visibench.__file__).parent / ".ci" / "run").read_text()
    assert "\nmake test\n" in ci
    assert 'pip install -c constraints.txt -e ".[dev]"     &&  make test' in README
    assert "pip install -c constraints.txt -e .            &&  visibench sweep configs/quick.yaml" in README


def test_table_of_times_is_the_stored_profile():
    (file,) = (Path(visibench.__file__).parent / "results" / "measured").glob("profile_cpu_*.json")
    assert f"results/measured/{file.name}" in README
    for row in json.loads(file.read_text())["rows"]:
        prefill, speedup = row["ms"]["prefill"], row["speedup"]["prefill"]
        assert (
            f"| {row['method']} | {fmean(row['visual_tokens']):.0f} | {prefill['median']:.0f} ± {prefill['iqr']:.0f} "
            f"| {row['promised']:.2f} | {speedup:.2f} | {speedup / row['promised']:.0%} |".replace("% |", " % |")
        ) in README
