"""Methods of the vision side against vectors recorded through tower, projector and decoder: choices and logits.

The authors' budgets of some methods shrink with the number of images in the batch; here each image has all of it, so
that a batch of two is compared under half of it.
"""

import pytest
import torch
import visibench
from golden_llava import CLIP, check_whole, make_golden_llava, vectors, whole_prompts
from golden_support import MANIFEST
from visibench.methods import pieces, scope


@pytest.fixture(scope="module")
def whole():
    return make_golden_llava(whole=True)


def wholes(name):
    return [pytest.param(*case, id=f"{name}-{case[0]}-{case[2]}") for case in whole_prompts(name)]


def configurations(name):
    """Every configuration with the groups of images that it was recorded on."""
    images = {"img0": [0], "img1": [1], "batch2": [0, 1]}
    for config, entry in MANIFEST[name]["configs"].items():
        for case in filter(images.get, entry["margins"]):
            yield pytest.param(config, entry, case, images[case], id=f"{name}-{config}-{case}")


# ---- SCOPE --------------------------------------------------------------------------------------------------------


def scope_options(entry, images):
    combine = {"multi": "multiply", "add": "add"}[entry["COMBINED"]]
    return {"tokens": entry["token_num"] // len(images), "alpha": entry["ALPHA"], "combine": combine}


@pytest.mark.parametrize(("config", "entry", "case", "images"), configurations("scope"))
def test_scope_picks(config, entry, case, images):
    recorded, prefix = vectors("scope"), f"{config}.{case}"
    method = visibench.load_method("scope", **scope_options(entry, images))
    attention = torch.cat([recorded[f"cls_attention_sum.img{number}"] for number in images])
    for dtype, suffix in ((torch.float32, ""), (torch.float64, "_fp64")):
        similarity = pieces.cosine(CLIP["hidden_m2"][images, 1:].to(dtype))
        weight = attention.to(dtype) ** method.alpha
        picked = scope.covering(similarity, weight, method.tokens, add=method.combine == "add")
        assert torch.equal(picked, recorded[f"{prefix}.order{suffix}"].long())
    assert torch.equal(pieces.marked(picked, 576), recorded[f"{prefix}.kept"])


@pytest.mark.parametrize(("config", "entry", "case", "images"), wholes("scope"))
def test_scope(whole, config, entry, case, images):
    recorded, group = vectors("scope"), "batch2" if len(images) > 1 else "img0"
    method = visibench.load_method("scope", **scope_options(entry, images))
    session = check_whole(whole, method, recorded, f"{config}.{case}", images)
    assert torch.equal(session.trace.kept(0)[0], recorded[f"{config}.{group}.kept"].flatten())
