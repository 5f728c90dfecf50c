"""Sweeps: what a configuration means, and what happens to it when it is interrupted."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from storing import outcome
from visibench.errors import DataError, OptionError, UnknownNameError
from visibench.evals.answers import generate
from visibench.evals.settings import method_spec
from visibench.evals.settings.config import variants
from visibench.evals.settings.include import PACKAGED
from visibench.evals.sweeps import dry_run
from visibench.evals.sweeps.cells import cell_specs
from visibench.evals.sweeps.config import load_config, parse_config
from visibench.evals.sweeps.executor import Job, Prepared
from visibench.evals.sweeps.sweep import sweep
from visibench.methods import list_methods
from visibench.models.load import fingerprint
from visibench.results.store.store import Store
from visibench.results.tables.tables import build

QUIET = Console(quiet=True)


def configured(**changes):
    values = {"model": "tiny", "tasks": ["gqa"], "methods": ["none"]}
    return parse_config(values | changes, "test.yaml")


# ---- methods in words ---------------------------------------------------------------------------------------------


def test_spec_is_typed_by_the_methods_fields():
    method = method_spec.parse("fastv:layer=3,keep=0.5")
    assert (method.layer, method.keep, method.tokens) == (3, 0.5, None)
    assert isinstance(method.layer, int)
    assert method_spec.parse("random:tokens=64,seed=2").tokens == 64
    method = method_spec.parse("visipruner: stages=shallow+middle , skip=true,layer0=13b")
    assert (method.stages, method.skip, method.layer0) == (("shallow", "middle"), True, "13b")
    assert method_spec.parse("visipruner:stages=middle").stages == ("middle",)


@pytest.mark.parametrize("text", ["none", "fastv:keep=0.5", "visipruner:stages=shallow+middle,shallow_layers=4"])
def test_a_method_reads_its_own_spelling(text):
    assert method_spec.parse(str(method_spec.parse(text))) == method_spec.parse(text)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("fastvv:keep=0.5", UnknownNameError, "did you mean 'fastv'"),
        ("", UnknownNameError, "unknown method"),
        ("fastv", OptionError, "keep=FRACTION"),
        ("fastv:", OptionError, "key=value"),
        ("fastv:keep", OptionError, "key=value"),
        ("fastv:keep=", OptionError, "keep"),
        ("fastv:keep=0.5,keep=0.6", OptionError, "twice"),
        ("fastv:keep=much", OptionError, "valid number"),
        ("fastv:keep=-0.5", OptionError, "keep"),
        ("fastv:tokens=-1", OptionError, "tokens"),
        ("fastv:layer=2.5,keep=0.5", OptionError, "valid integer"),
        ("fastv:lair=2,keep=0.5", OptionError, "did you mean 'layer'"),
        ("visipruner:layer0=70b", OptionError, "13b"),
        ("visipruner:stages=shalow", OptionError, "shalow"),
    ],
)
def test_unusable_specs(text, error, message):
    with pytest.raises(error, match=message) as caught:
        method_spec.parse(text)
    assert "\n" not in str(caught.value)


# ---- configurations -----------------------------------------------------------------------------------------------


def labels(**changes):
    return [(variant.label, variant.seed) for variant in variants(configured(**changes))]


def test_dense_comes_first_and_always():
    assert labels(methods=["fastv:keep=0.5"]) == [("none", 0), ("fastv:keep=0.5", 0)]
    assert labels(methods=["fastv:keep=0.5", "none"]) == [("none", 0), ("fastv:keep=0.5", 0)]


def test_grids_and_seeds_expand():
    grid = {"name": "fastv", "grid": {"layer": [2, 3], "keep": [0.5, 0.25]}}
    assert [label for label, _ in labels(methods=[grid])][1:] == [
        "fastv:keep=0.5",
        "fastv:keep=0.25",
        "fastv:keep=0.5,layer=3",
        "fastv:keep=0.25,layer=3",
    ]
    random = {"name": "random", "keep": 0.5, "label": "chance", "seeds": [4, 5]}
    assert labels(methods=[random, "fastv:keep=0.5"], seeds=[0, 1]) == [
        ("none", 0),
        ("chance", 4),
        ("chance", 5),
        ("fastv:keep=0.5", 0),
    ]
    assert labels(methods=["random:keep=0.5,seed=7"], seeds=[0, 1])[1:] == [("random:keep=0.5", 7)]
    named = {"name": "fastv", "label": "F", "grid": {"keep": [0.5, 0.25]}}
    assert [label for label, _ in labels(methods=[named])][1:] == ["F keep=0.5", "F keep=0.25"]


def test_the_seed_reaches_the_method():
    found = variants(configured(methods=[{"name": "random", "tokens": 8, "seeds": [1, 2]}]))
    assert [variant.method.seed for variant in found[1:]] == [1, 2]


def test_limits_by_task(disk_data):
    config = configured(tasks=["gqa", "pope"], limit={"gqa": 5})
    assert [cell.config.limit for cell in cell_specs(config)] == [5, None]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": ["gqa"]}, "did you mean 'tasks'"),
        ({"tasks": []}, "tasks"),
        ({"limit": 0}, "limit"),
        ({"limit": -5}, "limit"),
        ({"limit": 0.5}, "limit"),
        ({"batch_size": 0}, "batch_size"),
        ({"limit": {"gqa": 0}}, "limit.gqa: "),
        ({"methods": [{"keep": 0.5}]}, "methods.0.name: field required"),
        ({"methods": [3]}, "methods.0: "),
        ({"timing": {"repeats": 0}}, "timing.repeats: "),
        ({"timing": {"repeat": 3}}, "did you mean 'repeats'"),
        ({"methods": [{"name": "fastv", "keep": 0.5, "grid": {"keep": [0.25]}}]}, "both"),
        ({"methods": [{"name": "fastv", "keep": 0.5, "seeds": [1]}]}, "draws nothing"),
        ({"methods": [{"name": "random", "keep": 0.5, "seed": 1, "seeds": [1]}]}, "not both"),
        ({"methods": ["fastv:keep=0.5", "fastv:keep=0.5"]}, "twice"),
        ({"limit": {"pope": 5}}, "pope"),
    ],
)
def test_unusable_configurations(changes, message):
    with pytest.raises(OptionError, match=message) as caught:
        cell_specs(configured(**changes))
    assert "\n" not in str(caught.value)


def test_configurations_by_path_and_by_name(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"model": "tiny", "tasks": ["pope"], "methods": ["none"]}))
    assert load_config(str(file))[1] == "mine"
    assert load_config("quick") == load_config(str(PACKAGED / "quick.yaml"))
    with pytest.raises(DataError, match="did you mean 'quick'"):
        load_config("quik")
    file.write_text("model: [tiny")
    with pytest.raises(DataError, match="YAML"):
        load_config(str(file))
    file.write_text("- tiny")
    with pytest.raises(OptionError, match="mapping"):
        load_config(str(file))


SWEEPS = [file.stem for file in PACKAGED.glob("*.yaml") if not file.stem.startswith("profile_")]


@pytest.mark.parametrize("name", SWEEPS)
def test_packaged_configurations_are_valid(name):
    assert cell_specs(load_config(name)[0], solve=first_example)


def first_example(name, options, target):
    cls = list_methods()[name]
    return method_spec.parse(method_spec.spell(cls, cls.examples[0]))


def test_fingerprint_follows_the_weights(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"a" * 100)
    first = fingerprint(str(tmp_path))
    assert first == fingerprint(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"a" * 99 + b"b")
    assert fingerprint(str(tmp_path)) != first
    assert fingerprint("llava-hf/llava-1.5-7b-hf") == ""


# ---- running ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", ["before it is loaded", "loaded", "planned"])
def test_methods_are_checked_without_a_hook_on_the_model(check, loaded, settings, tmp_path, monkeypatch):
    fits, does_not = (parse_config(settings | {"methods": [f"fastv:keep=0.5,layer={n}"]}, "t") for n in (2, 77))
    for name in ("register_forward_pre_hook", "register_forward_hook"):
        monkeypatch.setattr(torch.nn.Module, name, lambda *_, **options: pytest.fail("a hook was placed"))

    def checked(config):
        job = Job(config, cell_specs(config), {}, Store(tmp_path), {}, "")
        if check == "planned":
            dry_run._check(config, [cell.method for cell in job.cells], Prepared(config, print))
        else:
            job.check(loaded if check == "loaded" else None)

    checked(fits)
    with pytest.raises(OptionError, match="layer"):
        checked(does_not)


@pytest.fixture
def settings(checkpoint, disk_data) -> dict:
    return {
        "model": str(checkpoint),
        "data": str(disk_data),
        "tasks": ["gqa", "mme"],
        "methods": ["fastv:keep=0.5", {"name": "random", "keep": 0.25, "seeds": [0, 1]}],
        "limit": 6,
        "batch_size": 2,
        "timing": {"repeats": 2, "warmup": 0},
    }


def test_a_sweep_stores_every_cell_and_is_skipped_the_second_time(settings, tmp_path, monkeypatch):
    config = parse_config(settings, "test")
    cells = sweep(config, tmp_path, QUIET)
    assert [(c.config.label, c.config.task, c.config.seed) for c in cells] == [
        (label, task, seed)
        for label, seed in (("none", 0), ("fastv:keep=0.5", 0), ("random:keep=0.25", 0), ("random:keep=0.25", 1))
        for task in ("gqa", "mme")
    ]
    dense, fastv = cells[0].metrics, cells[2].metrics
    assert dense.visual_tokens.per_layer == [16] * 10
    assert fastv.visual_tokens.per_layer == [16] * 2 + [8] * 8
    assert fastv.compute.macs < dense.compute.macs
    assert sum(fastv.compute.components.values()) == pytest.approx(fastv.compute.macs)
    assert len(fastv.prefill.times_ms) == 2
    assert (fastv.size, fastv.total) == (6, 8)
    assert len(cells[0].samples()) == 6
    assert not cells[4].samples()["output"].equals(cells[6].samples()["output"]), "seeds must differ"
    monkeypatch.setattr(generate, "answer", lambda *args, **options: pytest.fail("ran again"))
    assert sweep(config, tmp_path, QUIET) == cells


def test_only_new_cells_run(settings, tmp_path, monkeypatch):
    sweep(parse_config(settings | {"methods": ["none"]}, "test"), tmp_path, QUIET)
    asked, answer = [], generate.answer

    def spy(loaded, spec, task, *args, **options):
        asked.append((spec.method.name, task.name))
        return answer(loaded, spec, task, *args, **options)

    monkeypatch.setattr(generate, "answer", spy)
    sweep(parse_config(settings | {"methods": ["fastv:keep=0.5"]}, "test"), tmp_path, QUIET)
    assert asked == [("fastv", "gqa"), ("fastv", "mme")]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"methods": ["fastv:keep=2"]}, OptionError),
        ({"tasks": ["gqa", "nonsense"]}, UnknownNameError),
        ({"data": "/nowhere"}, DataError),
        ({"tasks": ["mme", "scienceqa_img"]}, DataError),
    ],
)
def test_mistakes_show_before_the_model_is_loaded(changes, error, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "visibench.evals.sweeps.executor.load_model", lambda *args, **options: pytest.fail("model was loaded")
    )
    with pytest.raises(error):
        sweep(parse_config(settings | changes, "test"), tmp_path, QUIET)


def test_methods_are_checked_against_the_model_before_the_first_cell(settings, tmp_path):
    with pytest.raises(OptionError, match="10 layers"):
        sweep(parse_config(settings | {"methods": ["none", "fastv:keep=0.5,layer=30"]}, "test"), tmp_path, QUIET)
    assert not (tmp_path / "cells").exists()


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_ends_the_same(settings, tmp_path):
    file, killed = tmp_path / "sweep.yaml", tmp_path / "killed"
    file.write_text(yaml.safe_dump(settings | {"batch_size": 1}))
    code = "import time; from visibench.evals.answers.generate import Bridge; generate = Bridge._generate\n"
    code += "Bridge._generate = lambda *args: time.sleep(0.05) or generate(*args)\n"  # time to hit a cell's middle
    code += "import sys; from visibench.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "sweep", str(file), "--out", str(killed)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    finished, started = wait_for(killed, cells=3, process=process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert started > finished, "the kill should come in the middle of a cell"
    before = {path: path.stat().st_mtime_ns for path in killed.glob("cells/*/metrics.json")}
    assert 3 <= len(before) < 8

    config = load_config(str(file))[0]
    resumed = sweep(config, killed, QUIET)
    straight = sweep(config, tmp_path / "straight", QUIET)
    assert [outcome(cell) for cell in resumed] == [outcome(cell) for cell in straight]
    assert len(Store(killed).cells()) == 8
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items()), "finished cells must not run again"


def wait_for(folder: Path, cells: int, process: subprocess.Popen) -> tuple[int, int]:
    """Wait until so many cells are finished and one more has begun."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        started = len(list(folder.glob("cells/*/config.json")))
        finished = len(list(folder.glob("cells/*/metrics.json")))
        if finished >= cells and started > finished:
            return finished, started
        assert process.poll() is None, "the sweep ended before it could be killed"
        time.sleep(0.01)
    raise AssertionError("the sweep did not come so far")


def test_stored_configuration_says_what_was_asked(settings, tmp_path):
    (cell, *_) = sweep(parse_config(settings | {"methods": ["none"], "tasks": ["gqa"]}, "test"), tmp_path, QUIET)
    stored = json.loads((cell.path / "config.json").read_text())
    assert stored["origin"] == settings["data"]
    assert stored["checkpoint"] == fingerprint(settings["model"])
    assert yaml.safe_load((tmp_path / "sweep.yaml").read_text())["tasks"] == ["gqa"]


@pytest.mark.slow
def test_the_ci_sweep_runs_on_the_embedded_model_and_data(tmp_path):
    cells = sweep(load_config("ci", ["limit=10"])[0], tmp_path, QUIET)  # CI runs all of it
    (table,) = build(cells)
    dense, *others = table.rows
    assert dense.method == "none"
    assert {row.method for row in others} == {"random", "fastv", "visipruner", "visionzip"}
    assert all(row.macs < dense.macs and row.tokens.mean < dense.tokens.mean for row in others)
    assert {questions.origin for questions in table.questions.values()} == {"embedded"}
