"""Hooks that know whether they ran, calls that cannot be followed, and what is refused before anything runs."""

import copy
import inspect

import pytest
import torch
import visibench
from cases import FASTV, PLAINEST, every_method
from decoders import CONFIGS, decoder_model
from support import IMAGE, make_batch, make_llava
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import QuantizedCache, StaticCache
from transformers.generation.streamers import BaseStreamer
from visibench.errors import InputError, UnsupportedModelError, VisibenchError
from visibench.models.adapters import Adapter

GREEDY = {"do_sample": False, "suppress_tokens": [IMAGE]}


# ---- hooks that must run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [method for method in PLAINEST if "attention" in method.hook_points], ids=str)
def test_another_attention_implementation_inside_the_block_is_noticed(llava, method):
    (sample,) = make_batch([(4, 8, 1)])
    with visibench.prune(llava, method):
        llava.set_attn_implementation("eager")
        try:
            with pytest.raises(VisibenchError, match=f"{method.name} acts in attention: call"):
                llava(**sample)
        finally:
            llava.set_attn_implementation("sdpa")


@pytest.mark.parametrize("name", ["visionzip", "tome"])
def test_another_attention_implementation_of_the_tower_is_noticed(llava, name):
    (sample,) = make_batch([(4, 8, 1)])
    tower = llava.model.vision_tower.config
    with visibench.prune(llava, visibench.load_method(name, keep=0.5)):
        inside, tower._attn_implementation = tower._attn_implementation, "eager"
        with pytest.raises(VisibenchError, match=f"{name} reads the vision tower"):
            llava(**sample)
        tower._attn_implementation = inside


@pytest.mark.parametrize("skipped", ["layer", "attention"])
def test_a_layer_that_is_passed_by_is_noticed(own, skipped):
    """Whatever the cause: a layer whose hook, or whose attention's interception, did not run ends the call."""
    (sample,) = make_batch([(4, 8, 1)])
    layers = own.model.language_model.layers
    with visibench.prune(own, visibench.load_method("fastv", keep=0.5, layer=1)):
        part = layers[2] if skipped == "layer" else layers[2].self_attn
        part.forward, kept = (lambda hidden_states, *_, **__: hidden_states), part.forward
        if skipped == "layer":
            part._call_impl = part.forward  # as if compiled: its hooks are not called
        else:
            part.forward = lambda hidden_states, **__: (hidden_states, None)
        try:
            with pytest.raises(VisibenchError, match=r"layer 3 ran where layer 2|that of layer 2 ran without it"):
                own(**sample)
        finally:
            part.forward = kept
            del part.forward
            vars(part).pop("_call_impl", None)
        assert own(**sample).logits.isfinite().all()


@pytest.mark.parametrize("last", [True, False])
def test_fewer_layers_than_the_model_has_are_noticed(own, last):
    (sample,) = make_batch([(4, 8, 1)])
    config = own.model.language_model.config
    with visibench.prune(own, FASTV):
        own(**sample)
        try:
            config.num_hidden_layers = 5 if last else 1
            with pytest.raises(VisibenchError, match="pruning cannot follow"):
                own(**sample)
        finally:
            config.num_hidden_layers = 6


@pytest.mark.parametrize("part", ["model", "decoder", "layer", "decoder's forward"])
def test_compiled_modules_are_refused_on_entry(part):
    model = make_llava(layers=2)
    decoder = model.model.language_model
    if part == "decoder's forward":
        decoder.forward = torch.compile(decoder.forward, backend="eager")
    elif part == "decoder":
        model.model.language_model = torch.compile(decoder, backend="eager")
    else:
        {"model": model, "layer": decoder.layers[1]}[part].compile(backend="eager")
    with pytest.raises(UnsupportedModelError, match=r"as it was before torch\.compile"):
        visibench.prune(model, visibench.load_method("none")).__enter__()


def test_copies_made_inside_the_block_are_refused(own):
    with visibench.prune(own, FASTV), pytest.raises(VisibenchError, match="copy it outside"):
        copy.deepcopy(own)
    assert copy.deepcopy(own) is not own


def test_gradient_checkpointing_is_refused_and_gradients_flow(own):
    (sample,) = make_batch([(4, 8, 1)])
    own.gradient_checkpointing_enable()
    own.train()
    try:
        with visibench.prune(own, FASTV), pytest.raises(UnsupportedModelError, match="gradient checkpointing"):
            own(**sample)
    finally:
        own.gradient_checkpointing_disable()
        own.eval()
    with torch.enable_grad(), visibench.prune(own, FASTV):
        own(**sample).logits[:, -1].sum().backward()
    assert own.model.language_model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
    own.zero_grad(set_to_none=True)


# ---- what a call may ask for --------------------------------------------------------------------------------------


def test_attention_maps_are_real_where_nothing_was_replaced():
    model, (sample,) = make_llava(layers=6, attention="eager"), make_batch([(4, 8, 1)])
    dense = model(**sample, output_attentions=True).attentions
    with visibench.prune(model, visibench.load_method("fastv", tokens=4)) as session:
        maps = model(**sample, output_attentions=True).attentions
        sizes = session.trace.kv_lengths()[0].tolist()
    assert [map.shape[2:] for map in maps] == [(n, n) for n in sizes]
    assert all(torch.equal(map, own) for map, own in zip(maps[:2], dense[:2], strict=True))
    assert all(torch.allclose(map.sum(-1), torch.ones(())) for map in maps)
    replacing = visibench.load_method("visipruner", shallow_layers=1, layer_threshold=0.9)
    with visibench.prune(model, replacing), pytest.raises(InputError, match="replaces the attention of layer 0"):
        model(**sample, output_attentions=True)


def test_logits_by_place_and_prompts_that_end_in_an_image_are_refused(llava):
    (sample,) = make_batch([(4, 8, 1)])
    with visibench.prune(llava, FASTV):
        assert llava(**sample, logits_to_keep=3).logits.shape[1] == 3
        with pytest.raises(InputError, match="logits_to_keep as a tensor"):
            llava(**sample, logits_to_keep=torch.tensor([3]))
        ids, pixels = sample["input_ids"][:, :20], sample["pixel_values"]
        with pytest.raises(InputError, match="put text behind the image"):
            llava(input_ids=ids, pixel_values=pixels)
    layout = visibench.TokenLayout.from_spans(20, visual=[(4, 20)])
    with visibench.prune(llava, FASTV, layout=layout), pytest.raises(InputError, match="put text behind the image"):
        llava(input_ids=ids, pixel_values=pixels)


OTHER_VIDEOS = {
    "glm4v": ((128, 216), {"video_grid_thw": torch.tensor([[2, 8, 8]])}),
    "llava_next_video": ((1, 2, 3, 24, 24), {}),
    "video_llava": ((1, 8, 3, 24, 24), {}),
}


@pytest.mark.slow
def test_families_whose_videos_go_another_way_are_known():
    models = {kind: decoder_model(kind) for kind in CONFIGS}
    takes = {kind for kind, one in models.items() if "pixel_values_videos" in inspect.signature(one.forward).parameters}
    assert {kind for kind in takes if Adapter(models[kind]).family.video_token is None} == {*OTHER_VIDEOS}


@pytest.mark.parametrize("kind", OTHER_VIDEOS)
def test_videos_that_go_another_way_than_images_are_refused_before_anything_runs(kind):
    model, ran, (shape, more) = decoder_model(kind), [], OTHER_VIDEOS[kind]
    ids = torch.tensor([[5, 61, *[62] * 32, 60, 7, 8, 9]])
    video = {"pixel_values_videos": torch.randn(shape), **more}
    if kind == "glm4v":
        video["mm_token_type_ids"] = 2 * (ids == 62)
    parts = Adapter(model).vision_tower, Adapter(model).decoder
    hooks = [part.register_forward_pre_hook(lambda *_: ran.append(1)) for part in parts]
    with visibench.prune(model, visibench.load_method("random", keep=0.1)):
        for call in (model, model.generate):
            with pytest.raises(UnsupportedModelError, match=r"videos of .* go another way"):
                call(input_ids=ids, **video)
    for hook in hooks:
        hook.remove()
    assert not ran


REFUSED = {
    "cache_implementation": "static",
    "prefill_chunk_size": 8,
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "assistant_early_exit": 2,
    "use_mtp": True,
    "custom_generate": "somebody/code",
    "num_beam_groups": 2,
}


@pytest.mark.parametrize("option", REFUSED)
@pytest.mark.parametrize("how", ["argument", "configuration"])
def test_what_generate_offers_beyond_is_refused_before_anything_runs(llava, option, how):
    (sample,) = make_batch([(4, 8, 1)])
    ran, given = [], {option: REFUSED[option]}
    hooks = [part.register_forward_pre_hook(lambda *_: ran.append(1)) for part in (llava, llava.model.vision_tower)]
    if how == "configuration":
        given = {"generation_config": GenerationConfig()}
        setattr(given["generation_config"], option, REFUSED[option])
    with visibench.prune(llava, FASTV), pytest.raises(InputError, match=rf"generate\({option}=.*under prune"):
        llava.generate(**sample, **given)
    for hook in hooks:
        hook.remove()
    assert not ran


@pytest.mark.parametrize("kind", ["static", "offloaded", "sliding", "quantised"])
def test_other_caches_are_refused_by_name(llava, kind, monkeypatch):
    (sample,) = make_batch([(4, 8, 1)])
    config = llava.config.text_config
    if kind == "sliding":
        config = copy.deepcopy(config)
        config.layer_types, config.sliding_window = ["sliding_attention"] * config.num_hidden_layers, 8
        cache, said = DynamicCache(config=config), "windows.*the model has none"
    elif kind == "static":
        cache, said = StaticCache(config=config, max_cache_len=40), "not with StaticCache"
    elif kind == "offloaded":
        monkeypatch.setattr("transformers.cache_utils.torch.Stream", lambda *_: None)
        cache, said = DynamicCache(config=config, offloading=True), "an offloaded DynamicCache"
    else:
        cache, said = QuantizedCache.__new__(QuantizedCache), "not with QuantizedCache"
    with visibench.prune(llava, FASTV), pytest.raises(VisibenchError, match=said):
        llava(**sample, past_key_values=cache)


# ---- ways to decode that give greedy's tokens ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def draft(llava):
    """An assistant that is often right and sometimes wrong."""
    other = copy.deepcopy(llava)
    for parameter in other.parameters():
        parameter.data += (
            0.02 * parameter.std() * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        )
    return other


@pytest.mark.slow
@every_method
@pytest.mark.parametrize("how", ["assistant", "lookup", "streamer"])
def test_other_ways_to_decode_give_greedys_tokens(llava, draft, method, how):
    (sample,) = make_batch([(4, 8, 1)], seed=4)
    sample["input_ids"][0, -4:] = sample["input_ids"][0, -8:-4]  # something for the look-up to find
    options = {"max_new_tokens": 12, "min_new_tokens": 12, **GREEDY}
    streamed = _Collector()
    extra = {
        "assistant": {"assistant_model": draft},
        "lookup": {"prompt_lookup_num_tokens": 3},
        "streamer": {"streamer": streamed},
    }[how]
    with visibench.prune(llava, method) as session:
        greedy = llava.generate(**sample, **options)
        kept = [session.trace.kept(layer) for layer in range(10)]
        other = llava.generate(**sample, **options, **extra)
        assert all(torch.equal(session.trace.kept(layer), was) for layer, was in enumerate(kept))
    assert torch.equal(other, greedy)
    if how == "streamer":
        assert streamed.tokens == greedy[0].tolist()


class _Collector(BaseStreamer):
    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        pass
