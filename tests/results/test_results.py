"""Stored results and the tables made of them."""

import csv
import io
import json
import re
import statistics

import pandas as pd
import pytest
import yaml
from storing import SAMPLES, config, full, metrics, put
from visibench.errors import DataError, OptionError
from visibench.evals.sweeps.config import parse_config
from visibench.results.store.records import ScoreRecord, TimingConfig
from visibench.results.store.store import Store
from visibench.results.tables.render import fitted, render
from visibench.results.tables.tables import build


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "run")


# ---- store --------------------------------------------------------------------------------------------------------


def test_a_cell_comes_back_as_it_was_stored(store):
    stored = put(store, config(), float("nan"), samples=SAMPLES)
    (back,) = store.cells()
    assert back.config == stored.config
    assert back.metrics.model_dump_json() == stored.metrics.model_dump_json()
    samples = back.samples()
    samples = samples.assign(visual_tokens=samples["visual_tokens"].map(list))
    pd.testing.assert_frame_equal(samples[SAMPLES.columns], SAMPLES)


def test_cells_of_schema_1_are_read_with_nulls(store):
    cell = put(store, config(), samples=SAMPLES, schema_version=1)
    samples = store.cells()[0].samples()
    assert "latency_ms" not in pd.read_parquet(cell.path / "samples.parquet")
    assert samples[["latency_ms", "batch_questions", "dense_agreement"]].isna().all(axis=None)
    assert [samples[name].dtype.kind for name in ("latency_ms", "batch_questions", "dense_agreement")] == list("fib")


def test_everything_but_the_label_counts_for_the_hash():
    base = config()
    changes = {"model": "x", "checkpoint": "y", "dtype": "float16", "options": {"layer": 3}, "seed": 1, "limit": 5}
    changes |= {"origin": "hub", "batch_size": 2, "timing": TimingConfig(repeats=3), "task": "pope", "device": "cpu"}
    digests = {config(**{key: value}).digest() for key, value in changes.items()}
    assert len(digests | {base.digest()}) == len(changes) + 1
    assert config(label="another").digest() == base.digest()


def test_only_the_metrics_file_means_done(store):
    cell = config()
    assert store.done(cell) is None
    folder = store.begin(cell)
    assert json.loads((folder / "config.json").read_text())["method"] == "none"
    assert store.done(cell) is None
    SAMPLES.to_parquet(folder / "samples.parquet")
    (folder / "metrics.json.partial").write_text(metrics(cell).model_dump_json())
    assert store.done(cell) is None
    store.finish(cell, SAMPLES, metrics(cell, size=2))
    assert store.done(cell) is not None
    assert not list(folder.glob("*.partial"))


def test_beginning_again_undoes_done(store):
    put(store, config())
    store.begin(config())
    assert store.done(config()) is None


def test_metrics_of_another_configuration_do_not_count(store):
    cell, other = config(), config(limit=5)
    folder = store.begin(cell)
    store.finish(cell, SAMPLES, metrics(other))
    assert store.done(cell) is None
    with pytest.raises(DataError, match=str(folder)):
        store.cells()


def test_metrics_never_stand_there_in_part(store, monkeypatch):
    cell = config()
    store.begin(cell)

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(KeyboardInterrupt):
        store.finish(cell, SAMPLES, metrics(cell))
    assert store.done(cell) is None
    assert not (store.path(cell) / "metrics.json").exists()


@pytest.mark.parametrize("damage", ["{", '{"schema_version": 9}', ""])
@pytest.mark.parametrize("file", ["metrics.json", "config.json"])
def test_damaged_files_are_named(damage, file, store):
    path = put(store, config()).path / file
    path.write_text(damage)
    with pytest.raises(DataError, match="run again") as caught:
        store.cells()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_samples_are_named(store):
    cell = put(store, config())
    (cell.path / "samples.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"samples\.parquet"):
        cell.samples()


def test_a_new_label_needs_no_new_run(store):
    put(store, config())
    assert store.done(config(label="dense")) is not None
    assert store.cells()[0].config.label == "dense"


def test_folders_without_results(store, tmp_path):
    with pytest.raises(DataError, match="no folder"):
        store.cells()
    put(store, config())
    with pytest.raises(DataError, match=r"did you mean '.*run'"):
        Store(tmp_path).cells()
    store.begin(config())
    with pytest.raises(DataError, match="no finished results"):
        store.cells()


# ---- tables -------------------------------------------------------------------------------------------------------


def test_rows_average_seeds_and_tasks(store):
    (table,) = build(full(store).cells())
    assert [row.label for row in table.rows] == ["none", "random", "fastv"]
    dense, random, fastv = table.rows
    assert dense.retained.mean == pytest.approx(100)
    assert fastv.retained.mean == pytest.approx(75)
    assert random.seeds == [0, 1, 2]
    assert random.scores["gqa"]["s"].mean == pytest.approx(0.5)
    assert random.scores["gqa"]["s"].sd == pytest.approx(statistics.stdev([0.4, 0.5, 0.6]))
    assert random.retained.mean == pytest.approx(62.5)
    assert random.retained.sd == pytest.approx(statistics.stdev([50, 62.5, 75]))
    assert (fastv.tokens.mean, fastv.tokens.last) == (12, 8)
    assert (fastv.macs, random.macs) == (2e9, 1e9)
    assert fastv.prefill.n == 6
    assert (fastv.prefill.median, fastv.prefill.min) == (2.0, 1.0)


def test_retained_needs_all_tasks_and_a_dense_row(store):
    full(store)
    put(store, config("tome", "gqa"), 0.8)
    rows = {row.label: row for row in build(store.cells())[0].rows}
    assert rows["tome"].retained is None
    (table,) = build([cell for cell in store.cells() if cell.config.method != "none"])
    assert all(row.retained is None for row in table.rows)


@pytest.mark.parametrize(
    ("changes", "outcome", "named"),
    [
        ({"model": "other"}, {}, "model = other"),
        ({"checkpoint": "abc"}, {}, "checkpoint = abc"),
        ({"limit": 20}, {}, "limit = 20"),
        ({"origin": "hub"}, {"data": "d1"}, "origin = hub"),
        ({"batch_size": 2}, {}, "batch_size = 2"),
        ({}, {"versions": {"torch": "3"}}, "torch = 3"),
    ],
)
def test_what_cannot_be_compared_stands_in_tables_of_its_own(changes, outcome, named, store):
    put(full(store), config("sparse", "gqa", **changes), 0.7, **outcome)
    large, small = build(store.cells())
    assert [row.label for row in small.rows] == ["sparse"]
    assert "sparse" not in [row.label for row in large.rows]
    assert small.rows[0].retained is None
    text = render([large, small])
    assert "Table 2 of 2, not to be compared with the others" in text
    assert named in text


def test_commits_are_named_and_keep_no_cells_apart(store):
    cells = (("tome", {"commit": "0123456789ab", "dirty": True}), ("dart", {"commit": "f" * 40}), ("vtw", {}))
    for label, code in cells:
        environment = metrics(config(), versions={"visibench": "1", "torch": "2"}).environment
        environment = environment.model_copy(update={"code": code, "host": {"cores": len(label)}})
        put(store, config(label, "gqa"), environment=environment)
    (table,) = build(store.cells())
    assert table.commits == ["012345678 with changes", "fffffffff"]
    assert "visibench 1 (commit 012345678 with changes and fffffffff), torch 2." in render([table])


def test_remarks_on_cells_are_told(store):
    put(full(store), config("tome", "gqa"), remarks=["2 of 50 with NaN or infinite logits"])
    tables = build(store.cells())
    assert "Remarks: tome · gqa · seed 0: 2 of 50 with NaN or infinite logits." in render(tables)
    assert render(tables, "latex").isascii()


@pytest.mark.parametrize(
    ("reused", "where"),
    [
        ({"none gqa 0"}, "1 of 10 cells (none · gqa)"),
        ({"none gqa 0", "none mme 0"}, "2 of 10 cells (none · all tasks)"),
        ({"random gqa 0", "random gqa 2", "fastv mme 0"}, "3 of 10 cells (random · gqa (seed 0 and 2); fastv · mme)"),
        (lambda name: name not in ("none gqa 0", "fastv mme 0"), "8 of 10 cells (all but none · gqa; fastv · mme)"),
        (lambda name: "fastv" not in name, "8 of 10 cells (all but fastv · all tasks)"),
        (lambda name: True, "all 10 cells"),
    ],
)
def test_the_cells_that_reused_vision_features_are_named(reused, where, store):
    chosen = reused if callable(reused) else reused.__contains__
    for method in ("none", "fastv", "random"):
        for task in ("gqa", "mme"):
            for seed in range(3 if method == "random" else 1):
                put(store, config(method, task, seed), reused_images=7 * chosen(f"{method} {task} {seed}"))
    assert f"\nVision features of an image were reused in {where}. FLOPs " in render(build(store.cells()))
    rows = json.loads(render(build(store.cells()), "json"))["tables"][0]["rows"]
    assert {
        f"{row['method']} {task} {seed}": count
        for row in rows
        for task, by in row["reused_images"].items()
        for seed, count in by.items()
    } == {
        f"{cell.config.method} {cell.config.task} {cell.config.seed}": cell.metrics.reused_images
        for cell in store.cells()
    }


def test_nothing_is_said_of_vision_features_where_none_were_reused(store):
    full(store)
    assert "Vision features" not in render(build(store.cells()))


def test_rows_that_were_not_run_are_named_with_what_adds_them(store):
    put(store, config("none"))
    put(store, config("fastv"))
    text = render(build(store.cells()))
    methods = "{name: random, budget: [{tokens: 12}], seeds: [0, 1, 2]}, {name: pooling, budget: [{tokens: 12}]}, "
    methods = f"[{methods}{{name: downsample, budget: [{{tokens: 12}}]}}]"
    assert (
        "Not run: random, pooling, downsample. A sweep adds what the model can carry with references: true, "
        f"or methods: {methods}." in text
    )
    parse_config({"model": "tiny", "tasks": ["gqa"], "methods": yaml.safe_load(methods)}, "the note")
    for method in ("random", "pooling", "downsample"):
        put(store, config(method))
    assert "Not run" not in render(build(store.cells()))
    without = [cell for cell in store.cells() if cell.config.method != "none"]
    assert "Not run: none. A sweep adds what the model can carry with methods: [none]." in render(build(without))


def test_one_limit_a_task_is_one_table(store):
    for method in ("none", "fastv"):
        put(store, config(method, "gqa", limit=20))
        put(store, config(method, "mme"), 700)
    (table,) = build(store.cells())
    assert table.is_subset
    assert "gqa 20 of 50 (embedded), mme 50 of 50 (embedded)" in render([table])
    assert "SUBSET" in render([table])


def test_other_questions_under_the_same_settings_are_an_error(store):
    put(full(store), config("sparse", "gqa"), data="changed")
    with pytest.raises(DataError, match="different questions"):
        build(store.cells())


def test_text_shows_units(store):
    text = render(build(full(store).cells()))
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert "GFLOPs" in text
    assert "score /1000" in text
    assert " ".join(lines["random"][:10]) == "random 50.0 (sd 10.0) 500.0 (sd 100.0) 62.5 (sd 12.5)"
    assert " ".join(lines["random"][10:]) == "100.0 +0.0 −69.8 12.0 8.0 1.00"
    assert lines["none"][:7] == ["none", "80.0", "800.0", "100.0", "–", "12.0", "8.0"]
    assert "SUBSET" not in text
    assert "sd of scores and retained: standard deviation over 3 seeds." in text


def test_markdown_has_one_cell_a_column(store):
    put(full(store), config("tome", "gqa", label="a|b"), 0.5)
    lines = [line for line in render(build(store.cells()), "md").splitlines() if line.startswith("|")]
    assert len(lines) == 7
    assert {line.replace("\\|", "").count("|") for line in lines} == {9}
    assert lines[3].startswith("| *T = 12.0 of 16 visual tokens (75 %)* |  |")


def test_csv_keeps_full_precision(store):
    rows = list(csv.DictReader(io.StringIO(render(build(full(store).cells()), "csv"))))
    assert [row["method"] for row in rows] == ["none", "random", "fastv"]
    assert float(rows[1]["mme:s:sd"]) == pytest.approx(100)
    assert float(rows[2]["executed_tmacs_question_alone"]) == 0.002
    assert rows[0]["gqa:s:sd"] == ""


def test_json_can_be_read_back(store):
    (table,) = json.loads(render(build(full(store).cells()), "json"))["tables"]
    score = table["rows"][1]["scores"]["gqa"]["s"]
    assert [score[key] for key in ("mean", "sd", "n")] == pytest.approx([0.5, 0.1, 3])
    # These samples do not give the stored score, so nothing is said about it.
    assert (score["interval"], score["against"]) == (None, {"dense": None, "random": None})
    assert table["rows"][2]["visual_tokens"] == {"prompt": 16, "per_layer": [16, 8], "mean": 12, "last": 8}
    assert table["questions"]["gqa"]["asked"] == 50
    assert table["facts"]["model"] == "tiny"


def test_no_figure_is_cut_off_however_long_the_label(store):
    full(store)
    put(store, config("x", "gqa", label="visipruner:" + "0123456789" * 20), 0.5)
    text = render(build(store.cells()))
    assert "…" not in text
    assert "visipruner:" + "0123456789" * 20 in "".join(line[:61].strip() for line in text.splitlines() if "01" in line)


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_a_terminal_shows_every_entry_within_its_width(store, width):
    full(store)
    put(store, config("visipruner", "gqa", label="visipruner:shallow_layers=4,layer_threshold=0.9"), 0.5)
    tables = build(store.cells())
    text = fitted(tables, None, width, wide=True)
    assert max(map(len, text.splitlines())) <= width
    wide = render(tables)
    words, narrow = wide.split(), text.split()
    assert all(narrow.count(word) >= words.count(word) for word in set(words) if re.fullmatch(r"[−+]?\d+\.\d+", word))
    assert fitted(tables, None, None) == fitted(tables, None, 1000, wide=True) == wide


def test_dense_scores_of_zero_are_left_out_and_named(store):
    put(full(store), config("none", "pope"), 0.0)
    put(store, config("fastv", "pope"), 0.5)
    (table,) = build(store.cells())
    assert [row.retained.mean for row in table.rows if row.label == "fastv"] == [pytest.approx(75)]
    assert "leaves out pope" in render([table])


def test_a_score_of_unknown_maximum_keeps_its_digits(store):
    score = ScoreRecord(key="s", title="score", value=0.06789, maximum=None)
    put(store, config(), scores=[score])
    assert "0.06789" in render(build(store.cells()))


def test_a_score_that_is_missing_is_a_dash(store):
    put(store, config(), float("nan"))
    assert "–" in render(build(store.cells()))


def test_nan_is_null_in_json(store):
    put(store, config(), float("nan"))
    assert '"mean":null' in render(build(store.cells()), "json").replace(" ", "")


def test_unknown_format(store):
    with pytest.raises(OptionError, match="did you mean 'json'"):
        render(build(full(store).cells()), "jsn")
