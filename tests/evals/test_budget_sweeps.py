"""Budgets in sweeps: solved before the first cell, stored as options."""

import pytest
import yaml
from rich.console import Console
from visibench.errors import OptionError
from visibench.evals.compute.profile import ProfileConfig
from visibench.evals.settings.config import parse, variants
from visibench.evals.sweeps.cells import cell_specs
from visibench.evals.sweeps.config import parse_config
from visibench.evals.sweeps.sweep import sweep

QUIET = Console(quiet=True)


@pytest.fixture
def settings(checkpoint, disk_data):
    return {"model": str(checkpoint), "data": str(disk_data), "tasks": ["gqa", "pope"], "limit": 2, "timing": None}


def test_a_sweep_runs_what_its_budgets_come_to(settings, tmp_path, capsys):
    config = settings | {
        "budget": [{"tokens": 8}, {"tokens": 12}],
        "seeds": [0, 1],
        "methods": [
            "fastv:layer=2",
            {"name": "random", "budget": {"tokens": 5}},
            {"name": "divprune", "tokens": 3},
            {"name": "pooling", "label": "pooled", "budget": {"tflops": 5e-6}},
            {"name": "prumerge", "budget": None},
        ],
    }
    cells = sweep(parse_config(config, "test"), tmp_path, Console())
    found = {(c.config.label, c.config.seed): c for c in cells if c.config.task == "gqa"}
    assert list(found) == [
        ("none", 0),
        ("fastv:layer=2 T=8", 0),
        ("fastv:layer=2 T=12", 0),
        ("random T=5", 0),
        ("random T=5", 1),
        ("divprune:tokens=3", 0),
        ("pooled 5e-06 TFLOPs", 0),
        ("prumerge", 0),
    ]
    tokens = [cell.metrics.visual_tokens.mean for cell in found.values()]
    assert tokens[:6] == [16, 8, 12, 5, 5, 3]
    assert [cell.config.options.get("tokens") for cell in found.values()][:6] == [None, 6, 11, 5, 5, 3]
    assert found["random T=5", 1].config.options["seed"] == 1
    pooled = found["pooled 5e-06 TFLOPs", 0]
    assert pooled.metrics.compute.macs == pytest.approx(5e6, rel=0.1)
    assert found["prumerge", 0].config.options["tokens"] is None
    assert "fastv T=8: fastv:tokens=6 gives T=8 on 16 prompts" in capsys.readouterr().out


def test_a_solved_sweep_is_skipped_the_second_time(settings, tmp_path, monkeypatch):
    config = parse_config(settings | {"budget": {"tokens": 8}, "methods": ["divprune"]}, "test")
    cells = sweep(config, tmp_path, QUIET)
    assert yaml.safe_load((tmp_path / "sweep.yaml").read_text())["budget"] == {"tokens": 8}
    monkeypatch.setattr("visibench.evals.sweeps.in_process.run_cell", lambda *args, **options: pytest.fail("ran again"))
    assert sweep(config, tmp_path, QUIET) == cells


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": {"tokens": 8, "tflops": 1}, "methods": ["divprune"]}, "budget: "),
        ({"budget": {"token": 8}, "methods": ["divprune"]}, "'tokens' or 'tflops'"),
        ({"budget": {"tokens": -8}, "methods": ["divprune"]}, "budget.tokens: "),
        ({"methods": [{"name": "divprune", "budget": {"ms": 8}}]}, "'tokens' or 'tflops'"),
        ({"methods": [{"name": "divprune", "keep": 0.5, "budget": {"tokens": 8}}]}, "keep given"),
        ({"methods": [{"name": "none", "budget": {"tokens": 8}}]}, "nothing to turn"),
        ({"methods": [{"name": "divprune", "budget": [{"tokens": 8}, {"tokens": 8}]}]}, "stands twice"),
        ({"budget": {"tokens": 8}, "methods": ["divprune", {"name": "fastv", "label": "F", "keep": 2}]}, "keep must"),
        ({"budget": {"tokens": 8}, "methods": ["divprune:lair=2"]}, "unknown option"),
    ],
)
def test_unusable_budgets_show_before_the_model_is_loaded(changes, message, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "visibench.evals.sweeps.executor.load_model", lambda *args, **options: pytest.fail("model was loaded")
    )
    with pytest.raises(OptionError, match=message) as caught:
        sweep(parse_config(settings | changes, "test"), tmp_path, QUIET)
    assert "\n" not in str(caught.value)


def test_budgets_that_cannot_be_met_stop_the_sweep_before_its_first_cell(settings, tmp_path):
    config = settings | {"budget": {"tokens": 2}, "methods": ["divprune", "fastv:layer=2", "vtw:layers=scaled", "tome"]}
    with pytest.raises(OptionError, match=r"fastv: T=2 is out of reach: .*; tome: T=2 is out of reach"):
        sweep(parse_config(config, "test"), tmp_path, QUIET)
    assert not (tmp_path / "cells").exists()
    config = settings | {"budget": [{"tokens": 12}, {"tokens": 13.8}], "methods": ["downsample"]}
    with pytest.raises(
        OptionError, match=r"'downsample T=12' and 'downsample T=13.8' both come to downsample:tokens=12"
    ):
        sweep(parse_config(config, "test"), tmp_path, QUIET)


def test_only_sweeps_solve_budgets():
    config = {"model": "llava-cpu", "weights": "random", "budget": {"tokens": 64}, "methods": ["divprune"]}
    with pytest.raises(OptionError, match="visibench budget --target tokens=64"):
        variants(parse(ProfileConfig, config, "test"))
    with pytest.raises(OptionError, match="visibench budget --target tokens=64"):
        cell_specs(
            parse_config({"model": "tiny", "tasks": ["gqa"], "budget": {"tokens": 64}, "methods": ["tome"]}, "test")
        )
