"""Fitted hyperparameters against the search done by hand."""

import pytest
import torch
import visibench
from support import make_batch
from torch.distributions import Categorical, kl_divergence
from visibench.analysis import fit
from visibench.errors import VisibenchError


def test_vtw_layer_is_the_first_below_the_threshold(llava):
    samples = make_batch([(5, 9, 1), (3, 12, 2), (2, 20, 1)])
    divergences = []
    for layer in range(10):
        apart = 0.0
        for sample in samples:
            dense = Categorical(logits=llava(**sample).logits[0, -1])
            with visibench.prune(llava, visibench.load_method("vtw", layer=layer)):
                apart += float(kl_divergence(dense, Categorical(logits=llava(**sample).logits[0, -1]))) / 3
        divergences.append(apart)
    for threshold in (*divergences, 100.0):
        threshold = threshold * 1.001
        expected = next((layer for layer in range(2, 10) if divergences[layer] <= threshold), None)
        if expected is not None:
            assert fit.vtw_layer(llava, samples, threshold, first=2) == expected
    assert len({round(value, 6) for value in divergences}) > 5
    with pytest.raises(VisibenchError, match="comes nearest"):
        fit.vtw_layer(llava, samples, min(divergences) / 2, first=2)
    with pytest.raises(VisibenchError, match="no such layer"):
        fit.vtw_layer(llava, samples, 1.0, first=10)


def test_search_leaves_the_model_as_it_was(llava):
    (sample,) = make_batch([(5, 9, 1)])
    before = llava(**sample).logits
    fit.vtw_layer(llava, [sample], 100.0)
    assert torch.equal(llava(**sample).logits, before)
