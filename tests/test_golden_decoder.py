"""Decoder-side methods against vectors recorded from their authors' code: same tokens, same caches, same logits."""

import numpy as np
import pytest
import visibench
from golden_support import MANIFEST, cases, check
from support import GOLDEN


def compare(model, inputs, method, config, case):
    """A configuration whose recorded arrays lie in the file of the method's name."""
    vectors, prefix = np.load(GOLDEN / f"{method.name}.npz"), f"{config}.{case}"
    check(model, inputs, method, vectors, prefix, case, vectors[f"{prefix}.kv_len"])


@pytest.mark.parametrize(("config", "case", "entry"), cases("pyramiddrop"))
def test_pyramiddrop(golden_llama, golden_inputs, config, case, entry):
    cuts, ratios = entry["layer_list"], entry["image_token_ratio_list"]
    method = visibench.load_method("pyramiddrop", cuts=cuts, ratios=ratios)
    compare(golden_llama, golden_inputs, method, config, case)


@pytest.mark.parametrize("case", ["T40", "T75"])
@pytest.mark.parametrize("config", MANIFEST["vtw"]["configs"])
def test_vtw(golden_llama, golden_inputs, config, case):
    method = visibench.load_method("vtw", layer=MANIFEST["vtw"]["configs"][config]["K"])
    compare(golden_llama, golden_inputs, method, config, case)
