"""How a cell is called and what names its folder must not change unnoticed: stored results would no longer be found."""

import json
from pathlib import Path

import pytest
from visibench.evals.sweeps.cells import plan
from visibench.evals.sweeps.config import load_config

PINNED = json.loads((Path(__file__).parent / "identity.json").read_text())
"""Recorded at commit bb2d683: for each packaged sweep its cells in order, label, seed and task → digest."""


@pytest.mark.parametrize("name", sorted(PINNED))
def test_labels_and_digests_of_packaged_sweeps_are_those_recorded(name):
    config, _ = load_config(name)
    cells = {
        f"{cell.config.label} · {cell.config.seed} · {cell.config.task}": cell.config.digest() for cell in plan(config)
    }
    assert list(cells.items()) == list(PINNED[name].items())
