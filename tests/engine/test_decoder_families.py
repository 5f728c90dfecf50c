"""Every family under methods that act in the decoder, against the dense model and the model's own layers."""

from itertools import product

import pytest
import torch
import visibench
from by_hand import by_hand, check_cuts, given_densely, last_state, with_one_added, with_some_aside
from decoders import CONFIGS, IMAGE, KINDS, decoder_model, row_samples
from families import METHODS, collate, make_traceable
from probes import AsideProbe, MergeProbe
from torch.utils.flop_counter import FlopCounterMode
from visibench.engine.vision.features import FeatureStore
from visibench.errors import UnsupportedModelError
from visibench.evals.compute import flops
from visibench.evals.settings.method_spec import parse
from visibench.models.adapters import Adapter

GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "suppress_tokens": [IMAGE]}
METHODS_HERE = [
    pytest.param(method, marks=[] if str(method) == "fastv:keep=0.4" else pytest.mark.slow) for method in METHODS
]
# The counter does not see VisiPruner's fused attention over parts of a layer; tests/evals/test_flops.py does.
COUNTED = [method for method in METHODS_HERE if method.values[0].name != "visipruner"]
every_kind = pytest.mark.parametrize("kind", KINDS)
every_method = pytest.mark.parametrize("method", METHODS_HERE, ids=str)


@pytest.fixture(autouse=True, scope="module")
def _no_gradients():
    with torch.no_grad():
        yield


@every_kind
def test_keeping_everything_is_dense_bit_for_bit(kind):
    model, batch = decoder_model(kind), collate(row_samples(kind))
    dense, generated = model(**batch).logits, model.generate(**batch, **GREEDY)
    hooks = [len(module._forward_pre_hooks | module._forward_hooks) for module in model.modules()]
    with visibench.prune(model, visibench.load_method("fastv", keep=1.0)):
        assert torch.equal(model(**batch).logits, dense)
        assert torch.equal(model.generate(**batch, **GREEDY), generated)
    assert torch.equal(model(**batch).logits, dense)
    assert [len(module._forward_pre_hooks | module._forward_hooks) for module in model.modules()] == hooks


# ---- the model's own layers on gathered inputs --------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_a_cut_equals_the_models_own_layers_on_gathered_inputs(kind, positions):
    inputs = row_samples(kind)[1]  # two images, or one in tiles
    check_cuts(decoder_model(kind), inputs, inputs["input_ids"][0] == IMAGE, positions)


@every_kind
def test_tokens_held_aside_equal_the_models_own_layers_that_they_pass_by(kind):
    model, inputs = decoder_model(kind), row_samples(kind)[1]
    given, visual = given_densely(model, inputs), inputs["input_ids"][0] == IMAGE
    state, trace = last_state(model, AsideProbe(layer=1, back=3), inputs)
    keep = torch.ones_like(visual)
    keep[visual] = trace.kept(1)[0]
    assert 0 < keep[visual].sum() < visual.sum() == trace.kept(3).sum()
    own = with_some_aside(model, given, (1, 3), keep, visual)
    torch.testing.assert_close(state, own, atol=2e-5, rtol=1e-4)


@every_kind
def test_a_token_that_a_merge_adds_goes_through_the_models_own_layers(kind):
    """In the place of the last visual token: it sees what that sees, and is seen where that is."""
    model, inputs = decoder_model(kind), row_samples(kind)[1]
    given, visual = given_densely(model, inputs), inputs["input_ids"][0] == IMAGE
    state, trace = last_state(model, MergeProbe(layer=2, positions="renumber"), inputs)
    keep = torch.ones_like(visual)
    keep[visual] = trace.kept(2)[0]
    assert trace.visual_counts()[0, 2] == keep[visual].sum() + 1
    torch.testing.assert_close(state, with_one_added(model, given, 2, keep, visual), atol=2e-5, rtol=1e-4)


# ---- batches, generation, compute ---------------------------------------------------------------------------------


@every_kind
@every_method
def test_a_row_of_a_batch_equals_the_row_alone(kind, method):
    """Left padding, two images, none, images of several shapes."""
    model, samples = decoder_model(kind), row_samples(kind)
    batch = collate(samples)
    if "mm_token_type_ids" not in batch:  # or the model counts padding too
        first = Adapter(model).family.first_position
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0) + first
    states, trace = last_state(model, method, batch)
    for row, sample in enumerate(samples):
        alone, own = last_state(model, method, sample)
        assert (states[row] - alone[0]).abs().max() < 1e-4 * states[row].abs().max()
        assert torch.equal(trace.visual_counts()[row], own.visual_counts()[0])
        assert torch.equal(trace.attention_pairs()[row], own.attention_pairs()[0])


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "glm4v"])
def test_a_row_that_loses_nothing_keeps_its_three_axes_beside_one_that_does(kind):
    method = visibench.load_method("random", tokens=9, layer=1, positions="renumber")
    model, samples = decoder_model(kind), row_samples(kind)
    states, _ = last_state(model, method, collate(samples))
    for row, sample in enumerate(samples):
        torch.testing.assert_close(states[row], last_state(model, method, sample)[0][0], atol=2e-5, rtol=1e-4)


@every_kind
@every_method
def test_generation_equals_each_row_alone_and_that_without_a_cache(kind, method):
    model, samples = decoder_model(kind), row_samples(kind)
    with visibench.prune(model, method):
        together = model.generate(**collate(samples), **GREEDY)[:, -5:]
        for row, sample in enumerate(samples):
            assert together[row].tolist() == model.generate(**sample, **GREEDY)[0, -5:].tolist()
        assert together[0].tolist() == model.generate(**samples[0], **GREEDY, use_cache=False)[0, -5:].tolist()


@every_kind
@pytest.mark.parametrize("method", COUNTED, ids=str)
def test_compute_equals_that_of_torchs_counter(kind, method):
    model = decoder_model(kind)
    for sample in row_samples(kind)[:2]:
        with visibench.prune(model, method) as session, FlopCounterMode(display=False) as counter:
            model(**sample)
        # A rotary table made by a product is none of the layers' work.
        rotary = [sum(ops.values()) for name, ops in counter.get_flop_counts().items() if name.endswith("rotary_emb")]
        closed = flops.executed(session.trace, session.geometry, logits=None)
        assert closed.total()[0] == (counter.get_total_flops() - sum(rotary)) / 2


@every_kind
def test_a_batch_executes_what_its_rows_need_by_torchs_counter(kind):
    """Left padding, two images, none: the decoder's layers run the sum of the rows, from the first cut on."""
    model, samples = decoder_model(kind), row_samples(kind)
    method = visibench.load_method("random", keep=0.5, layer=0)  # which asks for no attention
    with visibench.prune(model, method) as session, FlopCounterMode(display=False) as counter:
        model(**collate(samples), logits_to_keep=1)
    rotary = [sum(ops.values()) for name, ops in counter.get_flop_counts().items() if name.endswith("rotary_emb")]
    together, each = (count(session.trace, session.geometry) for count in (flops.executed_by_batch, flops.executed))
    assert together.total()[0] == (counter.get_total_flops() - sum(rotary)) / 2
    for part in ("projections", "ffn", "attention"):
        assert getattr(together, part).sum() == getattr(each, part).sum()


@pytest.mark.slow
@every_kind
def test_sharing_features_changes_nothing(kind):
    """Each image goes through the tower alone, with what of the batch's arguments is its own."""
    model, batch, store = decoder_model(kind), collate(row_samples(kind)), FeatureStore(2**30)

    def state(features):
        with visibench.prune(model, visibench.load_method("fastv", keep=0.4), features=features):
            return model(**batch).logits[:, -1]

    off, plain = state(FeatureStore(0)), state(None)
    assert torch.equal(state(store), off)
    assert torch.equal(state(store), off)
    assert (off - plain).abs().max() < 1e-4 * plain.abs().max()


# ---- other towers of LLaVA ----------------------------------------------------------------------------------------

IMAGES = ["divprune:keep=0.4,positions=keep", "cdpruner:keep=0.4,condition=none"]
VISION = ["fastervlm:keep=0.5", "visionzip:keep=0.6,contextual=2", "holov:keep=0.5,runs=4"]
VISION += ["tome:tokens=6", "flowcut:tokens=6"]
VARIANTS = [*product(["llava+cls", "llava+pixtral", "llava+blocks"], IMAGES), *product(["llava+blocks"], VISION)]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "text"), VARIANTS)
def test_methods_in_front_of_the_decoder_on_other_towers_of_llava(kind, text):
    """CLS among the tokens, Pixtral's images of any shape, features of several blocks."""
    method, model = parse(text), decoder_model(kind)
    test_a_row_of_a_batch_equals_the_row_alone(kind, method)
    test_generation_equals_each_row_alone_and_that_without_a_cache(kind, method)
    test_compute_equals_that_of_torchs_counter(kind, method)
    if method.positions == "keep":
        inputs = row_samples(kind)[1]
        given, visual = given_densely(model, inputs), inputs["input_ids"][0] == IMAGE
        state, trace = last_state(model, method, inputs)
        keep = torch.ones_like(visual)
        keep[visual] = trace.kept(0)[0]
        own = by_hand(model, given, 0, keep, visual, "keep")
        torch.testing.assert_close(state, own, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("kind", "tower"), [("llava+cls", "clip_vision_model"), ("llava+pixtral", "pixtral")])
@pytest.mark.parametrize("name", ["fastervlm", "pooling", "tome", "holov"])
def test_methods_of_the_vision_side_are_refused_with_the_tower_by_name(kind, tower, name):
    with pytest.raises(UnsupportedModelError, match=f"'llava' with tower {tower!r} under the strategy 'full'"):
        visibench.prune(decoder_model(kind), visibench.load_method(name, tokens=9))


def test_pixtrals_images_without_sizes_are_as_large_as_their_tensor():
    model, inputs = decoder_model("llava+pixtral"), row_samples("llava+pixtral")[0]
    height, width = inputs["pixel_values"].shape[-2:]
    assert inputs["image_sizes"].tolist() == [[height, width]]
    method = visibench.load_method("divprune", keep=0.5)
    given, got = (last_state(model, method, each)[0] for each in (inputs, without(inputs, "image_sizes")))
    assert torch.equal(given, got)


def without(inputs, name):
    return {key: value for key, value in inputs.items() if key != name}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_compute_is_within_one_percent_of_fvcores_count(kind, method, monkeypatch):
    make_traceable(monkeypatch)
    model, inputs = decoder_model(kind), row_samples(kind)[1]
    with visibench.prune(model, method) as session:
        count, _ = flops.counted(model, inputs)
        (closed,) = flops.executed(session.trace, session.geometry, logits=None).total()
    assert closed == pytest.approx(count, rel=0.01)
