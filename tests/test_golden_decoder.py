"""Decoder-side methods against vectors recorded from their authors' code: same tokens, same caches, same logits."""

import numpy as np
import pytest
import torch
import visibench
from golden_support import MANIFEST, cases, check
from support import GOLDEN
from visibench.methods import dart


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


@pytest.mark.parametrize(("config", "case", "entry"), cases("dart"))
def test_dart(golden_llama, golden_inputs, monkeypatch, config, case, entry):
    """The authors visit pivots in the order of a Python set: that order, of the same pivots, is given here."""
    vectors, prefix = np.load(GOLDEN / "dart.npz"), f"{config}.{case}"
    recorded = torch.from_numpy(vectors[f"{prefix}.pivot_order"])[None]
    seen = []

    def as_recorded(column, there):
        seen.append(column)
        assert there.all()
        assert torch.equal(column.sort(1).values, recorded.sort(1).values)
        return recorded, there

    monkeypatch.setattr(dart, "left_to_right", as_recorded)
    limit = entry["max_num_trunction"]
    budget = {"tokens": limit} if limit else {"keep": 1 - entry["reduction_ratio"]}
    counts = {"visual_pivots": entry["pivot_image_token"], "text_pivots": entry["pivot_text_token"]}
    method = visibench.load_method("dart", layer=entry["K"], **budget, **counts)
    compare(golden_llama, golden_inputs, method, config, case)
    assert len(seen) == 1


@pytest.mark.parametrize(("config", "case", "entry"), cases("fitprune"))
def test_fitprune(golden_llama, golden_inputs, config, case, entry):
    method = visibench.load_method("fitprune", ratio=entry["reduction_ratio"])
    compare(golden_llama, golden_inputs, method, config, case)
