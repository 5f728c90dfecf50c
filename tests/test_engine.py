"""The engine against the dense model, against itself alone, and against sequences cut by hand."""

import pytest
import torch
import visibench
from probes import MergeProbe, Probe, ProjectedProbe, RaggedProbe, VisionProbe
from support import IMAGE, collate, make_batch, make_llava
from transformers import AutoModelForCausalLM, GPT2Config, StaticCache
from visibench.engine import PruningSession, attention
from visibench.errors import InputError, OptionError, UnsupportedModelError, VisibenchError

# (prefix, text, images): different lengths, no image, one and several images.
ROWS = [(5, 9, 1), (3, 12, 2), (4, 6, 0), (2, 20, 1), (1, 10, 3)]
METHODS = [
    visibench.load_method("none"),
    visibench.load_method("random", keep=0.5),
    visibench.load_method("random", tokens=5, layer=3, positions="renumber"),
    visibench.load_method("fastv", tokens=4),
    visibench.load_method("fastv", keep=0.3, layer=4, positions="renumber"),
    visibench.load_method("visipruner", shallow_layers=2),
    visibench.load_method("visipruner", shallow_layers=2, layer_threshold=0.9, token_threshold=3.0, exit_threshold=0.9),
    visibench.load_method("visipruner", shallow_layers=3, layer0="13b", consecutive_exit=True),
    visibench.load_method("visipruner", shallow_layers=3, visual_self_attention=False, sink=7),
    visibench.load_method("visipruner", shallow_layers=2, skip=True),
    visibench.load_method("visipruner", shallow_layers=2, skip=True, layer0="13b"),
    visibench.load_method("visipruner", shallow_layers=2, skip=True, visual_self_attention=False),
    visibench.load_method("pyramiddrop", cuts=(2, 4, 7)),
    visibench.load_method("pyramiddrop", layers="scaled", scorer="stage", positions="keep"),
    visibench.load_method("dart", tokens=17),
    visibench.load_method(
        "dart", keep=0.6, layer=5, order="norm", visual_pivots=2, text_pivots=5, positions="renumber"
    ),
    visibench.load_method("fitprune", deletions=(0, 3, 0, 4, 4, 0, 1, 9)),
    visibench.load_method("fitprune", ratio=60, out_of=576, layers="scaled", positions="renumber"),
    visibench.load_method("sparsevlm", counts=(9, 5, 2), after=(0, 2, 6)),
    visibench.load_method("sparsevlm", tokens=192, out_of=576, layers="scaled", cluster_size=2, merge="sum"),
    visibench.load_method("sparsevlm", counts=(9, 5), after=(2, 6), recycle=0, positions="keep"),
    visibench.load_method("sparsevlm", rank="release", scale=1.5, after=(1, 4), cluster_size=1),
    visibench.load_method("sparsevlm", rank="paper", scale=0.8, layers="scaled"),
    visibench.load_method("vtw", layer=5),
    visibench.load_method("vtw", layer=0, positions="renumber"),
    visibench.load_method("divprune", tokens=6),
    visibench.load_method("divprune", keep=0.5, positions="keep"),
    visibench.load_method("fastervlm", tokens=5),
    visibench.load_method("visionzip", tokens=8),
    visibench.load_method("visionzip", tokens=7, contextual=3, merge="mean"),
    visibench.load_method("vispruner", keep=0.4),
    visibench.load_method("vispruner", tokens=9, important=0.3, drop=2),
    visibench.load_method("prumerge"),
    visibench.load_method("prumerge", tokens=6, order="spatial", weights="normalised", neighbours=3),
    visibench.load_method("prumerge_plus"),
    visibench.load_method("prumerge_plus", tokens=9),
    visibench.load_method("cdpruner", tokens=6, condition="none"),
    visibench.load_method("tome", tokens=5),
    visibench.load_method("tome", tokens=7, proportional=False),
    visibench.load_method("pooling", tokens=6),
    visibench.load_method("downsample", tokens=6),
    Probe(),
    Probe(positions="renumber", every=3),
    MergeProbe(positions="renumber"),
    VisionProbe(),
    VisionProbe(positions="renumber", merge=True),
    ProjectedProbe(positions="renumber"),
    RaggedProbe(),
    RaggedProbe(positions="renumber"),
]
every_method = pytest.mark.parametrize("method", METHODS, ids=str)


def last_logits(model, method, batch):
    """Positions are counted without padding, as in ``generate``: the norms of rotated keys depend on them."""
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with visibench.prune(model, method) as session:
        return model(**batch, position_ids=positions).logits[:, -1], session.trace


# ---- batches ------------------------------------------------------------------------------------------------------


@every_method
def test_row_of_a_batch_equals_the_row_alone(llava, method):
    samples = make_batch(ROWS)
    logits, trace = last_logits(llava, method, collate(samples))
    scale = logits.abs().max()
    for row, sample in enumerate(samples):
        alone, own = last_logits(llava, method, sample)
        assert (logits[row] - alone[0]).abs().max() < 1e-5 * scale
        assert torch.equal(trace.kv_lengths()[row], own.kv_lengths()[0])
        assert torch.equal(trace.visual_counts()[row], own.visual_counts()[0])
        assert torch.equal(trace.attention_pairs()[row], own.attention_pairs()[0])
        assert torch.equal(trace.scoring_macs()[row], own.scoring_macs()[0])
        for layer in range(10):
            kept, width = trace.kept(layer)[row], own.kept(layer).shape[1]
            assert torch.equal(kept[:width], own.kept(layer)[0])
            assert not kept[width:].any()


@every_method
def test_generation_of_a_batch_equals_each_row_alone(llava, method):
    samples = make_batch(ROWS, seed=1)
    batch = collate(samples)
    with visibench.prune(llava, method):
        together = llava.generate(**batch, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        for row, sample in enumerate(samples):
            alone = llava.generate(**sample, max_new_tokens=6, min_new_tokens=6, do_sample=False)
            assert together[row, -6:].tolist() == alone[0, -6:].tolist()


@pytest.mark.parametrize("how", [{"do_sample": True, "top_k": 5}, {"num_beams": 2, "do_sample": False}], ids=str)
def test_sampling_and_beams_run_on_the_pruned_cache(llava, how):
    samples = make_batch(ROWS[:3], seed=2)
    with visibench.prune(llava, visibench.load_method("fastv", tokens=4)):
        torch.manual_seed(0)
        together = llava.generate(**collate(samples), max_new_tokens=5, min_new_tokens=5, **how)
        assert together.shape[0] == 3
        if "num_beams" in how:
            for row, sample in enumerate(samples):
                alone = llava.generate(**sample, max_new_tokens=5, min_new_tokens=5, **how)
                assert together[row, -5:].tolist() == alone[0, -5:].tolist()


# ---- what a cut is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("kind", [Probe, VisionProbe, ProjectedProbe])
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
    place = torch.arange(len(keep))[None] if positions == "keep" else (keep.cumsum(0) - 1)[None]
    dense = llava(inputs_embeds=embeddings[:, keep], position_ids=place[:, keep]).logits[:, -1]
    torch.testing.assert_close(pruned, dense, atol=1e-4, rtol=1e-5)


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


@pytest.mark.parametrize(
    "method", [visibench.load_method("random", keep=1.0), visibench.load_method("fastv", keep=1.0)]
)
def test_keeping_everything_is_dense_bit_for_bit(llava, method):
    batch = collate(make_batch(ROWS))
    dense = llava(**batch)
    with visibench.prune(llava, method):
        pruned = llava(**batch)
        tokens = llava.generate(**batch, max_new_tokens=5, do_sample=False)
    assert torch.equal(pruned.logits, dense.logits)
    assert torch.equal(tokens, llava.generate(**batch, max_new_tokens=5, do_sample=False))


@every_method
def test_caches_hold_what_the_trace_says(llava, method):
    batch = collate(make_batch(ROWS))
    with visibench.prune(llava, method) as session:
        cache = llava(**batch, use_cache=True).past_key_values
        assert [layer.keys.shape[2] for layer in cache.layers] == session.trace.kv_lengths().amax(0).tolist()
        text = torch.tensor([prefix + text + max(images - 1, 0) for prefix, text, images in ROWS])
        assert torch.equal(session.trace.kv_lengths() - session.trace.visual_counts(), text[:, None].expand(-1, 10))


@every_method
def test_chunk_of_new_tokens_equals_one_at_a_time(llava, method):
    batch = collate(make_batch(ROWS))
    new = torch.tensor([[5, 6, 7]]).expand(len(ROWS), -1)
    with visibench.prune(llava, method):
        cache = llava(**batch, use_cache=True).past_key_values
        mask = batch["attention_mask"]
        for k in range(3):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            places = mask.cumsum(1)[:, -1:] - 1
            single = llava(input_ids=new[:, k : k + 1], attention_mask=mask, position_ids=places, past_key_values=cache)
        cache = llava(**batch, use_cache=True).past_key_values
        places = mask.cumsum(1)[:, -3:] - 1
        chunk = llava(input_ids=new, attention_mask=mask, position_ids=places, past_key_values=cache)
    torch.testing.assert_close(chunk.logits[:, -1], single.logits[:, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", [m for m in METHODS if "attention" in m.stage or m.name == "none"], ids=str)
def test_eager_and_sdpa_agree(method):
    batch = collate(make_batch(ROWS[:3]))
    sdpa, eager = (last_logits(make_llava(attention=name), method, batch)[0] for name in ("sdpa", "eager"))
    torch.testing.assert_close(sdpa, eager, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("method", [m for m in METHODS if m.name in visibench.list_methods()], ids=str)
def test_bfloat16_runs_and_stays_close(method):
    model = make_llava(layers=10)
    batch = collate(make_batch(ROWS))
    model.to(torch.bfloat16)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    logits, trace = last_logits(model, method, batch)
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
    assert trace.kv_lengths().shape == (len(ROWS), 10)


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
    rows = attention.row_weights(query[:, :, 3:], key, torch.arange(3, 9).expand(2, -1), layout.valid, 8**-0.5)
    torch.testing.assert_close(rows, full[:, :, 3:])
    part = attention.subset_attention(query, key, value, layout.text, layout.nonvisual, 8**-0.5)
    seen = causal & layout.nonvisual.mask[:, None]
    masked = logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1).nan_to_num() @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(part[0, :, :3], masked[0, :, 6:])
    torch.testing.assert_close(part[1, :, :4], masked[1, :, 5:])


def test_attention_rows_are_taken_in_blocks_without_an_l_by_l_map(llava, monkeypatch):
    sizes = []
    original = attention.row_weights
    monkeypatch.setattr(attention, "row_weights", lambda q, *a: sizes.append(q.shape[2]) or original(q, *a))
    monkeypatch.setattr(attention, "BLOCK", 4)
    batch = collate(make_batch(ROWS))
    method = visibench.load_method("visipruner", shallow_layers=2)
    blocked, _ = last_logits(llava, method, batch)
    assert max(sizes) == 4
    monkeypatch.setattr(attention, "BLOCK", 128)
    torch.testing.assert_close(blocked, last_logits(llava, method, batch)[0], atol=1e-4, rtol=1e-4)


def test_each_layer_runs_once(llava):
    counts = dict.fromkeys(range(10), 0)
    hooks = [
        layer.register_forward_hook(lambda m, a, o, i=i: counts.__setitem__(i, counts[i] + 1))
        for i, layer in enumerate(llava.model.language_model.layers)
    ]
    for method in METHODS:
        last_logits(llava, method, collate(make_batch(ROWS)))
    for hook in hooks:
        hook.remove()
    assert set(counts.values()) == {len(METHODS)}


def test_at_most_one_host_sync_a_layer(llava):
    for method in METHODS:
        assert last_logits(llava, method, collate(make_batch(ROWS)))[1].host_syncs <= 11


# ---- leaving things as they were ----------------------------------------------------------------------------------


def state(model):
    hooks = [
        (name, len(getattr(module, kind)))
        for name, module in model.named_modules()
        for kind in (
            "_forward_hooks",
            "_forward_pre_hooks",
            "_forward_hooks_with_kwargs",
            "_forward_pre_hooks_with_kwargs",
        )
        if getattr(module, kind)
    ]
    attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
    implementations = [getattr(m, "config", model.config)._attn_implementation for m in model.modules()]
    return hooks, attributes, implementations


@every_method
def test_model_is_as_before_after_the_block_and_after_exceptions(llava, method):
    batch = collate(make_batch(ROWS))
    before, dense = state(llava), llava(**batch).logits
    with visibench.prune(llava, method):
        llava(**batch)
    assert state(llava) == before
    with pytest.raises(ZeroDivisionError), visibench.prune(llava, method):  # noqa: PT012
        llava(**batch)
        raise ZeroDivisionError
    with pytest.raises(InputError), visibench.prune(llava, method):
        llava(**batch, labels=batch["input_ids"])
    assert state(llava) == before
    assert torch.equal(llava(**batch).logits, dense)


def test_failure_while_entering_leaves_nothing_behind(llava):
    before = state(llava)
    llava.model.language_model.config._attn_implementation = "flex_attention"
    try:
        with pytest.raises(UnsupportedModelError, match="sdpa"), visibench.prune(llava, METHODS[3]):
            pass
    finally:
        llava.model.language_model.config._attn_implementation = "sdpa"
    assert state(llava) == before
    last_logits(llava, METHODS[3], collate(make_batch(ROWS)))


# ---- saying no ----------------------------------------------------------------------------------------------------


def test_nested_use_raises(llava):
    with visibench.prune(llava, METHODS[0]), pytest.raises(VisibenchError, match="already being pruned"):
        PruningSession(llava, METHODS[0]).__enter__()


def test_unsupported_models_and_arguments_raise(llava, golden_llama):
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=10))
    with pytest.raises(UnsupportedModelError, match="gpt2"):
        visibench.prune(gpt2, METHODS[0])
    with pytest.raises(UnsupportedModelError, match="pass the full model"):
        visibench.prune(llava.model, METHODS[0])
    with pytest.raises(UnsupportedModelError, match="vision tower"), visibench.prune(golden_llama, VisionProbe()):
        pass
    with pytest.raises(VisibenchError, match="load_method"):
        visibench.prune(llava, "fastv")
    with pytest.raises(OptionError, match="10 layers"):
        visibench.prune(llava, visibench.load_method("fastv", layer=10, keep=0.5))


def test_inputs_that_do_not_fit_raise(llava, golden_llama):
    (sample,) = make_batch([(4, 8, 1)])
    with visibench.prune(llava, METHODS[0]) as session:
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
        old = llava(**sample, use_cache=True).past_key_values
        llava(**sample, use_cache=True)
        with pytest.raises(InputError, match="latest prompt"):
            llava(input_ids=torch.tensor([[5]]), past_key_values=old)
    embeddings = torch.zeros(1, 10, 32)
    with visibench.prune(golden_llama, METHODS[0]), pytest.raises(InputError, match="from_spans"):
        golden_llama(inputs_embeds=embeddings)
    layout = visibench.TokenLayout.from_spans(12, visual=[(2, 6)])
    with visibench.prune(golden_llama, METHODS[0], layout=layout), pytest.raises(InputError, match="12 tokens"):
        golden_llama(inputs_embeds=embeddings)
    with pytest.raises(InputError, match="does not lie"):
        visibench.TokenLayout.from_spans(12, visual=[(2, 13)])
    with pytest.raises(InputError, match="overlaps"):
        visibench.TokenLayout.from_spans(12, visual=[(2, 6), (5, 8)])
