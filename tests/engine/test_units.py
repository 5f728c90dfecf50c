"""Methods of the vision side in families whose images are tiles, or of any shape."""

import sys
from dataclasses import fields

import pytest
import torch
import visibench
from families import BY_TOKEN, make_traceable
from support import state
from torch.utils.flop_counter import FlopCounterMode
from units import TILE, VISUAL, collate, model_of, sample_of, samples_of
from visibench.engine.contract import Forward, Keep
from visibench.engine.units.view import VisionView
from visibench.engine.vision.features import FeatureStore
from visibench.errors import InputError
from visibench.evals.compute import flops
from visibench.evals.settings.method_spec import parse
from visibench.methods.base import Method
from visibench.models.adapters import FAMILIES, Adapter

CLS = [
    "fastervlm:keep=0.5",
    "visionzip:tokens=7,contextual=3",
    "vispruner:tokens=6,unpad=true",
    "scope:tokens=5",
    "prumerge",
    "prumerge_plus:tokens=9,order=spatial",
    "vispruner:tokens=6",
]
SHARED = [
    "hiprune:keep=0.5,alpha=0.5,layers=scaled,unpad=true",
    "pooling:tokens=5",
    "divprune:keep=0.4",
    "cdpruner:tokens=3,condition=none",
]
TOWER = ["tome:keep=0.5", "downsample:tokens=6", "flowcut:tokens=6"]
CUT = ["flowcut:tokens=3,cut=2"]
MEAN_QUERY = ["flowcut:keep=0.5,query=mean", "flowcut:tokens=3,cut=1,query=mean"]
INSIDE = [TOWER[0], MEAN_QUERY[0], "flowcut:tokens=3,cut=2,query=mean,positions=keep"]
SEQUENCE = ["tome:keep=0.5", "tome:tokens=5,proportional=false", "flowcut:tokens=6,query=mean", INSIDE[-1]]
HIRED = ["hired:keep=0.5"]
HOLOV = ["holov:keep=0.5,runs=4", "holov:tokens=13,runs=5,shortfall=zeros"]
RECEIVED = [f"{text},attention=received" for text in CLS[:4] + HOLOV + HIRED]
VSCAN = [
    "vscan:keep=0.5,window=2,layers=scaled",
    "vscan:keep=0.8,window=2,cuts=8+24,counts=7+3,layers=scaled,unpad=true,newlines=keep",
    "vscan:keep=0.7,window=3,quota=ceil,layers=scaled,unpad=true",
]
RECEIVED_VSCAN = [f"{text},attention=received" for text in VSCAN]
LAST = ["prumerge:read_block=features", "prumerge_plus:tokens=9,order=spatial,read_block=features"]
RECEIVED += [f"{text},attention=received" for text in LAST]
SMALLER = ["downsample:keep=0.3"]
WINDOWS = ["hiprune:keep=0.5,alpha=0.5,middle=1,unpad=true", *SHARED[1:]]
EARLY_VSCAN = [text.replace("scaled", "scaled,early=8") for text in RECEIVED_VSCAN]
METHODS = {
    "llava_next": CLS + HIRED + SHARED + TOWER + CUT + HOLOV + VSCAN,
    "vipllava": CLS[:6] + HIRED + SHARED + TOWER + MEAN_QUERY + HOLOV + VSCAN,
    "internvl": CLS[:4] + LAST + HIRED + SHARED + SMALLER + INSIDE + TOWER[2:] + HOLOV + VSCAN,
    "llava_onevision": RECEIVED + SHARED + TOWER[:2] + MEAN_QUERY + RECEIVED_VSCAN,
    "qwen2_vl": RECEIVED + SHARED + SMALLER + SEQUENCE + RECEIVED_VSCAN,
    "qwen2_5_vl": RECEIVED + WINDOWS + SMALLER + SEQUENCE + EARLY_VSCAN,
    "qwen3_vl": RECEIVED + SHARED + SMALLER + SEQUENCE + RECEIVED_VSCAN,
    "mistral3": SHARED[2:],
    "deepseek_vl": RECEIVED + SHARED + TOWER[:2] + MEAN_QUERY + RECEIVED_VSCAN,
    "smolvlm": RECEIVED[:5] + RECEIVED[6:] + SHARED + SMALLER + INSIDE + RECEIVED_VSCAN,
    "idefics3": RECEIVED[:5] + RECEIVED[6:] + SHARED + SMALLER + INSIDE + RECEIVED_VSCAN,
}
ALL = ["fastervlm", "vispruner", "scope", "hiprune", "hired", "pooling", "divprune", "cdpruner", "holov"]
CASES = [(kind, text) for kind, texts in METHODS.items() for text in texts]
QUICK = ("fastervlm", "visionzip", "divprune")


def some_quick(cases):
    """Cases as parameters: a few of them in the fast suite."""
    return [pytest.param(*case, marks=[] if case[1].startswith(QUICK) else pytest.mark.slow) for case in cases]


every_case = pytest.mark.parametrize(("kind", "text"), some_quick(CASES))


def last_logits(model, method, batch):
    if "mm_token_type_ids" not in batch:
        batch = batch | {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad(), visibench.prune(model, method) as session:
        return model(**batch).logits[:, -1], session.trace


def everything(text):
    """The same method with all that it may keep."""
    name, options = text.split(":")
    same = ("attention", "query", "cut=", "middle", "runs", "layers", "condition", "early", "proportional")
    wanted = [option for option in options.split(",") if option.startswith(same)]
    inside = ["unpad=true"] if "unpad" in {field.name for field in fields(type(parse(text)))} else []
    cuts = ["cuts="] if name == "vscan" else []
    return parse(f"{name}:{','.join(['keep=1', 'newlines=keep', *inside, *cuts, *wanted])}")


DENSE = [case for case in CASES if case[1].split(":")[0] in (*ALL, "vscan", "tome", "downsample", "flowcut")]


@pytest.mark.parametrize(("kind", "text"), some_quick(DENSE))
def test_keeping_everything_is_dense_bit_for_bit(kind, text):
    model, batch = model_of(kind), collate(samples_of(kind))
    with torch.no_grad(), visibench.prune(model, everything(text)):
        pruned = model(**batch).logits
    with torch.no_grad():
        assert torch.equal(pruned, model(**batch).logits)


@every_case
def test_row_of_a_batch_equals_the_row_alone(kind, text):
    model, samples, method = model_of(kind), samples_of(kind), parse(text)
    logits, trace = last_logits(model, method, collate(samples))
    together = flops.executed(trace, Adapter(model).geometry).total()
    for row, sample in enumerate(samples):
        alone, own = last_logits(model, method, sample)
        assert (logits[row] - alone[0]).abs().max() < 1e-5 * logits.abs().max()
        assert torch.equal(trace.visual_counts()[row], own.visual_counts()[0])
        assert torch.equal(trace.scoring_macs()[row], own.scoring_macs()[0])
        assert flops.executed(own, Adapter(model).geometry).total() == [together[row]]
        kept = own.kept(0)
        assert torch.equal(trace.kept(0)[row, : kept.shape[1]], kept[0])


@every_case
def test_generation_with_a_cache_equals_generation_without_and_each_row_alone(kind, text):
    model, samples, method = model_of(kind), samples_of(kind), parse(text)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "suppress_tokens": [VISUAL]}
    before = state(model)
    with visibench.prune(model, method):
        together = model.generate(**collate(samples), **options)[:, -4:]
        without = model.generate(**collate(samples), **options, use_cache=False)[:, -4:]
        for row, sample in enumerate(samples):
            assert together[row].tolist() == model.generate(**sample, **options)[0, -4:].tolist()
    assert together.tolist() == without.tolist()
    assert state(model) == before


def check_compute(model, method, sample):
    """By torch's counter, which sees the products of eager attention."""
    with visibench.prune(model, method) as session, FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**sample)
    closed = flops.executed(session.trace, session.geometry, logits=None)
    rotary = [sum(ops.values()) for name, ops in counter.get_flop_counts().items() if name.endswith("rotary_emb")]
    assert closed.total()[0] == (counter.get_total_flops() - sum(rotary)) / 2


@every_case
def test_compute_equals_that_of_torchs_counter(kind, text):
    for sample in samples_of(kind):
        check_compute(model_of(kind, "eager"), parse(text), sample)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "text"), CASES)
def test_compute_is_within_one_percent_of_fvcores_count(kind, text, monkeypatch):
    make_traceable(monkeypatch)
    model, inputs = model_of(kind, "eager"), samples_of(kind)[1]  # two images
    with torch.no_grad(), visibench.prune(model, parse(text)) as session:
        count, _ = flops.counted(model, inputs)
    (closed,) = flops.executed(session.trace, session.geometry, logits=None).total()
    assert closed == pytest.approx(count, rel=0.01)


SMALL = ("smolvlm", "idefics3")
"""Families whose tiles have but four tokens here."""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "text"), [case for case in CASES if case[1].startswith("vscan")])
def test_what_vscan_promises_of_images_of_any_shape_is_what_it_leaves(kind, text):
    method = parse(text)
    _, trace = last_logits(model_of(kind), method, collate(samples_of(kind)))
    promised = method.visual_counts(trace.prompt, Adapter(model_of(kind)).geometry)
    assert torch.equal(trace.visual_counts(), promised)
    assert (promised.diff(dim=1) < 0).any() == ("cuts=8" not in text or kind not in SMALL)


# Under VisPruner as its authors have it patches of padding enter, which have no place in the prompt.
KEEPING = [case for case in CASES if case[1].split(":")[0] in ALL and "pooling" not in case[1] and case[1] != CLS[-1]]


def check_kept(model, method, sample):
    """The pruned prefill against the model's own decoder on the tokens that stayed."""
    decoder = Adapter(model).decoder
    seen = {}
    hook = decoder.register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
    with torch.no_grad():
        model(**sample)
    hook.remove()
    pruned, trace = last_logits(model, method, sample)
    is_visual = sample["input_ids"][0] == VISUAL
    keep = ~is_visual
    keep[is_visual] = trace.kept(0)[0]
    order = keep.nonzero().flatten()
    if method.reorders and is_visual.any():  # the order in which they entered
        visual = trace.layouts[0].visual_id[0]
        places = is_visual.nonzero().flatten()
        order[is_visual[order]] = places[visual[visual >= 0]]
    place = seen["position_ids"]
    place = torch.arange(len(keep))[None] if place is None else place[-3:] if place.ndim == 3 else place
    place = place[..., order] if method.positions == "keep" else torch.arange(len(order)).expand(*place.shape[:-1], -1)
    deep, more = seen.get("deepstack_visual_embeds"), {}
    if deep:
        left = [part[is_visual.cumsum(0)[order][is_visual[order]] - 1] for part in deep]
        more = {"deepstack_visual_embeds": left, "visual_pos_masks": is_visual[order][None]}
    with torch.no_grad():
        dense = decoder(inputs_embeds=seen["inputs_embeds"][:, order], position_ids=place, **more).last_hidden_state
        torch.testing.assert_close(pruned, model.lm_head(dense)[:, -1], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("kind", "text"), some_quick(case for case in KEEPING if "zeros" not in case[1]))
@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_kept_tokens_equal_the_models_own_decoder_on_them(kind, text, positions):
    for sample in samples_of(kind):
        check_kept(model_of(kind), parse(f"{text},positions={positions}"), sample)


class Sees(Method):
    """Keeps every image as it enters the decoder."""

    name, hook_points, vision_blocks, newlines = "sees", ("projector",), (), "compete"

    def begin(self, layout, geometry):
        forward, self.__dict__["seen"] = Forward(), []
        forward.projected = lambda view: self.seen.extend(view.projected)
        return forward


@pytest.mark.parametrize("kind", METHODS)
def test_methods_behind_the_projector_see_each_image_as_the_model_makes_it(kind):
    """Of a row of two images: those that ``get_image_features`` returns, newlines included and breaks not."""
    model, sample, method = model_of(kind), samples_of(kind)[1], Sees()
    last_logits(model, method, sample)
    images = {key: value for key, value in sample.items() if key not in BY_TOKEN}
    with torch.no_grad():
        wanted = [*model.model.get_image_features(**images).pooler_output]
    wanted = wanted if len(wanted) > 1 else wanted[0].chunk(2)  # tiles of a row together
    assert len(method.seen) == len(wanted) == 2
    assert all(any(own.shape == one.shape and torch.equal(own, one) for own in method.seen) for one in wanted)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["smolvlm", "idefics3"])
def test_padding_within_a_tile_asks_nothing_and_receives_nothing(kind, attention, monkeypatch):
    """By the weights that the model's own tower puts out; images shared or not."""
    model = model_of(kind, attention)
    sample = sample_of(kind, 9, [(), (), ()])
    pixels, counts = sample["pixel_values"], torch.ones(1, 3, TILE, TILE, dtype=torch.bool)
    counts[0, 1, :, 6:], counts[0, 2, 12:] = False, False  # of 4 × 4 patches one column, and two rows
    sample["pixel_attention_mask"] = counts
    pixels.masked_fill_(~counts[:, :, None], 0)
    real = counts[0, :, ::6, ::6].contiguous()
    with torch.no_grad():
        eager = model_of(kind, "eager").model.vision_model
        weights = eager(pixels[0], patch_attention_mask=real, output_attentions=True).attentions[-1].mean(1)
    asked = real.flatten(1)
    got = (weights * asked[:, :, None]).sum(1) / asked.sum(1, keepdim=True)
    assert (got[~asked] == 0).all()
    wanted = got.view(3, 2, 2, 2, 2).sum((2, 4)).flatten(1)  # 2 × 2 patches make a token
    kept = torch.zeros(3, 4, dtype=torch.bool).scatter(1, wanted.topk(2).indices, value=True)
    own, seen = VisionView.received, []
    monkeypatch.setattr(VisionView, "received", lambda *given: seen.append(own(*given)) or seen[-1])
    for store in (None, FeatureStore(2**20)):
        with torch.no_grad(), visibench.prune(model, parse(RECEIVED[0]), features=store) as session:
            model(**sample)
        torch.testing.assert_close(seen.pop(), wanted, atol=1e-6, rtol=1e-4)
        assert session.trace.kept(0)[0].tolist() == kept.flatten().tolist()


@pytest.mark.parametrize(("kind", "block"), [("qwen2_vl", 2), ("qwen2_5_vl", 1), ("qwen3_vl", 2)])
def test_received_attention_is_that_of_the_last_block_that_sees_the_whole_image(kind, block, monkeypatch):
    """By the weights of the model's own tower, of which Qwen2.5-VL's last block attends in windows."""
    model, sample, weights = model_of(kind, "eager"), samples_of(kind)[1], []
    attention, module = model.model.visual.blocks[block].attn, sys.modules[type(model).__module__]
    kernel = module.eager_attention_forward

    def noted(asking, *given, **more):
        output = kernel(asking, *given, **more)
        weights.extend([output[1][0].mean((0, 1))] if asking is attention else [])
        return output

    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(module, "eager_attention_forward", noted)
        model(**sample)
    order = FAMILIES[kind].order(model.config, sample["image_grid_thw"])
    got = [part.view(-1, 4).sum(1) for part in weights]  # 2 × 2 patches make a token
    assert [len(part) for part in got] == [18, 4]
    _, trace = last_logits(model, parse(RECEIVED[0]), sample)
    kept = torch.cat(got)[order].split([18, 4])
    wanted = [
        torch.zeros(len(part), dtype=torch.bool).index_fill(0, part.topk(len(part) // 2).indices, 1) for part in kept
    ]
    assert trace.kept(0)[0].tolist() == torch.cat(wanted).tolist()


TOO_LARGE = "{}.*interpolates the features of an image of so many tiles.*: give it smaller images, or choose divprune"


@pytest.fixture
def interpolated(monkeypatch):
    """A model that keeps the features of two tiles, and images of four, of one and of more with padding."""
    model = model_of("llava_onevision")
    monkeypatch.setattr(model.config, "vision_aspect_ratio", "anyres_max_2")
    return model, samples_of("llava_onevision", [(9, [(48, 48)]), (5, []), (6, [(24, 24)]), (7, [(48, 44)])])


@pytest.mark.parametrize("text", [RECEIVED[0], RECEIVED[1], RECEIVED[4], *SHARED[:2], *TOWER[:2], *MEAN_QUERY])
def test_methods_that_ask_for_features_refuse_interpolated_images_before_anything_runs(interpolated, text):
    model, samples = interpolated
    ran, method = [], parse(text)
    hook = Adapter(model).vision_blocks[0].register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(InputError, match=TOO_LARGE.format(method.name)):
        last_logits(model, method, samples[0])
    hook.remove()
    assert not ran


@pytest.mark.parametrize("text", [*SHARED[2:], "divprune:tokens=5,newlines=compete", "random:keep=0.5,layer=0"])
def test_other_methods_act_on_interpolated_images_as_they_enter(interpolated, text):
    model, samples = interpolated
    method = parse(text)
    logits, trace = last_logits(model, method, collate(samples))
    for row, sample in enumerate(samples):
        check_kept(model, method, sample)
        alone, own = last_logits(model, method, sample)
        assert (logits[row] - alone[0]).abs().max() < 1e-5 * logits.abs().max()
        assert torch.equal(trace.visual_counts()[row], own.visual_counts()[0])


@pytest.mark.slow
@pytest.mark.parametrize("text", ["none", SHARED[2], "random:keep=0.5,layer=0"])
def test_compute_of_interpolated_images_equals_that_of_torchs_counter(interpolated, monkeypatch, text):
    _, samples = interpolated
    model = model_of("llava_onevision", "eager")
    monkeypatch.setattr(model.config, "vision_aspect_ratio", "anyres_max_2")
    for sample in samples:
        check_compute(model, parse(text), sample)


def test_features_of_interpolated_images_are_not_made_up(interpolated):
    class Reads(Method):
        name, hook_points, vision_blocks = "reads", ("projector",), ()

        def begin(self, layout, geometry):
            forward = Forward()
            forward.projected = lambda view: Keep(view.features.norm(dim=2) > 0)
            return forward

    model, samples = interpolated
    with pytest.raises(InputError, match=TOO_LARGE.format("a method that reads features")):
        last_logits(model, Reads(), samples[0])
