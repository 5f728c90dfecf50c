"""How a cell is called and what names its folder must not change unnoticed: stored results would no longer be found."""

import json
from pathlib import Path

import pytest
from visibench.evals.settings.method_spec import parse
from visibench.evals.sweeps.cells import cell_specs
from visibench.evals.sweeps.config import load_config
from visibench.results.store.records import digest

HERE = Path(__file__).parent
PINNED = json.loads((HERE / "identity.json").read_text())
"""Recorded at commit bb2d683: for each packaged sweep its cells in order, label, seed and task → digest, code aside."""


@pytest.mark.parametrize("name", sorted(PINNED))
def test_labels_and_digests_of_packaged_sweeps_are_those_recorded(name):
    config, _ = load_config(name)
    configs = [cell.config.model_copy(update={"code": {}}) for cell in cell_specs(config)]
    cells = {f"{cell.label} · {cell.seed} · {cell.task}": cell.digest() for cell in configs}
    assert list(cells.items()) == list(PINNED[name].items())


EXAMPLES = json.loads((HERE / "examples.json").read_text())
"""Recorded at commit a7225af: an example of a method → how it is called, and a hash of all its hyperparameters."""


@pytest.mark.parametrize("text", EXAMPLES)
def test_examples_of_methods_are_called_and_hashed_as_recorded(text):
    method = parse(text)
    assert [str(method), digest(method.hyperparameters())] == EXAMPLES[text]
