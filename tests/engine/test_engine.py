"""The engine against sequences cut by hand; what holds for every method is in ``test_invariants.py``."""

from itertools import pairwise

import pytest
import torch
import visibench
from probes import MergeProbe, OrderProbe, Probe, ProjectedProbe, VisionProbe
from support import IMAGE, collate, make_batch, state
from transformers import AutoModelForCausalLM, GPT2Config, StaticCache
from visibench.engine import PruningSession, attention
from visibench.errors import InputError, OptionError, UnsupportedModelError, VisibenchError
from visibench.methods import Merge

# (prefix, text, images): different lengths, no image, one and several images.
ROWS = [(5, 9, 1), (3, 12, 2), (4, 6, 0), (2, 20, 1), (1, 10, 3)]
DENSE = visibench.load_method("none")
FASTV = visibench.load_method("fastv", tokens=4)


def last_logits(model, method, batch):
    """Positions are counted without padding, as in ``generate``: the norms of rotated keys depend on them."""
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with visibench.prune(model, method) as session:
        return model(**batch, position_ids=positions).logits[:, -1], session.trace


@pytest.mark.parametrize("how", [{"do_sample": True, "top_k": 5}, {"num_beams": 2, "do_sample": False}], ids=str)
def test_sampling_and_beams_run_on_the_pruned_cache(llava, how):
    samples = make_batch(ROWS[:3], seed=2)
    with visibench.prune(llava, FASTV):
        torch.manual_seed(0)
        together = llava.generate(**collate(samples), max_new_tokens=5, min_new_tokens=5, **how)
        assert together.shape[0] == 3
        if "num_beams" in how:
            for row, sample in enumerate(samples):
                alone = llava.generate(**sample, max_new_tokens=5, min_new_tokens=5, **how)
                assert together[row, -5:].tolist() == alone[0, -5:].tolist()


# ---- what a cut is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("kind", [Probe, VisionProbe, ProjectedProbe, OrderProbe])
def test_cut_in_front_of_layer_0_equals_the_dense_model_on_the_shorter_sequence(llava, kind, positions):
    (sample,) = make_batch([(4, 8, 2)])
    method = kind(layer=0, every=2, positions=positions)
    pruned, trace = last_logits(llava, method, sample)
    assert trace.kept(0)[0].nonzero().flatten().tolist() == [i for i in range(32) if i % 2]
    embeddings = llava.get_input_embeddings()(sample["input_ids"])
    features = llava.get_image_features(pixel_values=sample["pixel_values"]).pooler_output
    is_visual = sample["input_ids"][0] == IMAGE
    embeddings[0, is_visual] = torch.cat(list(features))
    number = torch.where(is_visual, is_visual.cumsum(0) - 1, -1)
    keep = (number % 2 == 1) | ~is_visual
    index = keep.nonzero().flatten()
    if kind is OrderProbe:  # each image from its end
        index = torch.cat([part.flip(0) if visual else part for visual, part in spans(index, is_visual)])
    place = index[None] if positions == "keep" else torch.arange(len(index))[None]
    dense = llava(inputs_embeds=embeddings[:, index], position_ids=place).logits[:, -1]
    torch.testing.assert_close(pruned, dense, atol=1e-4, rtol=1e-5)


def spans(index, is_visual):
    """Runs of ``index`` that are visual throughout, or text throughout."""
    starts = [0, *(is_visual[index].diff().nonzero().flatten() + 1).tolist(), len(index)]
    return [(bool(is_visual[index[a]]), index[a:b]) for a, b in pairwise(starts)]


def test_a_method_that_does_not_say_so_may_not_reorder(llava, monkeypatch):
    monkeypatch.setattr(OrderProbe, "reorders", False)
    with pytest.raises(VisibenchError, match="probe changes the order of tokens and does not say so: set reorders"):
        last_logits(llava, OrderProbe(), collate(make_batch(ROWS)))


def test_order_moves_tokens_and_new_ones_keep_their_places(llava):
    """Rows of one and of two images; anchors name places, so that a new token stays in front of its image."""

    class Both(OrderProbe):
        def vision(self, view):
            keep = super().vision(view)
            front = torch.full((len(keep.mask), 1), -1)
            return Merge(keep.mask, added=view.features[:, :1], anchors=front, order=keep.order)

    _, trace = last_logits(llava, Both(positions="renumber"), collate(make_batch([(4, 8, 2), (3, 5, 1)])))
    layout, odd = trace.layouts[0], list(range(15, 0, -2))
    two = [-1] * 4 + [-2, *odd] + [-1] + [-2, *[n + 16 for n in odd]] + [-1] * 8
    assert layout.visual_id[0].tolist() == two
    assert layout.visual_id[1][layout.valid[1]].tolist() == [-1] * 3 + [-2, *odd] + [-1] * 5


def test_added_tokens_stand_where_the_merge_says(llava):
    (sample,) = make_batch([(4, 8, 2)])
    front, trace = last_logits(llava, VisionProbe(merge=True, positions="renumber"), sample)
    layout = trace.layouts[0]
    # Prefix, then per image one new token (-2) and the odd ones; one text token stands between the images.
    odd = list(range(1, 16, 2))
    expected = [-1] * 4 + [-2, *odd] + [-1] + [-2, *[n + 16 for n in odd]] + [-1] * 8
    assert layout.visual_id[0].tolist() == expected
    assert trace.visual_counts()[0].tolist() == [18] * 10
    behind = last_logits(llava, MergeProbe(layer=2, positions="renumber"), sample)[1].layouts[2]
    assert behind.visual_id[0].tolist() == [-1] * 4 + odd + [-1] + [n + 16 for n in odd] + [-2] + [-1] * 8
    assert front.isfinite().all()


# ---- rows of attention --------------------------------------------------------------------------------------------


def test_row_weights_and_subset_attention_equal_the_full_softmax():
    torch.manual_seed(0)
    layout = visibench.TokenLayout.batch(
        [visibench.TokenLayout.from_spans(9, visual=[(2, 6)]), visibench.TokenLayout.from_spans(7, visual=[(1, 3)])]
    )
    query, key, value = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    causal = torch.ones(9, 9).tril().bool()[None] & layout.valid[:, None] | torch.eye(9).bool()
    logits = (query @ key.repeat_interleave(2, 1).mT) * 8**-0.5
    full = logits.masked_fill(~causal[:, None], -torch.inf).softmax(-1)
    rows = attention.row_weights(
        query[:, :, 3:], key, torch.arange(3, 9).expand(2, -1), layout.valid, attention.Logits(8**-0.5)
    )
    torch.testing.assert_close(rows, full[:, :, 3:])
    part = attention.subset_attention(query, key, value, layout.text, layout.nonvisual, attention.Logits(8**-0.5))
    seen = causal & layout.nonvisual.mask[:, None]
    masked = logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1).nan_to_num() @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(part[0, :, :3], masked[0, :, 6:])
    torch.testing.assert_close(part[1, :, :4], masked[1, :, 5:])


@pytest.mark.parametrize(("batch", "kv_heads"), [(1, 4), (3, 4), (1, 2), (3, 2)])
def test_parts_of_the_last_output_equal_weights_times_values(batch, kv_heads):
    """Also where queries and outputs lie in memory as (B, L, H, d), which no view can fold."""
    query, output = torch.randn(2, batch, 9, 4, 8)
    key, value = torch.randn(2, batch, kv_heads, 9, 8)
    logits = attention.Logits(8**-0.5)
    weights = attention.last_weights(query.transpose(1, 2), key, logits.scaling)
    sums = attention.contributions(weights, value, output)
    dot, norm, square = attention.Contributions(sums, batch, slice(2, 7)).of_visual(sums)
    all_heads = query.transpose(1, 2) @ key.repeat_interleave(4 // kv_heads, 1).transpose(2, 3) * logits.scaling
    last = all_heads[:, :, -1].softmax(-1)
    parts = (last[..., None] * value.repeat_interleave(4 // kv_heads, 1)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(norm, parts[:, 2:7].norm(dim=2))
    torch.testing.assert_close(dot, (parts @ output[:, -1].flatten(1)[..., None])[:, 2:7, 0])
    torch.testing.assert_close(square[:, 0], (parts.sum(1) * output[:, -1].flatten(1)).sum(1))
    if kv_heads == 4:
        seen = torch.ones(9, 9, dtype=torch.bool).tril()
        full = all_heads.masked_fill(~seen, -torch.inf).softmax(-1).amax(1)
        largest = attention.largest_weights(query.transpose(1, 2), key, 3, 6, logits.scaling)
        torch.testing.assert_close(largest, full[:, 3:6, :6])


def test_attention_rows_are_taken_in_blocks_without_an_l_by_l_map(llava, monkeypatch):
    sizes = []
    original = attention.row_weights
    monkeypatch.setattr(attention, "row_weights", lambda q, *a: sizes.append(q.shape[2]) or original(q, *a))
    monkeypatch.setattr(attention.weights, "BLOCK", 4)
    batch = collate(make_batch(ROWS))
    method = visibench.load_method("fitprune", layers="scaled", ratio=60)
    blocked, _ = last_logits(llava, method, batch)
    assert max(sizes) == 4
    monkeypatch.setattr(attention.weights, "BLOCK", 128)
    torch.testing.assert_close(blocked, last_logits(llava, method, batch)[0], atol=1e-4, rtol=1e-4)


# ---- leaving things as they were ----------------------------------------------------------------------------------


def test_failure_while_entering_leaves_nothing_behind(llava):
    before = state(llava)
    llava.model.language_model.config._attn_implementation = "flex_attention"
    try:
        with pytest.raises(UnsupportedModelError, match="sdpa"), visibench.prune(llava, FASTV):
            pass
    finally:
        llava.model.language_model.config._attn_implementation = "sdpa"
    assert state(llava) == before
    last_logits(llava, FASTV, collate(make_batch(ROWS)))


def test_images_of_one_prompt_are_never_used_for_another(llava):
    """Without a cache ``generate`` runs the model again and again on images that it encoded once."""
    first, second = make_batch([(4, 8, 1), (4, 8, 1)])
    encoded = {"image": llava.get_image_features(pixel_values=second["pixel_values"])}
    ids = {key: second[key] for key in ("input_ids", "attention_mask")}
    with visibench.prune(llava, visibench.load_method("fastervlm", tokens=5)):
        llava.generate(**first, max_new_tokens=3, min_new_tokens=3, suppress_tokens=[IMAGE], use_cache=False)
        for images in ({}, {"mm_encoder_outputs": encoded}):
            with pytest.raises(InputError, match="needs the images"):
                llava(**ids, **images)


# ---- saying no ----------------------------------------------------------------------------------------------------


def test_nested_use_raises(llava):
    with visibench.prune(llava, DENSE), pytest.raises(VisibenchError, match="already being pruned"):
        PruningSession(llava, DENSE).__enter__()


def test_unsupported_models_and_arguments_raise(llava, golden_llama):
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=10))
    with pytest.raises(UnsupportedModelError, match="gpt2"):
        visibench.prune(gpt2, DENSE)
    with pytest.raises(UnsupportedModelError, match="pass the full model"):
        visibench.prune(llava.model, DENSE)
    with pytest.raises(UnsupportedModelError, match="vision tower"), visibench.prune(golden_llama, VisionProbe()):
        pass
    with pytest.raises(VisibenchError, match="load_method"):
        visibench.prune(llava, "fastv")
    with pytest.raises(OptionError, match="10 layers"):
        visibench.prune(llava, visibench.load_method("fastv", layer=10, keep=0.5))


def test_inputs_that_do_not_fit_raise(llava, golden_llama):
    (sample,) = make_batch([(4, 8, 1)])
    old = llava(**sample, use_cache=True).past_key_values
    with visibench.prune(llava, DENSE) as session:
        with pytest.raises(InputError, match="filled outside"):
            llava(input_ids=torch.tensor([[5]]), past_key_values=old)
        with pytest.raises(VisibenchError, match="nothing has been traced"):
            _ = session.trace
        with pytest.raises(InputError, match="2D attention mask"):
            llava(**sample | {"attention_mask": torch.ones(1, 1, 28, 28)})
        with pytest.raises(InputError, match="left padded"):
            llava(**sample | {"attention_mask": torch.tensor([[1] * 27 + [0]])})
        with pytest.raises(InputError, match="call the model itself"):
            llava.model.language_model(inputs_embeds=torch.zeros(1, 4, 48))
        cache = StaticCache(config=llava.config.text_config, max_cache_len=40)
        with pytest.raises(UnsupportedModelError, match="DynamicCache"):
            llava(**sample, past_key_values=cache)
    embeddings = torch.zeros(1, 10, 32)
    with visibench.prune(golden_llama, DENSE), pytest.raises(InputError, match="from_spans"):
        golden_llama(inputs_embeds=embeddings)
    layout = visibench.TokenLayout.from_spans(12, visual=[(2, 6)])
    with visibench.prune(golden_llama, DENSE, layout=layout), pytest.raises(InputError, match="12 tokens"):
        golden_llama(inputs_embeds=embeddings)
    with pytest.raises(InputError, match="does not lie"):
        visibench.TokenLayout.from_spans(12, visual=[(2, 13)])
    with pytest.raises(InputError, match="overlaps"):
        visibench.TokenLayout.from_spans(12, visual=[(2, 6), (5, 8)])
