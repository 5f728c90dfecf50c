"""What ``visibench sweep --dry-run`` says of a sweep, against what the sweep then does."""

import io
import json
import time
from contextlib import nullcontext
from pathlib import Path

import huggingface_hub
import pytest
from rich.console import Console
from typer.testing import CliRunner
from visibench.cli import app
from visibench.errors import OptionError
from visibench.evals.sweeps import estimate, executor, pace
from visibench.evals.sweeps.config import parse_config, select
from visibench.evals.sweeps.dry_run import dry_run
from visibench.evals.sweeps.estimate import Rate
from visibench.evals.sweeps.sweep import sweep
from visibench.evals.tasks.tasks import load_tasks
from visibench.results.store.store import Store

QUIET = Console(quiet=True)
METHODS = ["random:layer=2,keep=0.5", "fastv:keep=0.5", "visipruner:shallow_layers=4"]


@pytest.fixture(scope="module")
def settings(checkpoint, disk_data) -> dict:
    content = {"model": str(checkpoint), "data": str(disk_data), "tasks": ["gqa", "mme"], "methods": METHODS}
    return content | {"limit": 6, "batch_size": 2, "timing": {"repeats": 2, "warmup": 1}}


@pytest.fixture(scope="module")
def ran(settings, tmp_path_factory) -> Path:
    """A folder where all methods have run on GQA, and the dense model alone on MME."""
    folder = tmp_path_factory.mktemp("ran")
    config = parse_config(settings, "test")
    sweep(select(config, tasks=["gqa"]), folder, QUIET)
    sweep(select(config, ["none"], ["mme"]), folder, QUIET)
    return folder


def contents(folder: Path) -> dict:
    return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def _no_model(monkeypatch):
    monkeypatch.setattr(executor, "load_model", lambda *args, **options: pytest.fail("a model was loaded"))


@pytest.mark.slow
def test_a_plan_prices_what_then_runs(settings, ran, tmp_path, monkeypatch):
    """Plans give all of dense and random, which score nothing; FastV scores, VisiPruner adapts."""
    monkeypatch.setattr(pace, "pace", lambda *given: pace.Pace(0.5, 0.25))
    cells = dry_run(select(parse_config(settings, "test"), tasks=["gqa"]), tmp_path / "new", QUIET)
    assert not (tmp_path / "new").exists()
    assert [cell.questions for cell in cells] == [6] * 4
    assert [cell.basis for cell in cells] == ["planned"] * 3 + ["bound"]
    assert [(cell.seconds, cell.clock) for cell in cells] == [(6 * 0.5 + 0.25, "batch")] * 4
    ours = {(cell.config.label): cell.metrics for cell in Store(ran).cells() if cell.config.task == "gqa"}
    dense, random, fastv, visipruner = cells
    assert dense.macs == pytest.approx(ours["none"].compute.macs, rel=1e-12)
    assert random.macs == pytest.approx(ours[random.config.label].compute.macs, rel=1e-12)
    scoring = ours["fastv:keep=0.5"].compute.components["scoring"]
    assert scoring > 0
    assert fastv.macs == pytest.approx(ours["fastv:keep=0.5"].compute.macs - scoring, rel=1e-12)
    assert visipruner.macs == dense.macs
    assert dense.tflops == pytest.approx(dense.macs * 6e-12)


@pytest.mark.usefixtures("_no_model")
def test_what_is_done_gives_the_time_of_the_rest(settings, ran):
    before = contents(ran)
    cells = dry_run(parse_config(settings | {"seeds": [0, 1]}, "test"), ran, QUIET)
    assert contents(ran) == before
    state = {(cell.config.label, cell.config.seed, cell.config.task): cell for cell in cells}
    assert [key for key, cell in state.items() if cell.done] == [
        ("none", 0, "gqa"), ("none", 0, "mme"), ("random:keep=0.5,layer=2", 0, "gqa"), ("fastv:keep=0.5", 0, "gqa"),
        ("visipruner:shallow_layers=4", 0, "gqa"),
    ]  # fmt: skip
    finished = {(cell.config.label, cell.config.task): cell.metrics for cell in Store(ran).cells()}

    def took(metrics) -> float:
        return metrics.seconds["total"] + sum(metrics.prefill.times_ms) / 2 * 3 / 1e3

    again = state["random:keep=0.5,layer=2", 1, "gqa"]
    first = finished["random:keep=0.5,layer=2", "gqa"]
    assert (again.basis, again.macs, again.questions) == ("measured", first.compute.macs, 6)
    assert again.seconds == pytest.approx(took(first))
    other = state["fastv:keep=0.5", 0, "mme"]
    assert (other.basis, other.questions) == ("planned", 6)
    assert other.seconds == pytest.approx(took(finished["none", "mme"]))
    assert state["none", 0, "gqa"].seconds == pytest.approx(took(finished["none", "gqa"]))


@pytest.mark.slow
def test_times_of_other_settings_are_not_taken(settings, ran, monkeypatch):
    monkeypatch.setattr(pace, "LARGEST", 0)
    for change in ({"batch_size": 3}, {"dtype": "bfloat16"}, {"attention": "eager"}):
        cells = dry_run(parse_config(settings | change, "test"), ran, QUIET)
        assert not any(cell.done or cell.seconds or cell.clock for cell in cells)


def test_one_batch_of_the_dense_model_is_timed_behind_a_warm_up(settings, loaded):
    config = parse_config(settings | {"batch_size": 4, "timing": {"repeats": 5, "warmup": 1}}, "test")
    (task,) = load_tasks(["gqa"], settings["data"])
    rows, slow = [], [1.0]  # seconds of what is to be warm by then

    def slowly(module, args, options):
        rows.append(len(options["input_ids"]))
        time.sleep(slow.pop() if slow else 0.0)

    hook = loaded.model.register_forward_pre_hook(slowly, with_kwargs=True)
    began = time.monotonic()
    found = pace.pace(loaded, task, config)
    took = time.monotonic() - began - 1
    hook.remove()
    assert max(rows) == 4
    assert 0 < 4 * found.question < took
    assert 0 < found.prefill / 6 < took


def test_what_fails_in_that_batch_leaves_the_time_unknown(settings, tmp_path, monkeypatch):
    def fail(*given):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(pace, "pace", fail)
    console = Console(record=True, quiet=False, file=io.StringIO())
    cells = dry_run(select(parse_config(settings, "test"), ["none"]), tmp_path, console)
    assert [(cell.seconds, cell.clock) for cell in cells] == [(None, None)] * 2
    assert console.export_text().splitlines() == [
        f"No time for {task}: RuntimeError: no kernel" for task in ("gqa", "mme")
    ]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--set", "device=banana"], "unknown device 'banana'"),
        (["--set", "dtype=banana"], "unknown dtype 'banana'"),
        (["--set", "attention=banana"], "banana"),
        (["--set", "methods.fastv.layer=99"], "layer=99"),
        (["--set", "model=llava-1.5-7b"], "known by its sizes alone"),
        (["--executor", "banana"], "unknown executor 'banana'"),
        (["--workers", "99", "--address", "x"], "--address is for --executor ray"),
        (["--workers", "2", "--set", "device=cpu:1"], "give device cpu, not cpu:1"),
        (["--wandb", "onlin"], "did you mean 'online'"),
        (["--wandb", "offline", "--wandb-project", "a/b"], "no such project"),
    ],
)
def test_what_the_sweep_refuses_is_refused(settings, tmp_path, cli, change, says):
    file = tmp_path / "my.yaml"
    file.write_text(json.dumps(settings))
    ways = [cli("sweep", file, "--out", tmp_path / "out", *change, *more) for more in ([], ["--dry-run"])]
    for code, out, err in ways:
        assert (code, out) == (2, "")
        assert says in err.splitlines()[-1]
    assert not (tmp_path / "out" / "cells").exists()


def test_questions_of_the_hub_are_not_downloaded_to_be_counted(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(executor, "load_tasks", lambda *args: pytest.fail("a task was loaded"))
    config = parse_config(settings | {"data": "hub", "limit": None, "tasks": ["gqa", "scienceqa_img"]}, "test")
    costs = {
        (cell.config.label, cell.config.task): cell for cell in dry_run(config, tmp_path, QUIET, Rate(1e-6, "told"))
    }
    dense = costs["none", "gqa"]
    assert (dense.questions, dense.basis, dense.clock) == (12_578, "planned", "rate")
    assert dense.seconds == pytest.approx(dense.macs * 12_578 * 1e-6)
    other = costs["none", "scienceqa_img"]
    assert (other.questions, other.macs, other.seconds) == (None, dense.macs, None)


@pytest.mark.usefixtures("_no_model")
def test_a_hub_model_of_known_sizes_and_sizes_alone_are_priced_without_a_download(tmp_path, monkeypatch):
    """By hand: 7.06·10⁹ weights in 16 bits, and keys and values of 32 layers of 4096 for 636 tokens."""
    monkeypatch.setattr(estimate, "hub_or_cache", nullcontext)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    content = {"tasks": ["pope"], "data": "hub", "methods": ["fastv:keep=0.5", "visipruner"], "batch_size": 1}
    hub, sizes = ({"model": "llava-hf/llava-1.5-7b-hf"}, {"model": "llava-1.5-7b", "weights": "meta"})
    priced = [dry_run(parse_config(content | one, "test"), tmp_path, QUIET, Rate(50, "told")) for one in (hub, sizes)]
    assert [cell.macs for cell in priced[0]] == [cell.macs for cell in priced[1]]
    dense, fastv, visipruner = priced[0]
    assert dense.macs == pytest.approx(4.428e12, rel=1e-3)  # docs/flops.md: dense, 60 text tokens
    assert (fastv.basis, visipruner.basis) == ("planned", "bound")
    assert dense.seconds == pytest.approx(9_000 * dense.macs / 50e12)
    weights, entries = 2 * 7_063_427_072, 2 * 2 * 32 * 4096 * 636
    assert weights + entries < dense.memory < 1.02 * (weights + entries)
    with pytest.raises(OptionError, match="weights: meta has nothing that could answer"):
        sweep(parse_config(content | sizes, "test"), tmp_path, QUIET)
    solved = content | sizes | {"methods": ["fastv:layer=2"], "budget": {"tokens": 128}}
    options = dry_run(parse_config(solved, "test"), tmp_path, QUIET)[1].config.options
    assert (2 * 576 + 30 * options["tokens"]) / 32 == pytest.approx(128, abs=1)


def test_a_rate_is_given_or_a_share_of_a_cards_peak():
    assert estimate.rate(120.0) == Rate(120.0, "--rate", given=True)
    assert (
        estimate.rate(None).tmacs == pytest.approx(0.4 * 312 / 2) or "no known card" not in estimate.rate(None).origin
    )
    with pytest.raises(OptionError, match="--rate -1"):
        estimate.rate(-1)


@pytest.mark.usefixtures("_no_model")
def test_a_model_that_is_nowhere_is_said_to_be_unchecked(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "hub_or_cache", nullcontext)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    console = Console(record=True, quiet=False, file=io.StringIO(), width=400)
    config = parse_config(settings | {"data": "hub", "limit": None, "model": "no/body"}, "test")
    assert len(dry_run(config, tmp_path, console)) == 8
    (told,) = console.export_text().splitlines()
    assert told.startswith("Not checked against the model: cannot load model 'no/body'")


def test_the_command_prints_the_plan_and_stops(settings, ran, tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text(json.dumps(settings))
    before = contents(ran)
    result = CliRunner().invoke(app, ["sweep", str(file), "--out", str(ran), "--dry-run"])
    assert (result.exit_code, contents(ran)) == (0, before)
    assert f"8 cells: 5 done in {ran}, 3 to do." in result.stdout
    assert "Questions to ask: 18." in result.stdout
    assert "Prefills to execute: ≤ " in result.stdout
    (row,) = [line.split() for line in result.stdout.splitlines() if line.startswith("visipruner") and "to do" in line]
    assert (row[-5], row[-3]) == ("≤", "bound")
    assert "in one process, by the seconds per question of finished cells" in result.stdout
    printed = CliRunner().invoke(app, ["sweep", str(file), "--out", str(ran), "--dry-run", "--json", "--only", "fastv"])
    cells = json.loads(printed.stdout)
    assert [(cell["config"]["label"], cell["done"], cell["basis"]) for cell in cells] == [
        ("none", True, "measured"), ("none", True, "measured"),
        ("fastv:keep=0.5", True, "measured"), ("fastv:keep=0.5", False, "planned"),
    ]  # fmt: skip
