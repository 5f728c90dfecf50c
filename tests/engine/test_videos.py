"""Videos in families where they go the way of images: their tokens are visual tokens, alone and beside images."""

from itertools import chain, product

import numpy as np
import pytest
import torch
import visibench
from by_hand import check_cuts, last_state
from decoders import IMAGE, VIDEO, decoder_model
from families import METHODS, collate
from PIL import Image
from processors import askable
from torch.utils.flop_counter import FlopCounterMode
from visibench.errors import InputError, UnsupportedModelError
from visibench.evals.compute import flops
from visibench.evals.settings.method_spec import parse
from visibench.methods import Forward, Method
from visibench.models.adapters import FAMILIES, Adapter

VISUAL = torch.tensor([IMAGE, VIDEO])
BEHIND = [visibench.load_method("divprune", keep=0.4), visibench.load_method("cdpruner", tokens=5, condition="none")]
KINDS = [kind for kind, family in FAMILIES.items() if family.video_token in ("video_token_id",)]
every_kind = pytest.mark.parametrize("kind", KINDS)
FASTV = visibench.load_method("fastv", keep=0.5)
QUICK = {("llava_onevision", "divprune"), ("qwen3_vl", "fastv")}
every_case = pytest.mark.parametrize(
    ("kind", "method"),
    [
        pytest.param(
            kind, method, marks=[] if (kind, method.name) in QUICK else pytest.mark.slow, id=f"{kind}-{method}"
        )
        for kind, method in product(KINDS, [FASTV, *BEHIND, METHODS[6]])
    ],
)
GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "suppress_tokens": [IMAGE, VIDEO]}
FRAMES, PATCH = 2, 3 * 2 * 6 * 6


def prompt(kind, seed, *, images, videos):
    """Text, images of 2 × 2 tokens and videos of two frames of 2 × 3; Qwen3-VL writes a time in front of each frame."""
    if kind == "llava_onevision":
        return pooled_prompt(seed, images=images, videos=videos)
    generator = torch.Generator().manual_seed(seed)
    text = lambda n: torch.randint(3, 60, (n,), generator=generator).tolist()  # noqa: E731
    frames = [[VIDEO] * 6 + (text(2) if kind == "qwen3_vl" else []) for _ in range(FRAMES)]
    ids = text(3) + [61, *[IMAGE] * 4, 60] * images + [61, *chain(*frames), 60] * videos + text(4 + seed)
    ids = torch.tensor([ids])
    sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    sample["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    for count, frames, wide, pixels, grid in (
        (images, 1, 4, "pixel_values", "image_grid_thw"),
        (videos, FRAMES, 6, "pixel_values_videos", "video_grid_thw"),
    ):
        if count:
            sample[pixels] = torch.randn(count * frames * 4 * wide, PATCH, generator=generator)
            sample[grid] = torch.tensor([[frames, 4, wide]] * count)
    return sample


def pooled_prompt(seed, *, images, videos):
    """LLaVA-OneVision: an image alone is cut into tiles; frames are made smaller, and a newline ends a video."""
    generator = torch.Generator().manual_seed(seed)
    text = lambda n: torch.randint(3, 60, (n,), generator=generator).tolist()  # noqa: E731
    one, tiles = ([IMAGE] * 36, 2) if images == 1 else ([IMAGE] * 17, 1)
    ids = text(3)
    for _ in range(images):
        ids += one + text(1)
    ids = torch.tensor([ids + [VIDEO] * (FRAMES * 4 + 1) * videos + text(4 + seed)])
    sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if images:
        sample["pixel_values"] = torch.randn(images, tiles, 3, 24, 24, generator=generator)
        sample |= {"image_sizes": torch.tensor([[24, 24]] * images), "batch_num_images": torch.tensor([images])}
    if videos:
        sample["pixel_values_videos"] = torch.randn(videos, FRAMES, 3, 24, 24, generator=generator)
    return sample


def samples_of(kind):
    shapes = [(0, 1), (1, 0), (1, 1), (0, 0), (2, 1)]
    return [prompt(kind, seed, images=images, videos=videos) for seed, (images, videos) in enumerate(shapes)]


def last_logits(model, method, batch):
    if model.config.model_type == "llava_onevision":
        batch = batch | {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad(), visibench.prune(model, method) as session:
        return model(**batch).logits[:, -1], session.trace


@every_case
def test_a_row_of_videos_and_images_equals_the_row_alone(kind, method):
    model, samples = decoder_model(kind), samples_of(kind)
    logits, trace = last_logits(model, method, collate(samples))
    geometry = Adapter(model).geometry
    together = flops.executed(trace, geometry).total()
    for row, sample in enumerate(samples):
        alone, own = last_logits(model, method, sample)
        torch.testing.assert_close(logits[row], alone[0], atol=1e-4, rtol=1e-4)
        assert torch.equal(trace.visual_counts()[row], own.visual_counts()[0])
        assert flops.executed(own, geometry).total() == [together[row]]
    wanted = [9, 36, 45, 0, 43] if kind == "llava_onevision" else [12, 4, 16, 0, 20]
    assert [*trace.prompt.visual_counts] == wanted


@every_kind
@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_a_cut_among_videos_and_images_equals_the_models_own_layers_on_gathered_inputs(kind, positions):
    sample = samples_of(kind)[4]
    with torch.no_grad():
        check_cuts(decoder_model(kind), sample, torch.isin(sample["input_ids"][0], VISUAL), positions)


@every_kind
def test_a_method_behind_the_projector_sees_each_image_and_each_video_as_it_enters(kind):
    """By the embeddings that the model itself puts in their places."""
    model, sample, shown, seen = decoder_model(kind), samples_of(kind)[4], [], {}
    hook = model.model.language_model.register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)

    class Sees(Method):
        name, hook_points, vision_blocks, newlines = "sees", ("projector",), (), "compete"

        def begin(self, layout, geometry):
            forward = Forward()
            forward.projected = lambda view: shown.extend(view.projected)
            return forward

    last_logits(model, Sees(), sample)
    hook.remove()
    ids, embeddings = sample["input_ids"][0], seen["inputs_embeds"][0]
    videos, first = embeddings[ids == VIDEO], embeddings[ids == IMAGE]
    wanted = [*first.chunk(2), videos]
    assert len(shown) == 3
    assert all(any(torch.equal(own, one) for own in shown) for one in wanted)


@every_kind
def test_pruned_videos_are_no_dense_run(kind):
    model, sample = decoder_model(kind), samples_of(kind)[0]
    with torch.no_grad():
        dense = model(**sample).logits[:, -1]
    everything, _ = last_logits(model, visibench.load_method("fastv", keep=1.0), sample)
    half, trace = last_logits(model, FASTV, sample)
    assert torch.equal(everything, dense)
    assert (half - dense).abs().max() > 1e-3
    assert trace.visual_counts()[0, -1] == trace.visual_counts()[0, 0] // 2


@every_case
def test_generation_from_videos_equals_each_row_alone_and_that_without_a_cache(kind, method):
    model, samples = decoder_model(kind), samples_of(kind)
    with torch.no_grad(), visibench.prune(model, method):
        together = model.generate(**collate(samples), **GREEDY)[:, -5:]
        for row, sample in enumerate(samples):
            assert together[row].tolist() == model.generate(**sample, **GREEDY)[0, -5:].tolist()
        without = model.generate(**samples[2], **GREEDY, use_cache=False)[0, -5:]
    assert together[2].tolist() == without.tolist()


@every_case
def test_compute_of_videos_equals_that_of_torchs_counter(kind, method):
    model = decoder_model(kind)
    for sample in samples_of(kind):
        with torch.no_grad(), visibench.prune(model, method) as session, FlopCounterMode(display=False) as counter:
            model(**sample)
        rotary = [sum(ops.values()) for name, ops in counter.get_flop_counts().items() if name.endswith("rotary_emb")]
        closed = flops.executed(session.trace, session.geometry, logits=None)
        assert closed.total()[0] == (counter.get_total_flops() - sum(rotary)) / 2


@every_kind
def test_methods_that_act_on_images_inside_the_tower_refuse_videos_before_anything_runs(kind):
    model, sample, ran = decoder_model(kind), samples_of(kind)[0], []
    hook = Adapter(model).vision_tower.register_forward_pre_hook(lambda *_: ran.append(1))
    for run in (model, lambda **inputs: model.generate(**inputs, **GREEDY)):
        method = visibench.load_method("visionzip", tokens=4, attention="received")
        wanted = pytest.raises(UnsupportedModelError, match=r"visionzip acts on the vision side.*such as divprune")
        with wanted, visibench.prune(model, method):
            run(**sample)
    hook.remove()
    assert not ran


@every_kind
def test_videos_are_not_drawn_and_that_is_said(kind):
    model, picture = decoder_model(kind), Image.new("RGB", (48, 48))
    for sample in (samples_of(kind)[0], samples_of(kind)[2]):
        _, trace = last_logits(model, FASTV, sample)
        with pytest.raises(InputError, match="videos are not drawn"):
            trace.show(picture)


@pytest.fixture(scope="module")
def internvl():
    """A model, and inputs of its own processor: a video of four frames, and one beside an image."""
    loaded, generator = askable("internvl"), np.random.default_rng(0)
    loaded.model.set_attn_implementation("eager")
    texts = ["USER: <video>\nWhat? ASSISTANT:", "USER: <video> and <IMG_CONTEXT>, are they alike? ASSISTANT:"]
    frames = generator.integers(0, 256, (2, 5, 48, 48, 3), dtype=np.uint8)
    samples = [
        loaded.processor(text=[text], videos=[own[:4]], images=[own[4]] if row else None, return_tensors="pt")
        for row, (text, own) in enumerate(zip(texts, frames, strict=True))
    ]
    return loaded.model, [dict(sample) for sample in samples]


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("text", ["fastv:keep=0.5", "fastervlm:keep=0.5", "divprune:keep=0.5"])
def test_internvl_sees_each_frame_as_an_image(internvl, text):
    """On its own: half of 16 tokens are left of each; a row in its batch is as alone, with a cache and without."""
    model, samples = internvl
    method, batch = parse(text), collate(samples)
    options = GREEDY | {"suppress_tokens": [model.config.image_token_id]}
    states, trace = last_state(
        model, method, batch | {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(0)}
    )
    assert trace.prompt.visual_counts == (4 * 16, 5 * 16)
    if method.name != "fastv":
        assert trace.kept(0)[1].view(5, 16).sum(1).tolist() == [8] * 5
    for row, sample in enumerate(samples):
        alone, own = last_state(model, method, sample)
        torch.testing.assert_close(states[row], alone[0], atol=1e-4, rtol=1e-4)
        assert torch.equal(trace.visual_counts()[row], own.visual_counts()[0])
    with visibench.prune(model, method):
        together = model.generate(**batch, **options)[:, -5:]
        alone = [model.generate(**sample, **options)[0, -5:].tolist() for sample in samples]
        without = model.generate(**samples[0], **options, use_cache=False)[0, -5:]
    assert together.tolist() == alone
    assert together[0].tolist() == without.tolist()


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_a_cut_among_frames_of_internvl_equals_its_own_layers_on_gathered_inputs(internvl, positions):
    model, samples = internvl
    check_cuts(model, samples[1], samples[1]["input_ids"][0] == model.config.image_token_id, positions)
