"""Closed-form compute against two independent counters of the forward that really ran."""

import pytest
import torch
import visibench
from cases import CASES, REGISTERED
from probes import VisionProbe
from support import collate, make_batch, make_llava
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from visibench.evals.compute import flops

CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *args, out_shape=None, **kwargs: (
        sdpa_flop_count(q, k, v)
    )
}
# Operators that multiply nothing by a matrix: listed, so that a new one that does cannot hide among them. Only the
# singular values behind SparseVLM's rank are work that neither counter knows.
ELEMENTWISE = """
__and__ __or__ __rshift__ __xor__ _upsample_bicubic2d_aa abs add amax amin any argmax argmin argsort bitwise_not
clamp clamp_min cos cosine_similarity cumsum diagonal div embedding empty_like eq exp expand_as eye fill_ floor
full_like gather ge gelu gt index index_put_ isfinite le linalg_svdvals linalg_vector_norm log logical_not lt
masked_fill masked_scatter max maximum mean min minimum mul ne neg new_ones new_zeros norm ones_like pad pow
quantile reciprocal repeat_interleave rsqrt rsub scatter scatter_ scatter_add sigmoid silu sin softmax sort sqrt
square sub sum topk upsample_bicubic2d where zeros_like
""".split()


@pytest.mark.parametrize("method", REGISTERED, ids=str)
def test_fvcore_agrees_within_one_per_cent(llava, method):
    """A trace leaves out what nothing uses: scores of a layer behind which no token leaves. It did run, so it may."""
    (sample,) = make_batch([(3, 12, 2)])
    with visibench.prune(llava, method) as session:
        count, uncounted = flops.counted(llava, sample)
        closed = flops.executed(session.trace, session.geometry, logits=None)
    (total,), stays = closed.total(), session.trace.visual_counts().diff(dim=1) == 0
    unused = session.trace.scoring_macs()[:, :-1][stays].sum()
    assert total - unused <= 1.01 * count
    assert total >= 0.99 * count
    assert {name.removeprefix("aten::") for name in uncounted} <= set(ELEMENTWISE)


@pytest.fixture(scope="module", params=[1, 4])
def grouped(request):
    """Without the fused CPU kernel, which torch's counter does not know."""
    return make_llava(kv_heads=request.param, attention="eager")


@pytest.mark.parametrize("method", CASES, ids=str)
def test_torch_flop_counter_agrees_on_prompt_and_generation(grouped, method):
    """torch counts what was dispatched, each multiply-add as 2. The prefill gives the first token, steps the others."""
    (sample,) = make_batch([(5, 9, 1)])
    with (
        visibench.prune(grouped, method) as session,
        FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter,
    ):
        grouped.generate(**sample, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    prefill = flops.executed(session.trace, session.geometry).total()[0]
    assert prefill + flops.decode(session.trace, session.geometry, 2).total()[0] == counter.get_total_flops() / 2


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


@pytest.fixture(scope="module")
def eager():
    return make_llava(kv_heads=1, attention="eager")


@pytest.mark.parametrize("method", CASES, ids=str)
def test_torch_flop_counter_agrees_on_a_batch_of_uneven_rows(eager, method):
    """What the batch executed, padding included; that of the rows alone is no more, and the same for one row."""
    rows = make_batch([(5, 9, 1), (3, 14, 2), (7, 4, 1), (6, 9, 0)])
    with (
        visibench.prune(eager, method) as session,
        FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter,
    ):
        eager(**collate(rows[:3] if method.name == "probe" else rows), logits_to_keep=1)
    together = flops.executed_by_batch(session.trace, session.geometry).total()[0]
    assert together == counter.get_total_flops() / 2
    assert together > sum(flops.executed(session.trace, session.geometry).total())
    with visibench.prune(eager, method) as session:
        eager(**rows[0])
    alone = flops.executed(session.trace, session.geometry).total()
    assert flops.executed_by_batch(session.trace, session.geometry).total() == alone
