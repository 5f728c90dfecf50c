"""What ``visibench sweep --dry-run`` says of a sweep, against what the sweep then does."""

import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner
from visibench.cli import app
from visibench.evals import sweep as sweeps
from visibench.evals.config import parse_config, select
from visibench.evals.estimate import forecast

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
    sweeps.sweep(select(config, tasks=["gqa"]), folder, QUIET)
    sweeps.sweep(select(config, ["none"], ["mme"]), folder, QUIET)
    return folder


def contents(folder: Path) -> dict:
    return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def _no_model(monkeypatch):
    monkeypatch.setattr(sweeps, "load_model", lambda *args, **options: pytest.fail("a model was loaded"))


@pytest.mark.usefixtures("_no_model")
def test_a_plan_prices_what_then_runs(settings, ran, tmp_path):
    """Plans give all of dense and random, which score nothing; FastV scores, VisiPruner adapts."""
    cells = forecast(select(parse_config(settings, "test"), tasks=["gqa"]), tmp_path / "new", QUIET)
    assert not (tmp_path / "new").exists()
    assert [cell.questions for cell in cells] == [6] * 4
    assert [cell.basis for cell in cells] == ["planned"] * 3 + [None]
    assert [cell.seconds for cell in cells] == [None] * 4
    ours = {(cell.config.label): cell.metrics for cell in sweeps.Store(ran).cells() if cell.config.task == "gqa"}
    dense, random, fastv, visipruner = cells
    assert dense.macs == pytest.approx(ours["none"].compute.macs, rel=1e-12)
    assert random.macs == pytest.approx(ours[random.config.label].compute.macs, rel=1e-12)
    scoring = ours["fastv:keep=0.5"].compute.components["scoring"]
    assert scoring > 0
    assert fastv.macs == pytest.approx(ours["fastv:keep=0.5"].compute.macs - scoring, rel=1e-12)
    assert visipruner.tflops is None
    assert dense.tflops == pytest.approx(dense.macs * 6e-12)


@pytest.mark.usefixtures("_no_model")
def test_what_is_done_gives_the_time_of_the_rest(settings, ran):
    before = contents(ran)
    cells = forecast(parse_config(settings | {"seeds": [0, 1]}, "test"), ran, QUIET)
    assert contents(ran) == before
    state = {(cell.config.label, cell.config.seed, cell.config.task): cell for cell in cells}
    assert [key for key, cell in state.items() if cell.done] == [
        ("none", 0, "gqa"), ("none", 0, "mme"), ("random:keep=0.5,layer=2", 0, "gqa"), ("fastv:keep=0.5", 0, "gqa"),
        ("visipruner:shallow_layers=4", 0, "gqa"),
    ]  # fmt: skip
    finished = {(cell.config.label, cell.config.task): cell.metrics for cell in sweeps.Store(ran).cells()}

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


def test_times_of_other_settings_are_not_taken(settings, ran):
    for change in ({"batch_size": 3}, {"dtype": "bfloat16"}, {"attention": "eager"}):
        cells = forecast(parse_config(settings | change, "test"), ran, QUIET)
        assert not any(cell.done or cell.seconds for cell in cells)


def test_questions_of_the_hub_are_not_downloaded_to_be_counted(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps, "load_tasks", lambda *args: pytest.fail("a task was loaded"))
    config = parse_config(settings | {"data": "hub", "limit": None}, "test")
    assert {(cell.questions, cell.macs, cell.seconds) for cell in forecast(config, tmp_path, QUIET)} == {(None,) * 3}


def test_the_command_prints_the_plan_and_stops(settings, ran, tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text(json.dumps(settings))
    before = contents(ran)
    result = CliRunner().invoke(app, ["sweep", str(file), "--out", str(ran), "--dry-run"])
    assert (result.exit_code, contents(ran)) == (0, before)
    assert f"8 cells: 5 done in {ran}, 3 to do." in result.stdout
    assert "Questions to ask: 18." in result.stdout
    assert "TFLOPs (1 of 3 cells unknown)" in result.stdout
    assert "in one process, by the seconds per question of finished cells" in result.stdout
    printed = CliRunner().invoke(app, ["sweep", str(file), "--out", str(ran), "--dry-run", "--json", "--only", "fastv"])
    cells = json.loads(printed.stdout)
    assert [(cell["config"]["label"], cell["done"], cell["basis"]) for cell in cells] == [
        ("none", True, "measured"), ("none", True, "measured"),
        ("fastv:keep=0.5", True, "measured"), ("fastv:keep=0.5", False, "planned"),
    ]  # fmt: skip
