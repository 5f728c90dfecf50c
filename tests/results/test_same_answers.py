"""``benchmarks/same_answers.py``: two run folders, compared cell by cell."""

import importlib.util
import math
from pathlib import Path

import pytest
import visibench
from storing import SAMPLES, config, put
from visibench.results.store.store import Store

FILE = Path(visibench.__file__).parent / "benchmarks/same_answers.py"
WHOLE = SAMPLES.assign(output="yes.", kept="8A==", kv_lengths=[[9, 9], [9, 7]], executed_macs=[0.1, 0.2])


@pytest.fixture(scope="module")
def compare():
    found = importlib.util.spec_from_file_location("same_answers", FILE)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module.main


@pytest.fixture
def runs(tmp_path):
    """Two folders with the same two cells, whose times differ."""
    for name, ms in (("old", 3.0), ("new", 4.0)):
        for method in ("none", "fastv"):
            put(Store(tmp_path / name), config(method), samples=WHOLE.assign(latency_ms=ms), seconds={"answer": ms})
    return tmp_path / "old", tmp_path / "new"


def test_times_alone_are_no_difference(runs, compare, capsys):
    assert compare(list(map(str, runs))) == 0
    assert capsys.readouterr().out == f"{runs[0]} and {runs[1]}: the same in every cell\n"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"output": ["yes.", "no."]}, "output of 1 of 2 questions, first 1: 'yes.' and 'no.'"),
        ({"answer": ["no", "no"]}, "answer of 2 of 2 questions, first 0: 'yes' and 'no'"),
        ({"score": [1.0, math.nan]}, "score of 1 of 2 questions, first 1: 0.0 and nan"),
        ({"kept": ["8A==", "4A=="]}, "kept of 1 of 2"),
        ({"visual_tokens": [[4, 4], [4, 3]]}, "visual_tokens of 1 of 2"),
        ({"kv_lengths": [[9, 9], [9, 7, 7]]}, "kv_lengths of 1 of 2"),
        ({"executed_macs": [0.1, 0.2 * (1 + 2**-52)]}, "executed_macs of 1 of 2"),
        ({"target": ["yes", "no"]}, "target of 1 of 2"),
        ({"doc_id": [0, 2]}, "other questions"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_a_question_got_must_be_the_same(change, said, runs, compare, capsys):
    put(Store(runs[1]), config("fastv"), samples=WHOLE.assign(**change))
    assert compare(list(map(str, runs))) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{config('fastv').folder}: {said}")


def test_labels_scores_columns_and_cells_count(runs, compare, capsys):
    new = Store(runs[1])
    put(new, config("none"), 0.79, samples=WHOLE)
    put(new, config("fastv", label="other"), samples=WHOLE.drop(columns="kept"))
    put(new, config("vtw"), samples=WHOLE)
    assert compare(list(map(str, runs))) == 1
    said = capsys.readouterr().out
    for part in (
        "vtw-s0-",
        "only in",
        "label 'fastv' and 'other'",
        "column 'kept' on one side alone",
        "metrics {'s': 0.",
    ):
        assert part in said


def test_the_order_of_rows_is_none_of_the_answers(runs, compare):
    put(Store(runs[1]), config("none"), samples=WHOLE[::-1])
    assert compare(list(map(str, runs))) == 0


def test_a_folder_that_is_no_run_is_one_line(runs, compare, capsys):
    assert compare([str(runs[0]), str(runs[0] / "nowhere")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: no folder")
