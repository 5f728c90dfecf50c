"""Fewer tokens inside towers of one sequence: Qwen2-VL, Qwen2.5-VL with windows, Qwen3-VL with features from inside."""

import gc
import weakref
from copy import deepcopy
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import sequences
import torch
import visibench
from by_hand import last_state
from decoders import CONFIGS, miniature
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from units import collate, sample_of
from visibench.engine.contract import BlockMerge, Method
from visibench.engine.vision.features import FeatureStore
from visibench.engine.vision.sequence import OneSequence
from visibench.errors import InputError, OptionError, UnsupportedModelError, VisibenchError
from visibench.evals.compute import flops
from visibench.evals.settings.method_spec import parse
from visibench.models.adapters import Adapter

DEEP = {
    "qwen2_vl": {"depth": 6},
    "qwen2_5_vl": {"depth": 6, "fullatt_block_indexes": [1, 4]},
    "qwen3_vl": {"depth": 6, "deepstack_visual_indexes": [1, 3, 5]},
}
TEXTS = [
    "flowcut:tokens=5,query=mean",
    "flowcut:keep=0.3,query=mean",
    "tome:tokens=5",
    "tome:keep=0.4,proportional=false",
]
IMAGES = [[(4, 5)], [(3, 6), (5, 3), (2, 2), (3, 6)], [(1, 7), (2, 8)]]
QUICK = TEXTS[0], TEXTS[2]
every_case = pytest.mark.parametrize(
    ("kind", "text", "number"),
    [
        pytest.param(kind, text, number, marks=[] if text in QUICK and number == 1 else pytest.mark.slow)
        for kind in DEEP
        for text in TEXTS
        for number in range(len(IMAGES))
    ],
)


@cache
def deep(kind, attention="sdpa"):
    """Six blocks that attend sharply, so that FlowCut drops patches in every other one, of each image at its own pace.

    In double precision, since sharp attention makes more of the last bits.
    """
    own = {"vision_config": CONFIGS[kind]["vision_config"] | DEEP[kind]}
    model = miniature(kind, CONFIGS[kind] | own, attention).double()
    with torch.no_grad():
        for block in model.model.visual.blocks:
            block.attn.qkv.weight[: 2 * model.model.visual.config.num_heads * 8] *= 4
    return model


def by_hand(model, method, sample):
    """What each image becomes, (T, D), with what is added behind the first decoder layers."""
    vision, images = Adapter(model).geometry.vision, []
    for picture in sequences.pictures(model, sample):
        tokens = len(picture.hidden) // sequences.PARTS
        if method.name == "flowcut":
            sequences.flowcut(model, picture, int(method.budget(torch.tensor(tokens))))
        else:
            merges = method.merges(replace(vision, tokens=tokens))
            sequences.tome(model, picture, merges, proportional=method.proportional)
        images.append(sequences.projected(model, picture))
    return images


@every_case
@torch.no_grad()
def test_the_decoder_gets_what_each_image_alone_becomes_by_hand(kind, text, number):
    model, method, sample = deep(kind), parse(text), sample_of(kind, 9, IMAGES[number], seed=number)
    images = by_hand(model, method, sample)
    state, trace = last_state(model, method, sample)
    assert trace.visual_counts()[0].unique().tolist() == [sum(len(tokens) for tokens, _ in images)]
    torch.testing.assert_close(state, sequences.last_state(model, sample, images), atol=1e-5, rtol=1e-5)
    assert (state - last_state(model, visibench.load_method("none"), sample)[0]).abs().max() > 1e-3


@pytest.mark.slow
@every_case
@torch.no_grad()
def test_eager_attention_gives_the_same_and_its_compute_is_torchs(kind, text, number):
    model, method, sample = deep(kind, "eager"), parse(text), sample_of(kind, 9, IMAGES[number], seed=number)
    with visibench.prune(model, method) as session, FlopCounterMode(display=False) as counter:
        logits = model(**sample).logits
    closed = flops.executed_by_batch(session.trace, session.geometry, logits=None)
    rotary = [sum(ops.values()) for name, ops in counter.get_flop_counts().items() if name.endswith("rotary_emb")]
    assert closed.total()[0] == (counter.get_total_flops() - sum(rotary)) / 2
    own = flops.executed(session.trace, session.geometry, logits=None)
    for part in ("vision_tower", "projector"):  # nothing is padded but what scores are made of
        assert getattr(own, part).tolist() == getattr(closed, part).tolist()
    with visibench.prune(deep(kind), method):  # eager attention of transformers has its softmax in single precision
        torch.testing.assert_close(deep(kind)(**sample).logits, logits, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", DEEP)
@torch.no_grad()
def test_flowcut_goes_at_the_pace_of_each_image_whatever_lies_beside_it(kind):
    """Two images of one shape and others: in one row, in rows of a batch, and alone."""
    model, method = deep(kind), parse(TEXTS[0])
    samples = [sample_of(kind, 9, IMAGES[1], seed=1), sample_of(kind, 6, [(3, 6)], seed=2), sample_of(kind, 5, [])]
    together, trace = last_state(model, method, collate(samples))
    paces = {tuple(image) for image in trace.tower[:, :, :, 0].flatten(0, 1).tolist() if image[0] == 72}
    assert len(paces) > 1
    for row, sample in enumerate(samples):
        alone, own = last_state(model, method, sample)
        torch.testing.assert_close(together[row], alone[0], atol=1e-5, rtol=1e-5)
        if own.tower is not None:
            assert torch.equal(trace.tower[row, : own.tower.shape[1]], own.tower[0])


@pytest.mark.parametrize("kind", DEEP)
@torch.no_grad()
def test_units_that_lose_nothing_keep_their_tokens_and_positions(kind):
    """A row of one small image beside others is as without a method, in the same batch; nothing is left behind."""
    model, method = deep(kind), parse("tome:tokens=5")
    samples = [sample_of(kind, 9, [(2, 2)], seed=1), sample_of(kind, 6, [(4, 5), (2, 2)], seed=2)]
    with visibench.prune(model, method, features=FeatureStore(2**20)) as session:
        pruned = model(**collate(samples)).logits[:, -1]
    assert session.trace.kept(0).sum(1).tolist() == [4, 4]
    assert session.trace.visual_counts()[:, 0].tolist() == [4, 9]
    dense = model(**collate(samples)).logits[:, -1]
    assert (pruned - dense)[0].abs().max() < 1e-5 * dense.abs().max()
    assert (pruned - dense)[1].abs().max() > 1e-3
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("kind", DEEP)
@torch.no_grad()
def test_an_image_that_would_have_no_token_left_is_refused_by_name(kind):
    model, sample = deep(kind), sample_of(kind, 9, [(2, 2), (4, 5)])
    for text, error, why in (
        ("flowcut:keep=0.2,query=mean", InputError, "flowcut leaves nothing of an image of 4 tokens.*: keep more"),
        ("tome:keep=0.2", OptionError, "tome: .*halve the 4 tokens: the budget must be at least 1 token"),
    ):
        with pytest.raises(error, match=why), visibench.prune(model, parse(text)):
            model(**sample)


@pytest.mark.parametrize("kind", DEEP)
@torch.no_grad()
def test_half_precision_leaves_as_many(kind):
    model, sample = deepcopy(deep(kind)).to(torch.bfloat16), sample_of(kind, 9, [(4, 5), (3, 6)])
    for text, left in {"tome:keep=0.5": 19, "flowcut:tokens=8,query=mean": 16}.items():
        with visibench.prune(model, parse(text)) as session:
            logits = model(**sample).logits
        assert session.trace.visual_counts()[0].unique().tolist() == [left]
        assert logits.dtype == torch.bfloat16
        assert logits.isfinite().all()


@pytest.mark.parametrize("kind", DEEP)
@torch.no_grad()
def test_nothing_of_a_batch_outlives_it_with_the_cyclic_collector_off(kind, monkeypatch):
    model, sample, made = deep(kind), sample_of(kind, 9, [(4, 5), (2, 2)]), []
    monkeypatch.setattr(OneSequence, "laid", noting(OneSequence.laid, made))
    gc.collect()
    gc.disable()
    try:
        for text in ("tome:keep=0.5", "flowcut:keep=0.5,query=mean"):
            with visibench.prune(model, parse(text)):
                model(**sample)
    finally:
        gc.enable()
    assert made
    assert not any(form() for form in made)


def noting(laid, made):
    def noted(form, parts):
        made.append(weakref.ref(form))
        return laid(form, parts)

    return noted


@torch.no_grad()
def test_a_merge_must_say_where_its_tokens_stand():
    class Halves(Method):
        name, hook_points, positions = "halves", ("tower",), "renumber"

        def block(self, view):
            squares = view.token_keys.shape[1]
            group = torch.arange(squares).div(2, rounding_mode="floor").expand(len(view.counts), -1)
            return BlockMerge(group, (squares + 1) // 2) if view.block == 0 else None

    model, wrong = deep("qwen2_vl"), "let a BlockMerge say where its tokens stand"
    with pytest.raises(VisibenchError, match=wrong), visibench.prune(model, Halves()):
        model(**sample_of("qwen2_vl", 9, [(4, 5)]))


def varlen(module, query, key, value, mask, *, cu_seq_lens_q, max_length_q, scaling, **given):
    """What the flash kernel of transformers makes of pieces that lie one behind the other."""
    assert mask is None
    bounds = cu_seq_lens_q.tolist()
    assert max_length_q == max(end - first for first, end in pairwise(bounds)) > 0
    assert bounds[-1] == query.shape[2]
    pieces = [tuple(part[:, :, first:end] for part in (query, key, value)) for first, end in pairwise(bounds)]
    attend = torch.nn.functional.scaled_dot_product_attention
    return torch.cat([attend(*piece, scale=scaling) for piece in pieces], dim=2).transpose(1, 2), None


@pytest.mark.parametrize("kind", DEEP)
@torch.no_grad()
def test_flash_attention_is_told_where_pieces_end_and_takes_no_bias(kind, monkeypatch):
    model, sample = deep(kind), sample_of(kind, 9, [(4, 5), (3, 6), (2, 2)])
    wanted = {}
    for text in ("flowcut:keep=0.4,query=mean", "tome:keep=0.4,proportional=false"):
        with visibench.prune(model, parse(text)):
            wanted[text] = model(**sample).logits
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", varlen)
    monkeypatch.setattr(model.model.visual.config, "_attn_implementation", "flash_attention_2")
    for text, logits in wanted.items():
        with visibench.prune(model, parse(text)):
            torch.testing.assert_close(model(**sample).logits, logits, atol=1e-4, rtol=1e-4)
    refused = pytest.raises(UnsupportedModelError, match=r"tome adds .* flash .*='sdpa'")
    with refused, visibench.prune(model, parse("tome:keep=0.4")):
        model(**sample)
