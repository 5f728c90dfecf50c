"""Several ranks answer the questions of a cell together: what one process would answer, bit for bit."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist
import visibench
from cases import METHODS
from storing import untimed
from visibench import cli
from visibench.commands import scale
from visibench.engine.features import FeatureStore
from visibench.errors import OptionError, VisibenchError
from visibench.evals.answers import generate
from visibench.evals.answers.cell_spec import CellSpec
from visibench.evals.answers.score import evaluate
from visibench.evals.settings.method_spec import build, parse, spell
from visibench.evals.sweeps import torchrun
from visibench.evals.tasks.tasks import load_tasks
from visibench.models import load_model
from visibench.results.store.records import CellConfig
from visibench.results.store.store import Store
from visibench.utils import machine

ROOT = Path(visibench.__file__).parent


@pytest.fixture
def two(monkeypatch):
    """The first of two ranks; the other one works while the first waits for it."""
    store = dist.HashStore()
    first, other = (torchrun.Ranks(store, rank, rank, 2) for rank in range(2))
    wait = first.wait

    def serve_and_wait() -> None:
        store.set("share/2", "null")  # the end, so that it serves once
        torchrun.serve(other)
        wait()

    first.wait = serve_and_wait
    monkeypatch.setattr(torchrun, "_first", first)
    return first


def cell(method, checkpoint, disk_data, **changes) -> CellConfig:
    values = {"model": str(checkpoint), "method": method.name, "options": method.hyperparameters()}
    values |= {"label": method.name, "task": "pope", "origin": str(disk_data), "batch_size": 3}
    return CellConfig(**values | changes)


def test_each_rank_answers_its_share_and_all_are_found(two, checkpoint, disk_data, tmp_path, monkeypatch):
    asked, run = [], generate.Bridge._run

    def spy(bridge, chunk):
        asked.append((id(bridge.loaded), [question.doc_id for question in chunk]))
        return run(bridge, chunk)

    method = parse("random:keep=0.25,seed=3")
    config = cell(method, checkpoint, disk_data)
    loaded, task, reported = load_model(str(checkpoint)), load_tasks(["pope"], str(disk_data))[0], []
    monkeypatch.setattr(generate.Bridge, "_run", spy)
    folder = Store(tmp_path).begin(config)
    found = torchrun.answer(loaded, CellSpec(config, method), task, folder, on_batch=reported.append)
    (first, a), (_, b), (second, c) = asked
    assert first != second
    assert {first, second} == {model for model, _ in asked}
    assert sorted(a + b + c) == list(range(8))
    assert [len(part) for part in (a, b, c)] == [3, 2, 3]  # batches 0 and 2 here, batch 1 there
    assert sum(reported) == 8

    alone = evaluate(load_model(str(checkpoint)), method, task, batch_size=3).samples
    records = {doc_id: record for batch in found.batches.values() for doc_id, record in batch.records.items()}
    for column in ("output", "prompt_tokens", "new_tokens", "visual_tokens", "kv_lengths", "executed_macs"):
        assert [getattr(records[i], column) for i in range(8)] == alone[column].tolist()


def test_what_a_rank_could_not_answer_runs_on_the_first(two, checkpoint, disk_data, tmp_path, monkeypatch):
    real, failing = generate.answer, []

    def answer(*arguments, shard=(0, 1), **options):
        if shard[0] == 1:
            failing.append(shard)
            return None  # as when every question fails there: nothing is kept
        return real(*arguments, shard=shard, **options)

    monkeypatch.setattr(generate, "answer", answer)
    method = parse("none")
    config = cell(method, checkpoint, disk_data)
    loaded, task = load_model(str(checkpoint)), load_tasks(["pope"], str(disk_data))[0]
    found = torchrun.answer(loaded, CellSpec(config, method), task, Store(tmp_path).begin(config))
    assert failing == [(1, 2)]
    assert sum(len(batch.records) for batch in found.batches.values()) == 8


@pytest.mark.parametrize("limit", [2**30, 0])
def test_a_rank_shares_vision_features_between_its_cells(two, limit, checkpoint, disk_data, tmp_path, monkeypatch):
    """As the first one does: within the same bounds, in a store of its own that ends with it."""
    loaded, task, store = load_model(str(checkpoint)), load_tasks(["pope"], str(disk_data))[0], Store(tmp_path / "run")
    stores, make = [], FeatureStore.__init__
    methods = [parse("none"), parse("fastv:layer=1,keep=0.5")]
    configs = [cell(method, checkpoint, disk_data) for method in methods]
    with monkeypatch.context() as first_alone:
        first_alone.setattr(generate, "answer", lambda *arguments, **options: None)
        two.wait = lambda: None
        for method, config in zip(methods, configs, strict=True):
            spec, features = CellSpec(config, method), FeatureStore(limit, keep=True)
            torchrun.answer(loaded, spec, task, store.begin(config), features=features)
        two.send(None)

    def made(self, *arguments, **options):
        make(self, *arguments, **options)
        stores.append(self)

    monkeypatch.setenv("VISIBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(FeatureStore, "__init__", made)
    torchrun.serve(torchrun.Ranks(two.store, 1, 1, 2))
    reused = []
    for config in configs:
        (line,) = (store.path(config) / "answers-1of2.jsonl").read_text().splitlines()[1:]
        reused.append(json.loads(line)["reused"])
    assert reused == [0, 3 if limit else 0], "the batch's images, seen in the cell before"
    assert [(one.limit, one.keep) for one in stores] == [(limit, True)]
    assert bool(list((tmp_path / "cache").rglob("*.safetensors"))) == bool(limit), "written where it is closed"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_comes_to_the_other_ranks_as_it_was_sent(name, checkpoint, disk_data):
    first, other = (torchrun.Ranks(dist.HashStore(), rank, rank, 2) for rank in range(2))
    other.store = first.store
    for example in METHODS[name].examples:
        method = parse(spell(METHODS[name], example))
        config = cell(method, checkpoint, disk_data)
        first.send(torchrun.Share(config=config, folder=Path("runs/ä"), limit=2**40, keep=True))
        assert json.loads(first.store.get(f"share/{first.shares}"))["folder"] == "runs/ä", "nothing but data"
        share = other.receive()
        assert share == torchrun.Share(config=config, folder=Path("runs/ä"), limit=2**40, keep=True)
        assert build(share.config.method, share.config.options) == method
    first.send(None)
    assert other.receive() is None


def test_executors_are_refused_on_several_ranks(two):
    assert scale.choose("local", 1, None, None) is None
    for executor, workers in (("local", 2), ("ray", None)):
        with pytest.raises(OptionError, match="leave out --workers"):
            scale.choose(executor, workers, None, None)


def test_a_lost_connection_is_one_line():
    class Gone:
        def check(self, keys):
            raise dist.DistNetworkError("Broken pipe")

    with pytest.raises(VisibenchError, match="connection to the other ranks is lost"):
        torchrun.Ranks(Gone(), 1, 1, 2).receive()


@pytest.mark.parametrize(
    ("command", "environment", "message"),
    [
        (["check", "runs/x"], {"WORLD_SIZE": "2"}, "started on 2 ranks"),
        (["sweep", "quick"], {"WORLD_SIZE": "2"}, "no LOCAL_RANK"),
        (["sweep", "quick"], {"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK"),
        (["sweep", "quick"], {"WORLD_SIZE": "two"}, "WORLD_SIZE=two is no number"),
    ],
)
def test_ranks_that_cannot_work_together_are_refused(command, environment, message, monkeypatch, capsys):
    for name in torchrun._VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["visibench", *command])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_evaluate_refuses_several_ranks(loaded, disk_data, monkeypatch):
    """lmms-eval would hand the first of them a part of the answers."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert machine.ranks() == 2
    with pytest.raises(OptionError, match="2 ranks"):
        evaluate(loaded, parse("none"), load_tasks(["pope"], str(disk_data))[0])


@pytest.mark.slow
def test_torchrun_stores_what_one_process_stores(tmp_path):
    arguments = ["run", "--model", "tiny", "--method", "fastv:keep=0.25", "--tasks", "pope,mme", "--limit", "20"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "visibench"]
    environment = os.environ | {"PYTHONPATH": str(ROOT.parent)}
    call = partial(subprocess.run, capture_output=True, text=True, timeout=280, env=environment, cwd=tmp_path)
    for folder, start in (("one", ["-m", "visibench"]), ("two", torchrun)):
        done = call([sys.executable, *start, *arguments, "--out", folder])
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Visual tokens at each layer's input, pope") == 1  # said by the first rank alone
    one, two = (Store(tmp_path / folder).cells() for folder in ("one", "two"))
    assert len(one) == len(two) == 2
    for a, b in zip(one, two, strict=True):
        assert a.config == b.config
        assert untimed(a) == untimed(b)
        assert (a.metrics.scores, a.metrics.compute, a.metrics.data_hash) == (
            b.metrics.scores,
            b.metrics.compute,
            b.metrics.data_hash,
        )
