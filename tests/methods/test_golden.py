"""FastV and VisiPruner against vectors recorded from their authors' code: same tokens, same caches, same logits."""

import numpy as np
import pytest
import visibench
from golden_support import cases, check
from support import GOLDEN


def visipruner_options(entry):
    config = entry["config"]
    renamed = {
        "stages": "mode",
        "shallow_layers": "shallow_mid_layer",
        "layer_threshold": "layer_threshold",
        "token_threshold": "tokens_threshold",
    }
    options = {ours: config[theirs] for ours, theirs in renamed.items() if theirs in config}
    return options | ({"layer0": entry["model_size"]} if "shallow" in config["mode"] else {})


@pytest.mark.parametrize(("config", "case", "entry"), cases("visipruner"))
def test_visipruner(golden_llama, golden_inputs, config, case, entry):
    vectors, prefix = np.load(GOLDEN / "visipruner.npz"), f"{config}.{case}"
    dense = entry["config"] is None
    method = (
        visibench.load_method("none") if dense else visibench.load_method("visipruner", **visipruner_options(entry))
    )
    check(golden_llama, golden_inputs, method, vectors, prefix, case, vectors[f"{prefix}.kv_len"])


@pytest.mark.parametrize(("config", "case", "entry"), cases("fastv"))
def test_fastv(golden_llama, golden_inputs, config, case, entry):
    vectors, prefix = np.load(GOLDEN / "fastv.npz"), f"{config}.{case}"
    method = visibench.load_method("fastv", layer=entry["K"], tokens=entry["n_keep"])
    lengths = vectors[f"{prefix}.kv_len"].copy()
    lengths[entry["K"] - 1] //= 2  # recorded twice by the authors' class
    check(golden_llama, golden_inputs, method, vectors, prefix, case, lengths)
