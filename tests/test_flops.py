"""Closed-form compute against two independent counters of the forward that really ran."""

import pytest
import torch
import visibench
from probes import MergeProbe, Probe, VisionProbe
from support import collate, make_batch, make_llava
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from visibench.evals import flops

ROWS = [(5, 9, 1), (3, 12, 2), (4, 6, 0)]
METHODS = [
    visibench.load_method("none"),
    visibench.load_method("random", tokens=5),
    visibench.load_method("fastv", tokens=4),
    visibench.load_method("visipruner", shallow_layers=2),
    visibench.load_method("visipruner", shallow_layers=2, layer_threshold=0.9, token_threshold=3.0),
    visibench.load_method("visipruner", shallow_layers=3, layer0="13b"),
    visibench.load_method("visipruner", shallow_layers=3, visual_self_attention=False),
    visibench.load_method("visipruner", shallow_layers=2, skip=True),
    visibench.load_method("visipruner", shallow_layers=2, skip=True, layer0="13b"),
    visibench.load_method("visipruner", shallow_layers=2, skip=True, visual_self_attention=False),
    visibench.load_method("pyramiddrop", cuts=(2, 4, 7)),
    visibench.load_method("pyramiddrop", layers="scaled", scorer="stage"),
    visibench.load_method("dart", tokens=17),
    visibench.load_method("dart", keep=0.6, text_pivots=20),
    visibench.load_method("fitprune", deletions=(0, 3, 0, 4, 4, 0, 1, 9)),
    visibench.load_method("fitprune", deletions=(0, 3, 0, 4, 4, 0, 1, 9), out_of=24),
    visibench.load_method("sparsevlm", counts=(9, 5, 2), after=(0, 2, 6)),
    visibench.load_method("sparsevlm", tokens=192, out_of=576, layers="scaled", cluster_size=2),
    visibench.load_method("vtw", layer=5),
    visibench.load_method("divprune", tokens=6),
    visibench.load_method("fastervlm", tokens=5),
    visibench.load_method("visionzip", tokens=8),
    visibench.load_method("visionzip", tokens=7, contextual=3, merge="mean"),
    visibench.load_method("vispruner", tokens=6),
    visibench.load_method("vispruner", tokens=6, important=1.0),
    visibench.load_method("prumerge"),
    visibench.load_method("prumerge_plus", tokens=9),
    visibench.load_method("cdpruner", tokens=6, condition="none"),
    visibench.load_method("tome", tokens=5),
    visibench.load_method("tome", tokens=7, proportional=False),
    visibench.load_method("pooling", tokens=6),
    visibench.load_method("downsample", tokens=6),
    Probe(layer=4),
    MergeProbe(positions="renumber"),
    VisionProbe(),
    VisionProbe(merge=True, positions="renumber"),
]
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *args, out_shape=None, **kwargs: (
        sdpa_flop_count(q, k, v)
    )
}
# Operators that multiply nothing by a matrix: listed, so that a new one that does cannot hide among them.
ELEMENTWISE = """
__and__ __or__ __rshift__ __xor__ _upsample_bicubic2d_aa abs add amax amin any argmax argmin argsort
bitwise_not clamp clamp_min cos cosine_similarity cumsum diagonal div embedding empty_like eq exp expand_as
eye fill_ floor full_like gather ge gelu gt index index_put_ isfinite le linalg_vector_norm log logical_not lt
masked_fill masked_scatter max mean min minimum mul ne neg new_ones new_zeros norm ones_like pad pow quantile
repeat_interleave rsqrt rsub scatter scatter_ scatter_add sigmoid silu sin softmax sort sqrt square sub sum
topk upsample_bicubic2d where zeros_like
""".split()


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_fvcore_agrees_within_one_per_cent(llava, method, row):
    (sample,) = make_batch([row])
    with visibench.prune(llava, method) as session:
        count, uncounted = flops.counted(llava, sample)
        closed = flops.executed(session.trace, session.geometry, logits=None)
    assert closed.total()[0] == pytest.approx(count, rel=0.01)
    assert {name.removeprefix("aten::") for name in uncounted} <= set(ELEMENTWISE)


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_torch_flop_counter_agrees_for_grouped_heads(method, kv_heads):
    """torch counts what was dispatched, each multiply-add as 2, but not the fused CPU kernel."""
    model = make_llava(kv_heads=kv_heads, attention="eager")
    (sample,) = make_batch(ROWS[:1])
    with (
        visibench.prune(model, method) as session,
        FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter,
    ):
        model(**sample)
    closed = flops.executed(session.trace, session.geometry, logits=None)
    assert closed.total()[0] == counter.get_total_flops() / 2


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_torch_flop_counter_agrees_on_generation(method):
    """Five new tokens with grouped heads: the prefill gives the first, four steps the others."""
    model = make_llava(kv_heads=2, attention="eager")
    (sample,) = make_batch(ROWS[:1])
    with (
        visibench.prune(model, method) as session,
        FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter,
    ):
        model.generate(**sample, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    prefill = flops.executed(session.trace, session.geometry).total()[0]
    steps = flops.decode(session.trace, session.geometry, 4).total()[0]
    assert prefill + steps == counter.get_total_flops() / 2


def test_decoding_steps_add_up_and_see_each_layers_own_cache(llava):
    """Two rows, 2 layers of 30 and 15 keys and 8 of 18 and 15; d 48, 4 heads of 12."""
    batch = collate(make_batch([(5, 9, 1), (6, 9, 0)]))
    with visibench.prune(llava, visibench.load_method("fastv", tokens=4)) as session:
        llava(**batch)
    each = [flops.decode(session.trace, session.geometry, n) for n in range(4)]
    assert each[1].attention.tolist() == [(2 * 31 + 8 * 19) * 2 * 48, 10 * 16 * 2 * 48]
    assert (each[3].attention - each[2].attention).tolist() == [(2 * 33 + 8 * 21) * 2 * 48, 10 * 18 * 2 * 48]
    assert each[0].total() == [0, 0]
    ragged = flops.decode(session.trace, session.geometry, [3, 1])
    assert ragged.total() == [each[3].total()[0], each[1].total()[1]]


def test_sample_figures_do_not_depend_on_the_batch(llava):
    samples = make_batch(ROWS)
    for method in METHODS:
        with visibench.prune(llava, method) as session:
            llava(**collate(samples))
            together = flops.executed(session.trace, session.geometry).total()
            for row, sample in enumerate(samples):
                llava(**sample)
                assert flops.executed(session.trace, session.geometry).total()[0] == together[row]


def test_components_by_hand(llava):
    """One image of 16 patches, 14 text tokens, d 48, m 64, 4 heads of 12, 2 kv heads, 10 layers; 4 kept from 2 on."""
    (sample,) = make_batch([(5, 9, 1)])
    with visibench.prune(llava, visibench.load_method("fastv", tokens=4)) as session:
        llava(**sample)
    parts = flops.executed(session.trace, session.geometry).components()
    tokens, pairs = 2 * 30 + 8 * 18, 2 * 30**2 + 8 * 18**2
    assert parts["projections"] == [tokens * (2 * 48 * 48 + 2 * 48 * 24)]
    assert parts["ffn"] == [tokens * 3 * 48 * 64]
    assert parts["attention"] == [pairs * 2 * 48]
    assert parts["scoring"] == [30 * 48]
    assert parts["lm_head"] == [48 * 64]
    assert parts["projector"] == [16 * (32 * 48 + 48 * 48)]
    block = 4 * 17 * 32 * 32 + 2 * 17 * 17 * 32 + 2 * 17 * 32 * 48
    assert parts["vision_tower"] == [16 * 3 * 36 * 32 + 3 * block]


def test_dropping_features_saves_projector_work(llava):
    (sample,) = make_batch([(5, 9, 2)])
    with visibench.prune(llava, VisionProbe(merge=True, positions="renumber")) as session:
        llava(**sample)
    assert flops.executed(session.trace, session.geometry).projector.tolist() == [2 * 9 * (32 * 48 + 48 * 48)]
