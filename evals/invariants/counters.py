"""Closed-form compute against two independent counters of the forward that really ran: fvcore's, and torch's own."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ...engine import prune
from ...methods import Method
from ..compute import flops
from ..compute.flops import executed_by_batch as by_batch
from .miniature import collate, make_batch
from .prefills import Bench, hold, same

CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *args, out_shape=None, **kwargs: (
        sdpa_flop_count(q, k, v)
    )
}
# Operators that multiply nothing by a matrix: listed, so that a new one that does cannot hide among them. Only the
# singular values behind SparseVLM's rank are work that neither counter knows.
ELEMENTWISE = """
__and__ __or__ __rshift__ __xor__ _foreach_mul _upsample_bicubic2d_aa abs add add_ addcmul all amax amin any argmax
argmin argsort as_strided bitwise_not bitwise_or clamp clamp_min cos cosine_similarity cumsum diagonal div embedding
empty_like eq exp expand_as eye fill_ flip floor full full_like gather ge gelu gt index index_put_ index_select isfinite
le lerp lift_fresh linalg_svdvals linalg_vector_norm log logical_not lt masked_fill masked_fill_ masked_scatter max
maximum mean min minimum mul ne neg new_empty new_full new_ones new_zeros norm ones_like pad pad_sequence pow quantile
reciprocal repeat_interleave reshape_as rsqrt rsub scatter scatter_ scatter_add sigmoid silu sin slice_scatter softmax
sort sqrt square sub sum take_along_dim tensor_split topk triu unbind unflatten upsample_bicubic2d view_as where
zeros_like
""".split()

UNEVEN: list[tuple[int, ...]] = [(5, 9, 1), (3, 14, 2), (7, 4, 1), (6, 9, 0)]


def fvcore_agrees(bench: Bench, method: Method) -> str:
    """fvcore's count of a prefill is within 1 % of the closed form"""
    # A trace leaves out what nothing uses: scores of a layer behind which no token leaves. It did run, so it may.
    (sample,) = make_batch([(3, 12, 2)])
    with prune(bench.llava, method) as session:
        count, uncounted = flops.counted(bench.llava, sample)
        closed = flops.executed(session.trace, session.geometry, logits=None)
    (total,), stays = closed.total(), session.trace.visual_counts().diff(dim=1) == 0
    unused = float(session.trace.scoring_macs()[:, :-1][stays].sum())
    hold(total - unused <= 1.01 * count, f"{total - unused:g} multiply-adds by the closed form, {count:g} by fvcore")
    hold(total >= 0.99 * count, f"{total:g} multiply-adds by the closed form, {count:g} by fvcore")
    unknown = {name.removeprefix("aten::") for name in uncounted} - set(ELEMENTWISE)
    if not unknown:
        return ""
    return f"not counted: {', '.join(sorted(unknown))}. What of it multiplies matrices is to be told to view.scored()"


def torch_agrees(bench: Bench, method: Method) -> None:
    """torch's count of prompt and generation equals the closed form"""
    # torch counts what was dispatched, each multiply-add as 2. The prefill gives the first token, steps the others.
    # Without the fused CPU kernel, which torch's counter does not know.
    (sample,) = make_batch([(5, 9, 1)])
    for model in bench.grouped:
        with (
            prune(model, method) as session,
            FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter,
        ):
            model.generate(**sample, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        prefill = flops.executed(session.trace, session.geometry).total()[0]
        steps = flops.decode(session.trace, session.geometry, 2).total()[0]
        same(prefill + steps, counter.get_total_flops() / 2, "multiply-adds by the closed form and by torch")


def torch_agrees_on_batches(bench: Bench, method: Method, rows: list[tuple[int, ...]] = UNEVEN) -> None:
    """torch's count of a batch of uneven rows equals the closed form, and layers run what its rows need alone"""
    samples, model = make_batch(rows), bench.grouped[0]
    with (
        prune(model, method) as session,
        FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter,
    ):
        model(**collate(samples), logits_to_keep=1)
    together, each = (count(session.trace, session.geometry) for count in (by_batch, flops.executed))
    same(together.total()[0], counter.get_total_flops() / 2, "multiply-adds by the closed form and by torch")
    for part in () if method.keeps_all(session.trace.prompt, session.geometry) else ("projections", "ffn"):
        one, other = (float(getattr(of, part).sum()) for of in (together, each))
        same(one, other, f"{part} of the batch and of its rows alone")
    hold(together.total()[0] >= sum(each.total()), "the batch cost less than its rows alone")
    with prune(model, method) as session:
        model(**samples[0])
    alone = flops.executed(session.trace, session.geometry).total()
    same(by_batch(session.trace, session.geometry).total(), alone, "multiply-adds of a row and of a batch of it")
