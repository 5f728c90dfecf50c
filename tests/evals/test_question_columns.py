"""What is stored of each question beside its answer: the time of its batch, and whether dense answers the same."""

import hashlib
import json
import math
import statistics
import string
import subprocess
import sys
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
from storing import config as made_up
from storing import frame, put, untimed
from visibench.errors import DataError, IncompleteError
from visibench.evals.answers import cell, generate
from visibench.evals.answers.cell_spec import CellSpec
from visibench.evals.answers.generate import Bridge
from visibench.evals.compute import timing
from visibench.evals.sweeps.cells import plan
from visibench.evals.sweeps.claims import claimed
from visibench.evals.sweeps.config import parse_config
from visibench.evals.sweeps.events import Reporter
from visibench.evals.sweeps.sweep import save_tables, sweep
from visibench.evals.tasks.tasks import load_tasks
from visibench.evals.workers.ray import Ray
from visibench.methods import Forward, Keep, Method
from visibench.results.statistics.metrics import answers, loyalty
from visibench.results.store.records import CellConfig, TimingConfig
from visibench.results.store.store import Store
from visibench.results.tables.render import render
from visibench.results.tables.tables import build

DENSE = visibench.load_method("none")
QUIET = Console(quiet=True)
HOLD = "import sys; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); "
HOLD += "print('held', flush=True); sys.stdin.read()"


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


@pytest.fixture
def pope(disk_data):
    return load_tasks(["pope"], str(disk_data))[0]


def asked(method=DENSE, **changes) -> CellConfig:
    values = {"model": "m", "method": method.name, "options": method.hyperparameters(), "label": method.name}
    return CellConfig(**values | {"task": "pope", "origin": "data", "batch_size": 3, "timing": None} | changes)


@pytest.fixture
def settings(checkpoint, disk_data) -> dict:
    methods = ["fastv:layer=8,keep=0.9", {"name": "random", "keep": 0.1, "seeds": [0, 1]}]
    where = {"model": str(checkpoint), "data": str(disk_data), "tasks": ["gqa", "pope"], "methods": methods}
    return where | {"timing": None, "batch_size": 4, "limit": 4}


@pytest.fixture
def hold():
    """Claims a cell for another process, which is returned."""
    holders = []

    def claim(store, config):
        path = store.path(config)
        path.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-c", HOLD, str(path / "lock")]
        holders.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        assert holders[-1].stdout.readline() == b"held\n"
        return holders[-1]

    yield claim
    for holder in holders:
        holder.kill()
        holder.wait()


# ---- the files ----------------------------------------------------------------------------------------------------

COLUMNS = """task large_string, doc_id int64, question_id large_string, image large_string, category large_string,
prompt large_string, target large_string, output large_string, answer large_string, score double, prompt_tokens int64,
new_tokens int64, prompt_visual_tokens int64, visual_tokens list<element: int64>, kv_lengths list<element: int64>,
executed_macs double, kept large_string, nonfinite bool, latency_ms double, batch_questions int64, places large_string,
batch_macs double, dense_agreement bool"""
ANSWER = """prompt output pixels prompt_tokens new_tokens prompt_visual_tokens visual_tokens kv_lengths executed_macs
kept nonfinite latency_ms batch_questions places batch_macs"""
METRICS = """schema_version config_hash size total note remarks nonfinite reused_images scores metrics categories
visual_tokens compute prefill generation seconds data_hash environment samples_hash checksum"""


def test_what_is_written_of_a_cell_keeps_its_names_and_types(loaded, pope, tmp_path):
    """Run folders outlive versions: names and types stay, and what is added comes behind."""
    spec, store = CellSpec(asked(), DENSE, asked()), Store(tmp_path)
    with suppress(KeyboardInterrupt):
        cell.run_cell(loaded, spec, pope, store, interrupt)
    head, line = map(json.loads, (store.path(asked()) / "answers.jsonl").read_text().splitlines())
    assert (head["version"], list(head)) == (2, ["version", "bound"])
    assert set(line) == set("asked records components seconds reused smaller hardware failures".split())
    assert list(next(iter(line["records"].values()))) == ANSWER.split()
    folder = cell.run_cell(loaded, spec, pope, store).path
    schema = pq.read_schema(folder / "samples.parquet")
    assert [f"{field.name} {field.type}" for field in schema] == COLUMNS.replace("\n", " ").split(", ")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(metrics) == set(METRICS.split())
    assert set(metrics["compute"]) == {"macs", "macs_sd", "components", "batch_macs"}
    assert set(json.loads((folder / "config.json").read_text())) == set(CellConfig.model_fields)


def test_files_that_lack_what_was_added_are_read(loaded, pope, tmp_path):
    """Answers of before what a batch executes was recorded go on; a cell of them does not say it, nor does its mean."""
    spec, store = CellSpec(asked(), DENSE), Store(tmp_path)
    with suppress(KeyboardInterrupt):
        cell.run_cell(loaded, spec, pope, store, interrupt)
    file = store.path(asked()) / "answers.jsonl"
    head, line = map(json.loads, file.read_text().splitlines())
    for record in line["records"].values():
        del record["batch_macs"]
    file.write_text(json.dumps(head) + "\n" + json.dumps(line) + "\n")
    resumed = cell.run_cell(loaded, spec, pope, store)
    assert resumed.samples()["batch_macs"].isna().sum() == len(line["records"]) == 3
    assert resumed.metrics.compute.batch_macs is None

    old = json.loads((resumed.path / "metrics.json").read_text())
    del old["compute"]["batch_macs"]
    old["samples_hash"] = old["checksum"] = ""
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
    done = cell.run_cell(loaded, CellSpec(asked(), DENSE), pope, Store(tmp_path))
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
    done = cell.run_cell(loaded, CellSpec(asked(), DENSE), pope, Store(tmp_path))
    assert told == ["mark", "mark", "read"] * 3
    assert (done.samples()["latency_ms"] == 12.5).all()


def test_a_cell_that_goes_on_keeps_the_times_measured(loaded, pope, tmp_path):
    store = Store(tmp_path)

    with suppress(KeyboardInterrupt):
        cell.run_cell(loaded, CellSpec(asked(), DENSE), pope, store, interrupt)
    (_, line) = (store.path(asked()) / "answers.jsonl").read_text().splitlines()
    kept = {int(doc): record["latency_ms"] for doc, record in json.loads(line)["records"].items()}
    samples = cell.run_cell(loaded, CellSpec(asked(), DENSE), pope, store).samples().set_index("doc_id")["latency_ms"]
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
    config = asked(method, timing=TimingConfig(batch_size=count))
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


# ---- agreement with dense -----------------------------------------------------------------------------------------


def plain(answer: str) -> str:
    """An answer without case, punctuation and extra spaces, by other means than the package's."""
    return " ".join(answer.lower().translate(str.maketrans("", "", string.punctuation.replace("_", ""))).split())


def test_agreement_is_that_of_both_cells(settings, tmp_path):
    cells = {
        (one.config.label, one.config.seed, one.config.task): one
        for one in sweep(parse_config(settings | {"tasks": ["pope"]}, "test"), tmp_path, QUIET)
    }
    seen = set()
    for (label, _, task), one in cells.items():
        own, dense = one.samples(), cells["none", 0, task].samples()
        assert own["dense_agreement"].dtype == "boolean"
        both = own.merge(dense, on="doc_id", suffixes=("", "_dense"), validate="one_to_one")
        assert len(both) == len(own) == len(dense)
        same = both["answer"].map(plain) == both["answer_dense"].map(plain)
        assert both["dense_agreement"].tolist() == same.tolist()
        assert label != "none" or same.all()
        seen |= set(same) if label != "none" else set()
        measured = loyalty(answers(cells["none", 0, task]), [answers(one)])
        assert measured.value == pytest.approx(own["dense_agreement"].mean())
    assert seen == {True, False}
    (table,) = build(cells.values())
    for row in table.rows[1:]:
        means = pd.concat([own.samples().assign(task=own.config.task) for own in row.cells])
        means = means.groupby("task")["dense_agreement"].mean()
        assert {task: share.value for task, share in row.evidence.loyalty.items()} == pytest.approx(means.to_dict())


def test_without_a_dense_cell_agreement_is_null(loaded, pope, tmp_path):
    method, store = visibench.load_method("fastv", layer=1, keep=0.1), Store(tmp_path)
    config, dense = asked(method, limit=3), asked(limit=3)

    def agreement(reference) -> pd.Series:
        return cell.run_cell(loaded, CellSpec(config, method, reference), pope, store).samples()["dense_agreement"]

    assert agreement(None).isna().all()
    assert agreement(dense).isna().all(), "it has yet to run"
    reference = cell.run_cell(loaded, CellSpec(dense, DENSE, dense), pope, store)
    assert reference.samples()["dense_agreement"].tolist() == [True] * 3
    assert agreement(dense).notna().all()
    store.finish(dense, reference.samples(), reference.metrics.model_copy(update={"data_hash": "other"}))
    assert agreement(dense).isna().all(), "it was asked other questions"


def test_where_dense_fails_agreement_is_null_until_it_succeeds(settings, tmp_path):
    changes = {"methods": ["fastv:layer=1,keep=0.1"], "tasks": ["pope"]}
    config, store = parse_config(settings | changes, "test"), Store(tmp_path)
    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(type(DENSE), "begin", lambda *arguments: 1 / 0)
        with pytest.raises(IncompleteError, match="1 of 2 cells are incomplete"):
            sweep(config, tmp_path, QUIET)
    (alone,) = store.cells()
    before = alone.samples()
    assert alone.config.method == "fastv"
    assert before["dense_agreement"].isna().all()

    dense, cell = sweep(config, tmp_path, QUIET)
    after = cell.samples()
    same = after["answer"].map(plain) == dense.samples()["answer"].map(plain)
    assert after["dense_agreement"].tolist() == same.tolist()
    pd.testing.assert_frame_equal(after.drop(columns="dense_agreement"), before.drop(columns="dense_agreement"))
    hashes = {"samples_hash", "checksum"}
    assert cell.metrics.model_dump(exclude=hashes) == alone.metrics.model_dump(exclude=hashes)
    assert [one.config for one in store.cells()] == [cell.config, dense.config]


def test_every_cell_knows_its_dense_cell(settings):
    plans = plan(parse_config(settings, "test"))
    dense = {one.config.task: one.config for one in plans if one.config.method == "none"}
    assert [one.config.method for one in plans[:2]] == ["none", "none"]
    assert all(one.dense == dense[one.config.task] for one in plans)
    alone = plan(parse_config(settings, "test"), dense=False)
    assert {one.config.method for one in alone} == {"fastv", "random"}
    assert [one.dense for one in alone] == [one.dense for one in plans[2:]], "as it would be, should it lie there"


# ---- order --------------------------------------------------------------------------------------------------------


def test_while_dense_is_with_another_process_cells_without_it_come_first(tmp_path, hold):
    store, came, said = Store(tmp_path), [], []
    dense = {task: made_up("none", task) for task in ("gqa", "mme")}
    plans = [CellSpec(made_up(method, task), DENSE, dense[task]) for method in ("none", "fastv") for task in dense]
    holder = hold(store, dense["gqa"])

    def say(text):
        said.append(text)
        came.append("waits")
        holder.kill()

    for one in claimed(plans, store, say, lambda: None):
        came.append((one.config.method, one.config.task))
    assert came == [("none", "mme"), ("fastv", "mme"), "waits", ("none", "gqa"), ("fastv", "gqa")]
    assert len(said) == 1


class Lets(Reporter):
    """Lets another process go when something is waiting for it; keeps the order of the cells begun."""

    def __init__(self, holder) -> None:
        self.holder, self.began = holder, []

    def __call__(self, event) -> None:
        if event.event == "cell_started":
            self.began.append((event.cell.label, event.cell.task))
        if event.event == "note" and "Waiting for" in event.text:
            self.began.append("waits")
            self.holder.kill()


def held_up(settings, tmp_path, hold, executor=None) -> tuple[list, list]:
    """Order and outcome of a sweep while the first dense cell is with another process."""
    config = parse_config(settings | {"methods": ["fastv:layer=1,keep=0.1"]}, "test")
    lets = Lets(hold(Store(tmp_path / "held"), plan(config)[0].config))
    cells = sweep(config, tmp_path / "held", QUIET, report=lets, executor=executor)
    return lets.began, cells


@pytest.mark.parametrize("ray", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_sweep_waits_for_dense_cells_of_others_at_its_end(ray, settings, tmp_path, hold, monkeypatch):
    if ray:
        pytest.importorskip("ray")
        monkeypatch.setenv("RAY_worker_niceness", "0")
    label = "fastv:keep=0.1,layer=1"
    order, cells = held_up(settings, tmp_path, hold, Ray(workers=1) if ray else None)
    assert order == [("none", "pope"), (label, "pope"), "waits", ("none", "gqa"), (label, "gqa")]
    assert all(one.samples()["dense_agreement"].notna().all() for one in cells)
    assert not any(math.isnan(latency) for one in cells for latency in one.samples()["latency_ms"])
    if not ray:  # who runs them one after the other changes nothing but their order
        return
    config = parse_config(settings | {"methods": [label]}, "test")
    straight = sweep(config, tmp_path / "straight", QUIET)
    assert [untimed(one) for one in cells] == [untimed(one) for one in straight]


# ---- reading ------------------------------------------------------------------------------------------------------


def test_a_sweep_and_its_tables_read_each_file_once(settings, tmp_path, monkeypatch):
    reads, read = Counter(), pd.read_parquet

    def counted(source, *arguments, **options):
        reads[hashlib.sha256(source.getvalue()).hexdigest()] += 1
        return read(source, *arguments, **options)

    monkeypatch.setattr(pd, "read_parquet", counted)
    cells = sweep(parse_config(settings, "test"), tmp_path, QUIET)
    tables = save_tables(cells, tmp_path)
    render(tables, "md", ["method", "latency", "loyalty"])
    again = sweep(parse_config(settings, "test"), tmp_path, QUIET)
    assert [one.config for one in again] == [one.config for one in cells]
    assert len(reads) == len(cells) == 8
    assert set(reads.values()) == {1}


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
