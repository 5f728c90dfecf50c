"""Rows of different lengths lie one behind the other: a batch runs what its rows need, and each gets its answer."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import visibench
from torch.nn.functional import scaled_dot_product_attention
from visibench.engine.attention import by_row
from visibench.engine.packing import Packing
from visibench.evals.compute import flops
from visibench.evals.invariants.miniature import collate, make_batch
from visibench.evals.settings.method_spec import parse

ADAPTIVE = "visipruner:layers=scaled,layer_threshold=0.9,token_threshold=3,exit_threshold=0.9"
UNEVEN = [(5, 9, 1), (3, 14, 1), (7, 4, 1), (6, 9, 0)]
EVEN = [(5, 9, 1)] * 4


def tokens_by_layer(model, method, batch):
    """Tokens that each MLP is given, and the shape of the first axes."""
    seen = []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[:2])))
        for layer in model.model.language_model.layers
    ]
    with torch.no_grad(), visibench.prune(model, method) as session:
        output = model(**batch, use_cache=True)
    for hook in hooks:
        hook.remove()
    return seen, output, session


@pytest.mark.parametrize(
    ("text", "rows"), [(ADAPTIVE, UNEVEN), ("pyramiddrop:layers=scaled", EVEN), ("divprune:keep=0.5", UNEVEN)]
)
def test_layers_get_the_tokens_of_all_rows_and_no_more(llava, text, rows):
    samples, method = make_batch(rows), parse(text)
    seen, output, session = tokens_by_layer(llava, method, collate(samples))
    alone = [tokens_by_layer(llava, method, sample) for sample in samples]
    needed = [sum(count for _, count in layer) for layer in zip(*(seen for seen, *_ in alone), strict=True)]
    assert [batch * count for batch, count in seen] == needed
    lengths = session.trace.kv_lengths()
    for (batch, _), of_rows in zip(seen, lengths.T.tolist(), strict=True):
        assert batch == (4 if len({*of_rows}) == 1 else 1), "even rows run as the model would run them"
    for row, (_, single, _) in enumerate(alone):
        torch.testing.assert_close(output.logits[row, -1], single.logits[0, -1], atol=1e-4, rtol=1e-4)
    together, each = (count(session.trace, session.geometry) for count in (flops.executed_by_batch, flops.executed))
    assert together.ffn.sum() == each.ffn.sum()
    assert together.projections.sum() == each.projections.sum()


def test_a_batch_of_a_method_that_reads_nothing_runs_the_sum_of_its_rows(llava):
    """Attention too; FlopCounter holds the closed form for every method (evals/invariants/counters.py)."""
    _, _, session = tokens_by_layer(llava, parse("divprune:keep=0.5"), collate(make_batch(UNEVEN)))
    together, each = (count(session.trace, session.geometry) for count in (flops.executed_by_batch, flops.executed))
    assert together.attention.sum() == each.attention.sum()


def test_the_cache_is_laid_out_by_row(llava):
    samples, method = make_batch(UNEVEN), parse(ADAPTIVE)
    _, output, session = tokens_by_layer(llava, method, collate(samples))
    widths = session.trace.kv_lengths().amax(0).tolist()
    assert [tuple(layer.keys.shape[::2]) for layer in output.past_key_values.layers] == [(4, n) for n in widths]


def test_hidden_states_that_are_asked_for_come_by_row(llava):
    samples, method = make_batch(UNEVEN), parse("pyramiddrop:layers=scaled")
    with torch.no_grad(), visibench.prune(llava, method) as session:
        states = llava(**collate(samples), output_hidden_states=True).hidden_states
        alone = [llava(**sample, output_hidden_states=True).hidden_states for sample in samples]
    assert session.trace.layouts[0].rows == 1
    for layer, state in enumerate(states):
        for row, single in enumerate(alone):
            torch.testing.assert_close(state[row, -1], single[layer][0, -1], atol=1e-4, rtol=1e-4)


def test_a_method_that_keeps_everything_pads_like_the_dense_model(llava):
    seen, *_ = tokens_by_layer(llava, parse("none"), collate(make_batch(UNEVEN)))
    assert {*seen} == {(4, 33)}


@pytest.mark.parametrize("dim", [1, 2])
def test_there_and_back(dim):
    packing = Packing((2, 5, 1), 6, torch.device("cpu"))
    padded = torch.randn(3, 6, 4, 7).transpose(1, dim)
    packed = packing.pack(padded, dim)
    assert packed.shape[0] == 1
    assert packed.shape[dim] == 8
    back = packing.spread(packed, dim)
    for row, length in enumerate(packing.lengths):
        own, other = (tensor[row].movedim(dim - 1, 0)[6 - length :] for tensor in (padded, back))
        assert torch.equal(own, other)


def test_flash_attention_is_told_where_rows_end():
    packing = Packing((2, 5, 1), 6, torch.device("cpu"))
    query, key, value = torch.randn(3, 1, 4, 8, 16)
    calls = []

    def varlen(module, query, key, value, mask, *, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, scaling):
        """What the flash kernel of transformers makes of rows that lie one behind the other."""
        calls.append((mask, max_length_q, max_length_k))
        assert torch.equal(cu_seq_lens_q, cu_seq_lens_k)
        assert cu_seq_lens_q.dtype == torch.int32
        ends, rows = cu_seq_lens_q.tolist(), []
        for first, end in pairwise(ends):
            own = (part[:, :, first:end] for part in (query, key, value))
            rows.append(scaled_dot_product_attention(*own, is_causal=True, scale=scaling).transpose(1, 2))
        return torch.cat(rows, dim=1), None

    def sdpa(module, query, key, value, mask, *, scaling):
        causal = mask is None
        return scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scaling).transpose(
            1, 2
        ), None

    def attend(implementation, kernel, mask=None):
        module = SimpleNamespace(config=SimpleNamespace(_attn_implementation=implementation))
        return by_row(packing, kernel, module, query, key, value, mask, scaling=0.25)[0]

    right = attend("sdpa", sdpa)
    visible = torch.ones(6, 6, dtype=torch.bool).tril()
    torch.testing.assert_close(attend("sdpa", sdpa, visible.expand(3, 1, 6, 6)), right)
    torch.testing.assert_close(attend("flash_attention_2", varlen), right)
    assert calls == [(None, 5, 5)]
