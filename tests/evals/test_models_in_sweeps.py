"""Sweeps over several models."""

import gc
import weakref

import pytest
from rich.console import Console
from storing import untimed
from visibench.errors import OptionError, UnknownNameError
from visibench.evals.sweeps import executor
from visibench.evals.sweeps import sweep as sweeps
from visibench.evals.sweeps.config import parse_config
from visibench.results.tables.tables import build

QUIET = Console(quiet=True)


@pytest.fixture
def settings(checkpoint, disk_data) -> dict:
    content = {"models": [str(checkpoint), "tiny"], "data": str(disk_data), "tasks": ["gqa"], "limit": 4}
    return content | {"methods": ["fastv:keep=0.5"], "batch_size": 2, "timing": None}


@pytest.mark.slow
def test_each_model_is_loaded_once_and_gone_before_the_next(settings, tmp_path, monkeypatch):
    held, load = [], executor.load_model

    def spy(name, **options):
        if options.get("weights") == "meta":
            return load(name, **options)
        gc.collect()
        assert [reference() for reference in held] == [None] * len(held), "a model is still in memory"
        loaded = load(name, **options)
        held.append(weakref.ref(loaded.model))
        return loaded

    monkeypatch.setattr(executor, "load_model", spy)
    cells = sweeps.sweep(parse_config(settings, "test"), tmp_path, QUIET)
    assert len(held) == 2
    assert [(cell.config.model, cell.config.method) for cell in cells] == [
        (model, method) for model in settings["models"] for method in ("none", "fastv")
    ]
    tables = build(cells)
    assert [table.differs["model"] for table in tables] == settings["models"]
    assert [[row.method for row in table.rows] for table in tables] == [["none", "fastv"]] * 2
    alone = sweeps.sweep(parse_config(settings | {"models": [], "model": "tiny"}, "test"), tmp_path / "alone", QUIET)
    for one, other in zip(cells[2:], alone, strict=True):
        assert one.config == other.config
        assert untimed(one) == untimed(other)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"methods": ["fastv:layer=11,keep=0.5"]}, OptionError, "10 layers"),
        ({}, UnknownNameError, "unknown model 'tini'"),
    ],
)
def test_what_a_later_model_refuses_shows_before_the_first_one_runs(settings, tmp_path, changes, error, message):
    """tiny has twelve layers, the checkpoint of these tests ten."""
    later = settings["models"][0] if changes else "tini"
    with pytest.raises(error, match=message):
        sweeps.sweep(parse_config(settings | changes | {"models": ["tiny", later]}, "test"), tmp_path, QUIET)
    assert not list(tmp_path.iterdir())
