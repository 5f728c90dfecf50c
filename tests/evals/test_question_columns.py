"""What is stored of each question and of a cell: names and types, the time of its batch, what is read again."""

import json
import statistics
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
import visibench
from rich.console import Console
from storing import DENSE, frame, pope_config, put
from storing import config as made_up
from visibench.errors import DataError
from visibench.evals.answers import cell, generate
from visibench.evals.answers.cell_spec import CellSpec
from visibench.evals.answers.generate import Bridge
from visibench.evals.compute import timing
from visibench.evals.sweeps.config import parse_config
from visibench.evals.sweeps.sweep import save_tables, sweep
from visibench.methods import Forward, Keep, Method
from visibench.results.store import columns
from visibench.results.store.records import TimingConfig
from visibench.results.store.store import Store
from visibench.results.tables.render import render
from visibench.results.tables.tables import build

QUIET = Console(quiet=True)


@dataclass(frozen=True)
class Growing(Method):
    """Keeps as many visual tokens as a hash of the question says, so that every question costs something else."""

    name = "growing"
    title = "Growing"
    hook_points = ("decoder",)
    adaptive = True

    def begin(self, layout, geometry):
        return GrowingForward()


class GrowingForward(Forward):
    def layer_input(self, layer, view):
        if layer != 1:
            return None
        number = view.layout.fingerprint[:, None] % 16
        return Keep(view.present & (torch.arange(view.present.shape[1]) <= number))


# ---- the files ----------------------------------------------------------------------------------------------------

COLUMNS = """task large_string, doc_id int64, question_id large_string, image large_string, category large_string,
prompt large_string, target large_string, output large_string, answer large_string, score double, prompt_tokens int64,
new_tokens int64, prompt_visual_tokens int64, visual_tokens list<element: int64>, kv_lengths list<element: int64>,
executed_macs double, kept large_string, nonfinite bool, latency_ms double, batch_questions int64, places large_string,
batch_macs double, pixels large_string, dense_agreement bool"""
ANSWER = """prompt output pixels prompt_tokens new_tokens prompt_visual_tokens visual_tokens kv_lengths executed_macs
kept nonfinite latency_ms batch_questions places batch_macs"""
CONFIG = """schema_version model checkpoint device dtype attention method options label seed task
origin limit batch_size timing"""
METRICS = """schema_version config_hash size total note remarks nonfinite reused_images scores metrics categories
visual_tokens compute prefill generation seconds data_hash environment samples_hash checksum"""


def test_what_is_written_of_a_cell_keeps_its_names_and_types(loaded, pope, tmp_path):
    """Run folders outlive versions: names and types stay, and what is added comes behind."""
    spec, store = CellSpec(pope_config(), DENSE, pope_config()), Store(tmp_path)
    with suppress(KeyboardInterrupt):
        cell.run_cell(loaded, spec, pope, store, interrupt)
    head, line = map(json.loads, (store.path(pope_config()) / "answers.jsonl").read_text().splitlines())
    assert (head["version"], list(head)) == (2, ["version", "bound"])
    assert set(line) == set("asked records components seconds reused smaller hardware failures".split())
    assert list(next(iter(line["records"].values()))) == ANSWER.split()
    folder = cell.run_cell(loaded, spec, pope, store).path
    schema = pq.read_schema(folder / "samples.parquet")
    assert [f"{field.name} {field.type}" for field in schema] == COLUMNS.replace("\n", " ").split(", ")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(metrics) == set(METRICS.split())
    assert set(metrics["compute"]) == {"macs", "macs_sd", "components", "batch_macs"}
    assert set(json.loads((folder / "config.json").read_text())) == set(CONFIG.split())


def test_files_that_lack_what_was_added_are_read(loaded, pope, tmp_path):
    """Answers of before what a batch executes was recorded go on; a cell of them does not say it, nor does its mean."""
    spec, store = CellSpec(pope_config(), DENSE), Store(tmp_path)
    with suppress(KeyboardInterrupt):
        cell.run_cell(loaded, spec, pope, store, interrupt)
    file = store.path(pope_config()) / "answers.jsonl"
    head, line = map(json.loads, file.read_text().splitlines())
    for record in line["records"].values():
        del record["batch_macs"]
    file.write_text(json.dumps(head) + "\n" + json.dumps(line) + "\n")
    resumed = cell.run_cell(loaded, spec, pope, store)
    assert resumed.samples()["batch_macs"].isna().sum() == len(line["records"]) == 3
    assert resumed.metrics.compute.batch_macs is None

    old = json.loads((resumed.path / "metrics.json").read_text())
    del old["compute"]["batch_macs"]
    old["samples_hash"] = ""
    del old["checksum"]
    (resumed.path / "metrics.json").write_text(json.dumps(old))
    pd.read_parquet(resumed.path / "samples.parquet").drop(columns="batch_macs").to_parquet(
        resumed.path / "samples.parquet", index=False
    )
    (back,) = Store(tmp_path).cells()
    assert back.samples()["batch_macs"].isna().all()
    assert back.metrics.compute.batch_macs is None


def interrupt(questions):
    raise KeyboardInterrupt


# ---- latency ------------------------------------------------------------------------------------------------------


def test_latency_is_the_time_of_the_batch_of_a_question(loaded, pope, tmp_path, monkeypatch):
    generate, inner = Bridge._generate, []

    def timed(*arguments):
        started = time.perf_counter()
        new = generate(*arguments)
        inner.append(1e3 * (time.perf_counter() - started))
        return new

    monkeypatch.setattr(Bridge, "_generate", timed)
    started = time.perf_counter()
    done = cell.run_cell(loaded, CellSpec(pope_config(), DENSE), pope, Store(tmp_path))
    wall = 1e3 * (time.perf_counter() - started)
    samples = done.samples()
    batches = samples.groupby("latency_ms")["batch_questions"].agg(["size", "first", "nunique"])
    assert sorted(batches["size"]) == [2, 3, 3]
    assert (batches["size"] == batches["first"]).all()
    assert (batches["nunique"] == 1).all()
    found = batches.index.tolist()
    assert len(inner) == 3
    for latency, least in zip(sorted(found), sorted(inner), strict=True):
        assert 0 < least <= latency
    assert sum(found) <= wall
    assert (samples["latency_ms"] / samples["batch_questions"]).sum() == pytest.approx(sum(found))
    assert done.metrics.seconds["generate"] == pytest.approx(sum(found) / 1e3)


def test_the_clock_is_read_without_waiting_for_the_device(loaded, pope, tmp_path, monkeypatch):
    """As with CUDA events: two marks a batch, and what lies between them only once results have been read."""
    told, rows = [], generate.Nonfinite.rows

    class Clock:
        def mark(self):
            told.append("mark")
            return len(told)

        def settle(self):
            raise AssertionError("waits for the device")

        def between(self, start, end):
            assert told[-3:] == ["mark", "mark", "read"]
            return 12.5

    def read(self):
        told.append("read")
        return rows(self)

    monkeypatch.setattr(generate, "clock_of", lambda device: Clock())
    monkeypatch.setattr(generate.Nonfinite, "rows", read)
    done = cell.run_cell(loaded, CellSpec(pope_config(), DENSE), pope, Store(tmp_path))
    assert told == ["mark", "mark", "read"] * 3
    assert (done.samples()["latency_ms"] == 12.5).all()


def test_a_cell_that_goes_on_keeps_the_times_measured(loaded, pope, tmp_path):
    store = Store(tmp_path)

    with suppress(KeyboardInterrupt):
        cell.run_cell(loaded, CellSpec(pope_config(), DENSE), pope, store, interrupt)
    (_, line) = (store.path(pope_config()) / "answers.jsonl").read_text().splitlines()
    kept = {int(doc): record["latency_ms"] for doc, record in json.loads(line)["records"].items()}
    samples = (
        cell.run_cell(loaded, CellSpec(pope_config(), DENSE), pope, store).samples().set_index("doc_id")["latency_ms"]
    )
    assert len(kept) == 3
    assert {doc: samples[doc] for doc in kept} == kept
    assert samples.nunique() == 3


def timed_cells(tmp_path):
    """Dense, which reused features, random with two seeds, and a cell of old without times; four questions each."""
    store = Store(tmp_path)
    for method, seed, times in (("none", 0, [4, 4, 6, 9]), ("random", 0, [1, 1, 2, 3]), ("random", 1, [5, 5, 7, 8])):
        table = frame("aabb", [1, 1, 0, 1], latency_ms=[float(t) for t in times], batch_questions=[2, 2, 1, 1])
        table = table.assign(visual_tokens=[[4, 2]] * 4)
        put(store, made_up(method, seed=seed), 0.75, samples=table, reused_images=int(method == "none"))
    old = frame("aabb", [1, 0, 0, 1]).assign(visual_tokens=[[4, 2]] * 4)
    put(store, made_up("fastv"), 0.5, samples=old, schema_version=1)
    return build(store.cells())


def test_tables_show_latency_where_it_is_named(tmp_path):
    tables = timed_cells(tmp_path)
    assert "latency" not in render(tables, "text").lower()
    lines = render(tables, "csv", ["method", "latency"]).splitlines()
    assert lines[0].endswith("latency_ms_median,latency_questions,latency_batch_questions_median")
    figures = {line.split(",")[2]: line.split(",")[-3:] for line in lines[1:]}
    median = statistics.median([1, 1, 2, 3, 5, 5, 7, 8])
    assert [float(figure) for figure in figures["random"]] == [median, 8, 1.5]
    assert [float(figure) for figure in figures["none"]] == [5.0, 4, 1.5]
    assert figures["fastv"] == ["", "", ""]
    text = render(tables, "md", ["method", "latency"])
    assert "| random | 4.0 (8) |" in text
    assert "| fastv | – |" in text
    assert "; 4 are of cells that reused vision features, which leaves out the tower." in text
    assert "Questions in such a batch: 1.5 (median)." in text


@pytest.mark.parametrize(("method", "count"), [("adaptive", 1), ("adaptive", 3), ("fastv", 3)])
def test_an_adaptive_methods_prefill_is_timed_on_typical_questions(method, count, loaded, pope, tmp_path, monkeypatch):
    """The medians of what they really kept, which the recorded numbers name; other methods' first ones."""
    timed = []

    def time_prefill(model, method, inputs, **options):
        timed.append(inputs["pixel_values"])
        return timing.Timing(times_ms=(1.0,), warmup=0, batch_size=count, device="cpu")

    monkeypatch.setattr(timing, "time_prefill", time_prefill)
    method = Growing() if method == "adaptive" else visibench.load_method("fastv", keep=0.5)
    config = pope_config(method, timing=TimingConfig(batch_size=count))
    done = cell.run_cell(loaded, CellSpec(config, method), pope, Store(tmp_path))
    samples = done.samples()
    chosen = done.metrics.prefill.doc_ids
    if not method.adaptive:
        assert chosen == [0, 1, 2]
    else:
        macs = samples.set_index("doc_id")["executed_macs"]
        assert macs.nunique() > 3
        assert macs[0] != macs[chosen].median(), "the first question is no typical one"
        below, above = (macs < macs[chosen].min()).sum(), (macs > macs[chosen].max()).sum()
        assert abs(below - above) <= 1
        assert len(chosen) == count
    expected = loaded.inputs(*map(list, zip(*(pope.question(doc_id) for doc_id in chosen), strict=True)))
    assert torch.equal(timed[0], expected["pixel_values"])


# ---- reading ------------------------------------------------------------------------------------------------------


def test_a_sweep_and_its_tables_read_each_file_once(settings, tmp_path, monkeypatch):
    reads, read = Counter(), columns.disk.read

    def counted(file):
        reads[file] += file.suffix == ".parquet"
        return read(file)

    monkeypatch.setattr(columns.disk, "read", counted)
    cells = sweep(parse_config(settings, "test"), tmp_path, QUIET)
    tables = save_tables(cells, tmp_path)
    render(tables, "md", ["method", "latency", "loyalty"])
    again = sweep(parse_config(settings, "test"), tmp_path, QUIET)
    assert [one.config for one in again] == [one.config for one in cells]
    assert len(cells) == 8
    assert {reads[one.path / "samples.parquet"] for one in cells} == {1}


def test_what_was_read_does_not_hide_a_later_change(tmp_path):
    store, config = Store(tmp_path), made_up()
    done = put(store, config)
    before = done.samples()
    before["answer"] = "mine"
    assert done.samples()["answer"].tolist() != before["answer"].tolist(), "who changes a table changes its own"
    file = done.path / "samples.parquet"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match="damaged, or was changed"):
        done.samples()
    assert store.done(config) is None
    file.unlink()
    with pytest.raises(DataError, match="cannot read"):
        done.samples()
