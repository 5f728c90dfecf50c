"""Decoder-side methods against vectors recorded from their authors' code: same tokens, same caches, same logits."""

import numpy as np
import pytest
import torch
import visibench
from golden_support import MANIFEST, cases, check
from support import GOLDEN
from visibench.engine.layout import TokenSet
from visibench.engine.segment import Segment
from visibench.methods import dart, pact, sparsevlm, transprune, v2drop

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


def pact_options(entry):
    clustered, kept = entry["use_DBDPC"], entry["pruning_tokeep_percentage_value"] if entry["token_pruning"] else 1
    return {
        "layer": entry["layer_for_reduction"],
        "keep": kept,
        "cutoff": entry["cutoff"],
        "retrieve": entry["coef_pruned"] if entry["include_pruned_in_mean"] else 0,
        "cluster": clustered,
        "proportional": not entry["no_proportional_attention"],
        "mean_positions": entry["get_mean_position_id"],
        "positions": "renumber" if entry["change_position_ids"] else "keep",
    }


@pytest.mark.parametrize(("config", "case", "entry"), cases("pact"))
def test_pact(golden_llama, golden_inputs, monkeypatch, config, case, entry):
    """Also what was pruned, which tokens went to which centre, and what came of them."""
    vectors, prefix = np.load(GOLDEN / "pact.npz"), f"{config}.{case}"
    layer, decisions = entry["layer_for_reduction"], {}
    method = visibench.load_method("pact", **pact_options(entry))

    class Recording(pact.PACTForward):
        def layer_input(self, layer, view):
            decisions[layer] = super().layer_input(layer, view)
            return decisions[layer]

        def importance(self, view):
            importance = super().importance(view)
            np.testing.assert_allclose(importance[0], vectors[f"{prefix}.importance"], rtol=1e-4)
            kept = importance[0].argsort(descending=True)[: int(vectors[f"{prefix}.after_pruning"].sum())]
            np.testing.assert_array_equal(kept.sort().values, vectors[f"{prefix}.after_pruning"].nonzero()[0])
            return importance

        def means(self, view, kept, centre, cluster):
            of = torch.nn.functional.pad(kept, (0, 1), value=-1).gather(1, cluster)
            np.testing.assert_array_equal(of[0], vectors[f"{prefix}.cluster_of"])
            return super().means(view, kept, centre, cluster)

    monkeypatch.setattr(pact, "PACTForward", Recording)
    if method.positions == "renumber":  # there the authors go on at the prompt's length
        monkeypatch.setattr(Segment, "after", at_the_prompts_length(Segment.after, 611 + int(case[1:])))
    check(golden_llama, golden_inputs, method, vectors, prefix, case, vectors[f"{prefix}.seq_len"])
    merge = decisions[layer]
    if not entry["use_DBDPC"]:
        return
    kept = vectors[f"{prefix}.kept"][layer]
    behind = slice(35, 35 + kept.sum())
    if f"{prefix}.merged" in vectors:
        np.testing.assert_allclose(merge.replaced[0, kept], vectors[f"{prefix}.merged"], atol=1e-4)
    if entry["no_proportional_attention"]:
        assert merge.bias is None
    else:
        np.testing.assert_array_equal(merge.bias[0, kept], vectors[f"{prefix}.log_size_bias"][behind])
    if merge.positions is not None:
        np.testing.assert_array_equal(merge.positions[0, kept], vectors[f"{prefix}.positions_after"][behind])


def at_the_prompts_length(after, length):
    """Positions of new tokens go on from there, not from the last one that was numbered anew."""

    def moved(self, fed):
        held = after(self, fed)
        if fed == 0 and held.positions is not None:
            held.positions[:, -1] = length - 1
        return held

    return moved
