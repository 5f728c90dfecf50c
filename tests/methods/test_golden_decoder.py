"""Decoder-side methods against vectors recorded from their authors' code: same tokens, same caches, same logits."""

import numpy as np
import pytest
import torch
import visibench
from golden_support import MANIFEST, cases, check
from support import GOLDEN
from visibench.engine.layout import TokenSet
from visibench.methods import dart, sparsevlm, transprune, v2drop

STAGE_ARRAYS = ("keep_mask", "score", "noise", "merge_in", "merged")


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


@pytest.mark.parametrize(("config", "case", "entry"), cases("sparsevlm"))
def test_sparsevlm(golden_llama, golden_inputs, monkeypatch, config, case, entry):
    """Also the raters, the scores, and what was merged of what, under the recorded density noise."""
    vectors, prefix, after = np.load(GOLDEN / "sparsevlm.npz"), f"{config}.{case}", (2, 6, 15)
    arrays = {name: vectors[f"{prefix}.{name}"] for name in ("raters", "kv_len")}
    stages = {layer: {name: vectors[f"{prefix}.{name}_{layer}"] for name in STAGE_ARRAYS} for layer in after}
    noise = iter(stages.values())
    monkeypatch.setattr(sparsevlm, "draw", lambda seeds, count: torch.from_numpy(next(noise)["noise"])[None])
    decisions = {}
    recycle = sparsevlm.SparseVLMForward.recycle

    def recording(self, scores, keep, fewest, view):
        decisions[view.layer - 1] = recycle(self, scores, keep, fewest, view), scores, view.hidden, self.raters
        return decisions[view.layer - 1][0]

    monkeypatch.setattr(sparsevlm.SparseVLMForward, "recycle", recording)
    method = visibench.load_method("sparsevlm", tokens=entry["RETAIN_TOKN"])
    expected = {f"{prefix}.kept": originals(stages)}
    expected |= {
        f"{prefix}.{name}": vectors[f"{prefix}.{name}"] for name in ("last_logits", "text_logits", "decode_logits")
    }
    check(golden_llama, golden_inputs, method, expected, prefix, case, arrays["kv_len"])
    assert list(decisions) == list(after)
    for layer, (merge, scores, hidden, raters) in decisions.items():
        stage = stages[layer]
        np.testing.assert_array_equal(raters[0].nonzero().flatten(), arrays["raters"])
        np.testing.assert_allclose(scores[0], stage["score"], rtol=1e-4, atol=1e-7)
        np.testing.assert_array_equal(merge.mask[0], stage["keep_mask"])
        dropped = scores.masked_fill(merge.mask, -torch.inf)[0].argsort(descending=True)[: len(stage["merge_in"])]
        np.testing.assert_allclose(hidden[0, dropped], stage["merge_in"], atol=1e-4)
        assert merge.added_present.all()
        np.testing.assert_allclose(merge.added[0], stage["merged"], atol=1e-4)


def originals(stages):
    """Bool (32, 576): the prompt's own visual tokens at the input of each layer; kept ones stand before merged ones."""
    kept, left, start = np.zeros((32, 576), dtype=bool), np.arange(576), 0
    for layer, stage in [*stages.items(), (31, None)]:
        kept[start : layer + 1, left] = True
        start = layer + 1
        left = left if stage is None else left[stage["keep_mask"][: len(left)]]
    return kept


@pytest.mark.parametrize("case", ["T40", "T75", "2img_T40"])
def test_v2drop(golden_llama, golden_inputs, case):
    """Of two images the authors see the first alone: what lies behind it is text to them."""
    vectors, prefix = np.load(GOLDEN / "v2drop.npz"), f"default.{case}"
    kept = vectors[f"{prefix}.kept"]
    assert kept[:, 576:].all()
    expected = {name: vectors[name] for name in vectors.files} | {f"{prefix}.kept": kept[:, :576]}
    scores = {}

    class Recording(v2drop.V2DropForward):
        def scored(self, layer, view):
            scores[layer] = super().scored(layer, view)
            return scores[layer]

    class Recorded(type(visibench.load_method("v2drop"))):
        def begin(self, layout, geometry):
            return Recording(self, self.left(layout, geometry))

    check(golden_llama, golden_inputs, Recorded(), expected, prefix, case, vectors[f"{prefix}.seq_len"])
    assert list(scores) == [3, 17, 22]
    for layer, score in scores.items():
        if f"{prefix}.score_{layer}" in expected:
            np.testing.assert_allclose(score[0], expected[f"{prefix}.score_{layer}"], rtol=1e-4)


@pytest.mark.parametrize(("config", "case", "entry"), cases("transprune"))
def test_transprune(golden_llama, golden_inputs, monkeypatch, config, case, entry):
    """Of two images the authors cut the first alone, and take as many tokens behind it as there is text, and one."""
    vectors, prefix = np.load(GOLDEN / "transprune.npz"), f"{config}.{case}"
    kept = vectors[f"{prefix}.kept"]
    expected = {name: vectors[name] for name in vectors.files} | {f"{prefix}.kept": kept[:, :576]}
    if case == "2img_T40":
        assert kept[:, 576:].all()
        text_attention = transprune.text_attention

        def first_rows(view):
            first = view.layout.text.mask & (view.layout.text.mask.cumsum(1) <= 41)
            view.layout.__dict__["text"] = TokenSet(first, (41,))
            return text_attention(view)

        monkeypatch.setattr(transprune, "text_attention", first_rows)
    scores = {}

    class Recording(transprune.TransPruneForward):
        def scored(self, layer, view):
            scores[layer] = super().scored(layer, view), self.weight
            return scores[layer][0]

    monkeypatch.setattr(transprune, "TransPruneForward", Recording)
    method = visibench.load_method(
        "transprune",
        accumulate=[layer - 1 for layer in entry["accmulating_layer_list"]],
        cuts=entry["pruning_layer_list"],
        ratios=entry["image_token_ratio_list"],
    )
    check(golden_llama, golden_inputs, method, expected, prefix, case, expected[f"{prefix}.seq_len"])
    assert list(scores) == entry["pruning_layer_list"]
    for layer, (score, transitions) in scores.items():
        np.testing.assert_allclose(score[0], expected[f"{prefix}.score_{layer}"], rtol=1e-3, atol=1e-6)
        if f"{prefix}.transition_{layer}" in expected:
            np.testing.assert_allclose(transitions[0], expected[f"{prefix}.transition_{layer}"], rtol=1e-3, atol=1e-6)
