"""The table over checkpoints: rows of a method together, figures those of the cells."""

from pathlib import Path

import pandas as pd
import pytest
import torch
import visibench
from storing import config, frame, put
from visibench.errors import DataError
from visibench.evals.settings.config import variants
from visibench.evals.sweeps.config import load_config
from visibench.models import load_model
from visibench.results.store.records import Compute, Environment, ScoreRecord, VisualTokens
from visibench.results.store.store import Store
from visibench.training import compare
from visibench.training.compare import figures_of, table_of, together

IMAGES = "aabbccdd"


def answered(store, model, method, right, tokens=(4, 2), task="gqa", images=IMAGES, **changes):
    """Questions about these ``images``, the first ``right`` of them answered rightly."""
    score = [1.0] * right + [0.0] * (len(images) - right)
    samples = frame(images, score, kv_lengths=[[n + 3 for n in tokens]] * len(images))
    scores = [ScoreRecord(key="exact_match", title="exact match", value=right / len(images), maximum=1)]
    changes |= {"visual_tokens": VisualTokens(prompt=4, per_layer=list(tokens)), "scores": scores}
    changes |= {"metrics": {"exact_match": right / len(images)}}
    changes |= {"compute": Compute(macs=2.5e9, macs_sd=0, components={"ffn": 2.5e9}), "prefill": None}
    put(store, config(method, task, model=model), samples=samples, **changes)


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "entry_bytes", lambda model, dtype: 100)
    return Store(tmp_path)


def test_a_method_stands_beside_itself_for_each_checkpoint(store, tmp_path):
    answered(store, "plain/export", "none", 8, (4, 4))
    answered(store, "plain/export", "staged", 2)
    answered(store, "staged/export", "none", 4, (4, 4))
    answered(store, "staged/export", "staged", 7)
    header, _, *rows = [line.split(" | ") for line in table_of(figures_of(tmp_path)).split("\n\n")[0].splitlines()]
    assert [entry.strip("| ") for entry in header[2:]] == [
        "gqa exact match", "T", "GMACs", "KV entries", "KV kB", "prefill ms",
    ]  # fmt: skip
    read = [(row[0].strip("| "), row[1], row[2].split()[0], *row[3:7]) for row in rows]
    assert read == [
        ("none", "plain", "100.0", "4.0", "2.500", "7.0", "1"),
        ("none", "staged", "50.0", "4.0", "2.500", "7.0", "1"),
        ("staged", "plain", "25.0", "3.0", "2.500", "6.0", "1"),
        ("staged", "staged", "87.5", "3.0", "2.500", "6.0", "1"),
    ]
    low, high = map(float, rows[3][2].partition("[")[2].rstrip("]").split(", "))
    assert 0 <= low < 87.5 < high <= 100


def test_costs_are_means_over_tasks_however_many_questions_each_has(store, tmp_path):
    answered(store, "plain", "none", 8, (4, 4))
    answered(store, "plain", "none", 2, (8, 8), task="pope", images="ab")
    figures = figures_of(tmp_path).set_index("figure")["value"]
    assert (figures["T"], figures["KV entries"]) == (6, 9)


def test_the_table_is_made_anew_from_shipped_figures(store, tmp_path, capsys, monkeypatch):
    answered(store, "plain", "none", 8, (4, 4))
    answered(store, "plain", "staged", 3)
    shown = []
    kept = str(tmp_path / "figures.csv")
    for arguments in ([str(tmp_path), "--csv", kept], [kept, "--plot", str(tmp_path / "figures.png")]):
        monkeypatch.setattr("sys.argv", ["compare", *arguments])
        compare.main()
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert "| staged | plain | 37.5 [" in shown[0]
    assert "prefill ms" not in shown[0], "nobody measured it"
    assert (tmp_path / "figures.png").stat().st_size


def test_runs_are_compared_as_one_under_the_names_given(store, tmp_path):
    for model, right in (("plain", 6), ("later", 5)):
        answered(Store(tmp_path / model), model, "none", 8, (4, 4))
        answered(Store(tmp_path / model), model, "staged", right)
    parts = [figures_of(tmp_path / "plain"), figures_of(tmp_path / "later")]
    figures = together(parts, {"later": "staged, seed 3"})
    rows = figures[figures.figure == "gqa exact match"]
    assert [*zip(rows.method, rows.checkpoint, rows.value, strict=True)] == [
        ("none", "plain", 100),
        ("none", "staged, seed 3", 100),
        ("staged", "plain", 75),
        ("staged", "staged, seed 3", 62.5),
    ]
    with pytest.raises(DataError, match="no checkpoint nosuch to name: there are plain, later"):
        together(parts, {"nosuch": "x"})
    parts[1].loc[parts[1].figure == "gqa exact match", "n"] = 7
    with pytest.raises(DataError, match="differ in their questions of gqa exact match"):
        together(parts, {})


def test_the_page_holds_the_table_of_the_shipped_figures():
    root = Path(visibench.__file__).parent
    figures = together([pd.read_csv(root / "results" / "measured" / "guideline_tiny.csv")], {})
    assert table_of(figures) in (root / "docs" / "guideline.md").read_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_of_an_entry_are_those_of_the_cache(dtype):
    loaded = load_model("tiny", device="cpu", dtype=dtype)
    cache = loaded.model(input_ids=torch.ones(1, 5, dtype=torch.long)).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == 5 * len(cache.layers) * compare.entry_bytes("tiny", dtype)


def test_checkpoints_that_were_asked_otherwise_are_refused(store, tmp_path):
    with pytest.raises(DataError, match="no finished results"):
        figures_of(tmp_path)
    answered(store, "plain", "none", 8)
    answered(store, "staged", "none", 8, total=99)
    with pytest.raises(DataError, match="differ in their questions"):
        figures_of(tmp_path)
    answered(store, "older", "none", 8, versions={"torch": "1"})
    with pytest.raises(DataError, match=r"differ in .*versions"):
        figures_of(tmp_path)


def test_checkpoints_of_two_precisions_are_refused_and_of_two_sizes_not(store, tmp_path):
    for model, facts in (("plain", {"name": "plain", "parameters": 1}), ("wide", {"name": "wide", "parameters": 2})):
        ran = Environment(model={"dtype": "float32"} | facts, versions={"torch": "2"}, machine={})
        answered(store, model, "none", 8, environment=ran)
    assert {*figures_of(tmp_path).checkpoint} == {"plain", "wide"}
    half = Environment(model={"dtype": "bfloat16"}, versions={"torch": "2"}, machine={})
    answered(store, "half", "none", 8, environment=half)
    with pytest.raises(DataError, match=r"differ in environment\.model\.dtype: run all checkpoints alike"):
        figures_of(tmp_path)


def test_the_sweep_reads_and_names_what_the_page_compares():
    sweep, _ = load_config("stages", ["models=[plain, staged]"])
    assert sweep.models == ["plain", "staged"]
    assert [variant.method.name for variant in variants(sweep)][:3] == ["none", "staged", "staged"]
