"""Families beyond LLaVA: tiles with newlines, pixel shuffle, windows and positions on three axes."""

import pandas as pd
import pytest
import torch
import visibench
from families import METHODS, ROWS, collate, every_family, every_method, model_of, samples_of
from probes import Probe
from torch.utils.flop_counter import FlopCounterMode
from visibench.errors import InputError
from visibench.evals.compute import flops, prefills
from visibench.evals.compute.timing import greedy
from visibench.models import LoadedModel
from visibench.models.adapters import Adapter
from visibench.models.geometry import synthetic_inputs


def last_logits(model, method, batch):
    if model.config.model_type != "qwen2_5_vl":
        batch = batch | {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    with visibench.prune(model, method) as session:
        return model(**batch).logits[:, -1], session.trace


@every_family
@pytest.mark.parametrize("method", [visibench.load_method(name, keep=1.0) for name in ("random", "fastv")], ids=str)
def test_keeping_everything_is_dense_bit_for_bit(kind, method):
    model, batch = model_of(kind), collate(samples_of(kind))
    dense = model(**batch).logits
    generated = model.generate(**batch, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    with visibench.prune(model, method):
        assert torch.equal(model(**batch).logits, dense)
        assert torch.equal(model.generate(**batch, max_new_tokens=5, min_new_tokens=5, do_sample=False), generated)


@every_family
@every_method
def test_row_of_a_batch_equals_the_row_alone(kind, method):
    model, samples = model_of(kind), samples_of(kind)
    logits, trace = last_logits(model, method, collate(samples))
    for row, sample in enumerate(samples):
        alone, own = last_logits(model, method, sample)
        assert (logits[row] - alone[0]).abs().max() < 1e-5 * logits.abs().max()
        assert torch.equal(trace.visual_counts()[row], own.visual_counts()[0])
        assert torch.equal(trace.attention_pairs()[row], own.attention_pairs()[0])
        assert torch.equal(trace.scoring_macs()[row], own.scoring_macs()[0])


@every_family
@every_method
def test_generation_of_a_batch_equals_each_row_alone(kind, method):
    model, samples = model_of(kind), samples_of(kind)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with visibench.prune(model, method):
        together = model.generate(**collate(samples), **options)
        for row, sample in enumerate(samples):
            assert together[row, -6:].tolist() == model.generate(**sample, **options)[0, -6:].tolist()


@every_family
@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_cut_in_front_of_layer_0_equals_the_dense_model_on_the_shorter_sequence(kind, positions):
    """Positions that stay keep all their axes; renumbered ones count alike on every axis."""
    model, sample = model_of(kind), samples_of(kind)[0]
    seen = {}
    hook = model.model.language_model.register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
    model(**sample)
    hook.remove()
    pruned, trace = last_logits(model, Probe(layer=0, positions=positions), sample)
    is_visual = sample["input_ids"][0] == 63
    keep = ~is_visual | (is_visual.cumsum(0) % 2 == 0)
    assert trace.kept(0)[0].nonzero().flatten().tolist() == list(range(1, int(is_visual.sum()), 2))
    place = seen["position_ids"]
    place = torch.arange(len(keep))[None] if place is None else place[-3:] if place.ndim == 3 else place
    if positions == "renumber":
        place = (keep.cumsum(0) - 1).expand_as(place)
    dense = model.model.language_model(inputs_embeds=seen["inputs_embeds"][:, keep], position_ids=place[..., keep])
    torch.testing.assert_close(pruned, model.lm_head(dense.last_hidden_state)[:, -1], atol=1e-4, rtol=1e-5)


def test_positions_have_three_axes_in_qwen():
    model, sample = model_of("qwen2_5_vl"), samples_of("qwen2_5_vl")[0]
    places, tables, decoder = [], [], model.model.language_model
    note = lambda m, a, k: places.append((k["position_ids"] if "position_ids" in k else a[1])[-3:])  # noqa: E731
    hook = decoder.rotary_emb.register_forward_pre_hook(note, with_kwargs=True)
    with visibench.prune(model, visibench.load_method("fastv", keep=0.5)) as session:
        see = lambda m, a, k: tables.append(k["position_embeddings"])  # noqa: E731
        seen = decoder.layers[3].register_forward_pre_hook(see, with_kwargs=True)
        cache = model(**sample, use_cache=True).past_key_values
        (before,) = (place.movedim(0, -1) for place in places)
        assert before.shape == (1, 29, 3)
        # 4 text tokens, an image of 4 × 5 tokens, 5 text tokens that go on behind the largest position.
        rows, columns = torch.arange(4).repeat_interleave(5) + 4, torch.arange(5).repeat(4) + 4
        assert before[0, 4:24].tolist() == torch.stack([torch.full_like(rows, 4), rows, columns], 1).tolist()
        assert before[0, -1].tolist() == [13] * 3
        kept = session.trace.kept(3)[0].nonzero().flatten() + 4
        left = before[0, torch.cat([torch.arange(4), kept, torch.arange(24, 29)])].T[:, None]
        assert left.shape == (3, 1, 19)
        for table, own in zip(tables[0], decoder.rotary_emb(torch.zeros(1), position_ids=left), strict=True):
            assert torch.equal(table, own)
        model(input_ids=torch.tensor([[7]]), past_key_values=cache)
        assert places[-1].tolist() == [[[14]]] * 3
    hook.remove()
    seen.remove()


@every_family
@pytest.mark.parametrize("method", METHODS[:3], ids=str)
def test_compute_equals_that_of_torchs_counter(kind, method):
    """Eager attention, whose products the counter sees."""
    model = model_of(kind, "eager")
    for sample in samples_of(kind):
        with visibench.prune(model, method) as session, FlopCounterMode(display=False) as counter:
            model(**sample)
        closed = flops.executed(session.trace, session.geometry, logits=None)
        # Some versions of transformers make the rotary table by a product, which is none of the layers' work.
        rotary = [sum(ops.values()) for name, ops in counter.get_flop_counts().items() if name.endswith("rotary_emb")]
        assert closed.total()[0] == (counter.get_total_flops() - sum(rotary)) / 2


@every_family
def test_compute_of_a_batch_is_that_of_its_rows(kind):
    model, samples = model_of(kind), samples_of(kind)
    alone = []
    for sample in samples:
        _, trace = last_logits(model, METHODS[0], sample)
        alone.append(flops.executed(trace, Adapter(model).geometry).total()[0])
    _, trace = last_logits(model, METHODS[0], collate(samples))
    assert sum(flops.executed(trace, Adapter(model).geometry).total()) == pytest.approx(sum(alone), rel=1e-12)


@every_family
def test_one_tile_or_frame_costs_what_a_whole_image_does(kind):
    vision = Adapter(model_of(kind)).geometry.vision
    side = round(vision.patches**0.5)
    if kind != "qwen2_5_vl":
        assert flops.grid_macs(vision, (1, side, side)) == flops.vision_tower_macs(vision)
    assert flops.grid_macs(vision, (2, 8, 12)) == 2 * flops.grid_macs(vision, (1, 8, 12))


def test_pixel_shuffled_features_can_be_chosen_behind_the_projector():
    model, samples = model_of("internvl"), samples_of("internvl")
    method = visibench.load_method("divprune", tokens=5)
    logits, trace = last_logits(model, method, collate(samples))
    assert trace.visual_counts()[:, 0].tolist() == [5, 15, 0, 10]
    for row, sample in enumerate(samples):
        alone, _ = last_logits(model, method, sample)
        assert (logits[row] - alone[0]).abs().max() < 1e-5 * logits.abs().max()


@every_family
def test_greedy_decoding_equals_generate(kind):
    model, sample = model_of(kind), samples_of(kind)[0]
    for method in METHODS[:4]:
        tokens = []
        with visibench.prune(model, method):
            greedy(model, sample, 5, lambda output, found=tokens: found.append(output.logits[0, -1].argmax()))
            generated = model.generate(**sample, max_new_tokens=5, do_sample=False, eos_token_id=[])
        assert torch.stack(tokens).tolist() == generated[0, -5:].tolist()


@pytest.mark.parametrize(("kind", "visual"), [("llava_next", 80), ("internvl", 20)])
def test_images_that_no_family_member_has_are_named(kind, visual):
    with pytest.raises(InputError, match="52, 56, 88" if kind == "llava_next" else "multiple"):
        synthetic_inputs(Adapter(model_of(kind)), 1, 4, visual)


def _tower(n, d, inner, blocks):
    """MACs of ``blocks`` plain vision blocks on ``n`` tokens."""
    return blocks * (n * (4 * d**2 + 2 * d * inner) + 2 * n**2 * d)


@pytest.mark.parametrize(
    ("name", "tokens", "macs"),
    [
        # 5 tiles of 576 patches and CLS.
        ("llava-next-7b", 2928, 5 * (_tower(577, 1024, 4096, 24) + 576 * 588 * 1024)),
        # Pixel shuffle: 1024 patches and CLS make 256 tokens.
        ("internvl3-8b", 256, _tower(1025, 1024, 4096, 24) + 1024 * 588 * 1024),
        # 36 × 36 patches; gated FFN; 28 blocks with windows of 8 and a rest of 4, 4 that see everything.
        (
            "qwen2.5-vl-7b",
            324,
            1296 * (1176 * 1280 + 32 * (4 * 1280**2 + 3 * 1280 * 3420))
            + 2 * 1280 * (28 * (4 * 8**2 + 4**2) ** 2 + 4 * 1296**2),
        ),
    ],
)
def test_tower_of_published_sizes_by_hand(name, tokens, macs):
    adapter = visibench.load_model(name, weights="meta").adapter
    vision, inputs = adapter.geometry.vision, synthetic_inputs(adapter, 1, 4, tokens)
    assert inputs["input_ids"].shape == (1, tokens + 4)
    tiles = inputs["pixel_values"].shape[1] if "image_sizes" in inputs else 1
    side = round(vision.patches**0.5) if vision.tokens else 36
    assert tiles * flops.grid_macs(vision, (1, side, side)) == macs


@every_family
@pytest.mark.parametrize("method", METHODS[:2], ids=str)
def test_a_plan_equals_the_prefill_that_runs(kind, method):
    """What the vision side computes, too: of tiles, of images of any shape, and of windows inside."""
    loaded = LoadedModel(kind, model_of(kind), None, "random")
    for text, visual in ROWS[kind]:
        planned = prefills.planned(loaded, method, text, visual)
        ran = prefills.prefills(loaded, method, [loaded.synthetic_inputs(1, text, visual)])
        pd.testing.assert_frame_equal(planned, ran)
