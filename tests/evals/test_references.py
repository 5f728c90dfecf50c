"""Rows that sweeps add by themselves: random, pooling and downsample at the budgets of the other methods."""

from types import SimpleNamespace

import pandas as pd
import pytest
from rich.console import Console
from visibench.errors import OptionError, UnsupportedModelError
from visibench.evals.sweeps import executor
from visibench.evals.sweeps import references as rows
from visibench.evals.sweeps import sweep as sweeps
from visibench.evals.sweeps.config import parse_config
from visibench.evals.sweeps.events import Note, Reporter
from visibench.results.store.store import Store
from visibench.results.tables.tables import build

QUIET = Console(quiet=True)


class Notes(Reporter):
    """Keeps what a sweep has to say."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, event) -> None:
        if isinstance(event, Note):
            self.texts.append(event.text)


@pytest.fixture
def settings(disk_data) -> dict:
    content = {"model": "tiny", "data": str(disk_data), "tasks": ["gqa"], "limit": 4, "batch_size": 4, "timing": None}
    return content | {"references": True, "seeds": [3]}


def cell(method: str, mean: float, label: str = "", task: str = "gqa"):
    config = SimpleNamespace(method=method, label=label or method, task=task, control=False)
    return SimpleNamespace(config=config, metrics=SimpleNamespace(visual_tokens=SimpleNamespace(mean=mean)))


def test_groups_are_those_of_tables_and_lack_what_no_row_of_them_is():
    """T of a method is the mean over its tasks: 90 and 70 of the first, 72 of the next; 40 is below 4/5 of 80."""
    cells = [cell("none", 144), cell("fastv", 90), cell("fastv", 70, task="pope"), cell("visipruner", 72)]
    cells += [cell("divprune", 40), cell("pooling", 36)]
    assert list(rows.lacking(cells)) == [
        ("random", 76),
        ("pooling", 76),
        ("downsample", 76),
        ("random", 38),
        ("downsample", 38),
    ]
    assert list(rows.lacking([cell("none", 144)])) == []


@pytest.mark.slow
def test_a_sweep_adds_them_at_the_budget_that_was_measured(settings, tmp_path):
    config = parse_config(settings | {"methods": ["visipruner:shallow_layers=2", "pooling:tokens=36"]}, "test")
    cells = sweeps.sweep(config, tmp_path, QUIET)
    (own,) = (c.metrics.visual_tokens.mean for c in cells if c.config.method == "visipruner")
    wanted = {"random": own, "pooling": own, "downsample": own}
    for each in cells:
        method, mean = each.config.method, each.metrics.visual_tokens.mean
        if method in wanted and f"T={own:.4g}" in each.config.label:
            # A grid is resized to whole patches a side, so these come in steps.
            assert mean == pytest.approx(own, abs=1 if method == "random" else 12)
    seeds = [c.config.seed for c in cells if c.config.method == "random" and f"T={own:.4g}" in c.config.label]
    assert seeds == [3, 4, 5, 6, 7]
    assert [c.config.label for c in cells if c.config.method == "pooling"] == [
        "pooling:tokens=36",
        f"pooling T={own:.4g}",
    ]
    (table,) = build(cells)
    (row,) = (row for row in table.rows if row.label == f"random T={own:.4g}")
    alone = pd.Series([c.samples()["score"].mean() for c in cells if c.config.label == row.label])
    score = row.scores["gqa"]["exact_match"]
    assert (score.mean, score.sd) == (pytest.approx(alone.mean()), pytest.approx(alone.std()))

    class Forbidden:
        def run(self, *args):
            pytest.fail("something ran again")

    again = sweeps.sweep(config, tmp_path, QUIET, executor=Forbidden())
    assert [c.config for c in again] == [c.config for c in cells]
    assert len(Store(tmp_path).cells()) == len(cells)


@pytest.mark.slow
@pytest.mark.parametrize(
    "error",
    [
        OptionError("pooling: T=72 is out of reach: tokens gives T=1 to T=36"),
        UnsupportedModelError("pooling acts on the vision side, and that of this model has not been tested"),
    ],
)
def test_what_cannot_be_added_is_said_and_the_others_are_added(error, settings, tmp_path, monkeypatch):
    solve = executor.Prepared.solve

    def limited(self, name, options, target):
        if name == "pooling":
            raise error
        return solve(self, name, options, target)

    monkeypatch.setattr(executor.Prepared, "solve", limited)
    notes = Notes()
    config = parse_config(settings | {"methods": ["divprune:tokens=72"]}, "test")
    cells = sweeps.sweep(config, tmp_path, QUIET, report=notes)
    assert [c.config.method for c in cells] == ["none", "divprune", *["random"] * 5, "downsample"]
    assert f"No reference {error}" in notes.texts
    assert any(text.startswith("6 cells of references") for text in notes.texts)


def test_none_are_added_unasked(settings, tmp_path):
    config = parse_config(settings | {"references": False, "methods": ["divprune:tokens=72"]}, "test")
    assert [c.config.method for c in sweeps.sweep(config, tmp_path, QUIET)] == ["none", "divprune"]
