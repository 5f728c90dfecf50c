"""What methods of the vision side refuse: models that do not fit, bare decoders, options out of range."""

import dataclasses

import pytest
import visibench
from support import make_llava
from visibench.errors import OptionError, UnsupportedModelError
from visibench.models.adapters import Adapter


def with_vision(**changes):
    geometry = Adapter(make_llava(layers=1)).geometry
    return dataclasses.replace(geometry, vision=dataclasses.replace(geometry.vision, **changes))


@pytest.mark.parametrize(
    ("name", "options", "changes", "message"),
    [
        ("fastervlm", {}, {"has_cls": False}, "CLS token.*divprune or pooling"),
        ("visionzip", {}, {"has_cls": False}, "CLS token"),
        ("vispruner", {}, {"has_cls": False}, "CLS token"),
        ("scope", {}, {"has_cls": False}, "CLS token"),
        ("holov", {}, {"has_cls": False}, "CLS token"),
        ("holov", {"runs": 17}, {}, "17 runs of an image of 16 tokens"),
        ("vscan", {"window": 2}, {"has_cls": False}, "CLS token"),
        ("vscan", {"layers": "scaled", "tokens": 0}, {}, "at least 1 token of each image"),
        ("vscan", {"window": 2}, {}, "early=5, but the features are those of vision block 1"),
        ("hiprune", {}, {}, "middle=8, but the features are those of vision block 1.*layers='scaled'"),
        ("prumerge", {}, {"has_cls": False}, "CLS token"),
        ("prumerge_plus", {}, {"feature_block": 2}, "block after the feature block.*visionzip"),
        ("cdpruner", {}, {}, "no CLIP text tower.*condition=none"),
        ("pooling", {}, {"tokens": 18}, "square grid"),
        ("downsample", {}, {"tokens": 18}, "square grid"),
        ("pooling", {"tokens": 0}, {}, "at least 1 token"),
        ("prumerge", {"tokens": 0}, {}, "at least 1 token"),
        ("visionzip", {"tokens": 3, "contextual": 3}, {}, "leave none for CLS"),
        ("tome", {"tokens": 3}, {}, "at least 4 tokens"),
        ("flowcut", {}, {"has_cls": False}, "CLS token.*use query='mean', or.*divprune or pooling"),
        ("flowcut", {}, {"feature_block": 0}, "features are those of the first vision block"),
        ("flowcut", {"cut": 4}, {}, "cut=4, but the model has 1 layers: choose other layers"),
        ("flowcut", {"positions": "keep", "query": "mean"}, {"tiled": True}, "positions='renumber'"),
    ],
)
def test_models_that_do_not_fit_are_refused(name, options, changes, message):
    method = visibench.load_method(name, **({"keep": 0.5} | ({"keep": None} if "tokens" in options else {}) | options))
    with pytest.raises(OptionError, match=message) as caught:
        method.check(with_vision(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["divprune", "fastervlm", "visionzip", "vispruner", "scope", "holov", "prumerge", "pooling", "tome", "downsample"],
)
def test_bare_decoders_are_refused(golden_llama, name):
    with pytest.raises(UnsupportedModelError, match="vision tower"):
        visibench.prune(golden_llama, visibench.load_method(name, keep=0.5))


@pytest.mark.parametrize("name", ["visionzip", "prumerge", "pooling", "tome", "downsample"])
def test_new_tokens_have_no_old_positions(name):
    with pytest.raises(OptionError, match="positions='renumber'"):
        visibench.load_method(name, keep=0.5, positions="keep")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("visionzip", {"tokens": 8, "merge": "max"}, "'sum' or 'mean'"),
        ("flowcut", {"tokens": 8, "query": "all"}, "query must be 'cls' or 'mean'"),
        ("flowcut", {"tokens": 8, "cut": 0}, "cut must be >= 1: the layer before it is read"),
        ("flowcut", {"tokens": 8, "cut": 2, "tower_factor": 0.5}, "tower_factor, .* must be >= 1"),
        ("flowcut", {"tokens": 8, "tower_factor": 3.0}, "give cut=LAYER, or another budget"),
        ("visionzip", {"tokens": 8, "contextual": -1}, "contextual must be >= 0"),
        ("vispruner", {"tokens": 8, "important": 2.0}, "fraction of the budget"),
        ("vispruner", {"tokens": 8, "drop": 0}, "drop"),
        ("scope", {"tokens": 8, "alpha": -1.0}, "alpha must be >= 0"),
        ("scope", {"tokens": 8, "combine": "max"}, "'multiply' or 'add'"),
        ("vscan", {"tokens": 8, "window": 0}, "window, the side of a window in patches, must be >= 1"),
        ("vscan", {"tokens": 8, "quota": "round"}, "quota must be 'floor' or 'ceil'"),
        ("vscan", {"tokens": 8, "early": -1}, "early, a vision block, must be >= 0"),
        ("vscan", {"tokens": 8, "cuts": (16, 8)}, "cuts must rise from 1 on"),
        ("vscan", {"tokens": 8, "counts": (3, 2)}, "1 cuts need as many counts, not 2"),
        ("vscan", {"tokens": 8, "counts": (-1,)}, "counts must be >= 0"),
        ("hiprune", {"tokens": 8, "alpha": 1.5}, r"alpha must lie in \[0, 1\]"),
        ("hiprune", {"tokens": 8, "middle": -1}, "middle, a vision block, must be >= 0"),
        ("holov", {"tokens": 8, "runs": 0}, "runs must be >= 1"),
        ("holov", {"tokens": 8, "shortfall": "none"}, "'attention' or 'zeros'"),
        ("holov", {"tokens": 8, "shortfall": "zeros", "positions": "keep"}, "no old position.*shortfall='attention'"),
        ("prumerge", {"tokens": 8, "keep": 0.5}, "at most one of keep"),
        ("prumerge", {"neighbours": -1}, "neighbours must be >= 0"),
        ("prumerge", {"order": "random"}, "'attention' or 'spatial'"),
        ("prumerge", {"weights": "none"}, "'raw' or 'normalised'"),
        ("cdpruner", {"tokens": 8, "condition": "image"}, "'question' or 'none'"),
        ("fastervlm", {}, "exactly one of keep"),
    ],
)
def test_bad_options_raise(name, options, message):
    with pytest.raises(OptionError, match=message):
        visibench.load_method(name, **options)
