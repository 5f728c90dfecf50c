"""Downsampling where images have any shape: the pruned model on a prompt is the model itself on the prompt with smaller
images, made by the processor's own way from images to patches, and with as many fewer placeholders."""

from functools import cache

import pytest
import torch
import visibench
from PIL import Image
from torch.nn.functional import interpolate
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor, smart_resize
from units import CONFIGS, VISUAL, collate, model_of, sample_of, samples_of
from visibench.errors import UnsupportedModelError, VisibenchError
from visibench.evals.compute import flops
from visibench.evals.compute.prefill_plan import planned_prefill
from visibench.evals.settings.method_spec import parse
from visibench.methods.base import Method
from visibench.models.adapters import Adapter

SMALL = {(4, 5): (2, 3), (3, 6): (2, 3), (2, 2): (2, 2), (7, 1): (6, 1), (9, 4): (3, 2)}
"""Rows and columns of tokens, and the most within 6 of them at the same aspect, to a row or a column."""
METHOD = "downsample:tokens=6"
KINDS = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
every_kind = pytest.mark.parametrize("kind", KINDS)
PATCH, MERGE = 6, 2
GENERATED = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "suppress_tokens": [VISUAL]}
LATER = torch.tensor([[7, 9, 11, 8]])


def patched(image):
    """Patches (P, F) of an image (3, h, w), as the processor lays them out."""
    patches, _, _ = Qwen2VLImageProcessor.patchify(None, image[None], PATCH, MERGE, 2)
    return patches[0]


@cache
def pixels_of(rows, columns):
    """Of each number in the patches of so large an image, the pixel that it is."""
    sides = 3, rows * MERGE * PATCH, columns * MERGE * PATCH
    return patched(torch.arange(torch.Size(sides).numel(), dtype=torch.float64).view(sides)).long(), sides


def smaller(sample):
    """The same row with images made smaller."""
    if "pixel_values" not in sample:
        return sample
    shapes = [(rows // MERGE, columns // MERGE) for _, rows, columns in sample["image_grid_thw"].tolist()]
    patches, pixels, grids, ids = sample["pixel_values"], [], [], sample["input_ids"][0].tolist()
    for part, shape in zip(patches.split([MERGE**2 * r * c for r, c in shapes]), shapes, strict=True):
        numbers, sides = pixels_of(*shape)
        image, (rows, columns) = part.new_empty(sides), SMALL[shape]
        image.view(-1)[numbers.flatten()] = part.flatten()
        # A processor's copies of the image are one.
        assert torch.equal(patched(image), part)
        if SMALL[shape] != shape:
            size = (rows * MERGE * PATCH, columns * MERGE * PATCH)
            image = interpolate(image[None].float(), size, mode="bicubic", antialias=True)[0].to(part.dtype)
        pixels.append(patched(image))
        grids.append([1, rows * MERGE, columns * MERGE])
    new, shapes = [], iter(shapes)
    for place, token in enumerate(ids):
        if token != VISUAL:
            new.append(token)
        elif place == 0 or ids[place - 1] != VISUAL:
            rows, columns = SMALL[next(shapes)]
            new += [VISUAL] * (rows * columns)
    ids = torch.tensor([new])
    more = {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.tensor(grids)}
    kinds = {"mm_token_type_ids": (ids == VISUAL).int()}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | more | kinds


def images_of(kind, shapes, seed=0, text=9, dtype=torch.float32):
    """A row of images as a processor makes them: of each patch two copies that are one."""
    sample = sample_of(kind, text, shapes, seed=seed)
    if shapes:
        sample["pixel_values"] = as_processed(sample["pixel_values"]).to(dtype)
    return sample


def as_processed(patches):
    copies = patches.view(len(patches), 3, 2, PATCH * PATCH)
    return copies[:, :, :1].expand_as(copies).reshape(patches.shape).contiguous()


def rows_of(kind):
    samples = samples_of(kind)
    return [s | {"pixel_values": as_processed(s["pixel_values"])} if "pixel_values" in s else s for s in samples]


def close(one, other):
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@every_kind
@pytest.mark.parametrize("shapes", [[(4, 5)], [(3, 6), (2, 2)], [(9, 4), (9, 4), (7, 1)], [(2, 2)], []], ids=str)
def test_logits_are_those_of_the_model_on_the_smaller_images(kind, shapes):
    """Of all tokens; of one image, several of which some stay as they are, some alike; and none."""
    model, sample = model_of(kind), images_of(kind, shapes)
    with torch.no_grad():
        wanted = model(**smaller(sample)).logits
        with visibench.prune(model, parse(METHOD)) as session:
            found = model(**sample).logits
    close(found, wanted)
    trace = session.trace
    assert trace.visual_counts()[0].tolist() == [sum(r * c for r, c in map(SMALL.get, shapes))] * 6
    assert trace.kv_lengths()[0].tolist() == [smaller(sample)["input_ids"].shape[1]] * 6
    stay = [shape == SMALL[shape] for shape in shapes for _ in range(shape[0] * shape[1])]
    assert trace.kept(0)[0].tolist() == stay


@every_kind
def test_rows_of_a_padded_batch_are_those_of_the_model_on_the_smaller_images(kind):
    model, samples = model_of(kind), rows_of(kind)
    with torch.no_grad():
        wanted = model(**collate([smaller(sample) for sample in samples])).logits[:, -1]
        with visibench.prune(model, parse(METHOD)) as session:
            found = model(**collate(samples)).logits[:, -1]
    close(found, wanted)
    assert session.trace.tower_grids.tolist() == [[1, 4, 6], [1, 4, 6], [1, 4, 4], [1, 12, 2]]
    assert session.trace.projected.tolist() == [6, 10, 0, 6]


@pytest.mark.slow
@every_kind
@pytest.mark.parametrize("cached", [True, False])
def test_answers_are_those_of_the_model_on_the_smaller_images(kind, cached):
    """Generated for a padded batch, and for each row alone."""
    model, samples, options = model_of(kind), rows_of(kind), GENERATED | {"use_cache": cached}
    wanted = model.generate(**collate([smaller(sample) for sample in samples]), **options)[:, -4:]
    with visibench.prune(model, parse(METHOD)):
        assert model.generate(**collate(samples), **options)[:, -4:].tolist() == wanted.tolist()
        alone = [model.generate(**sample, **options)[0, -4:].tolist() for sample in samples]
    assert alone == wanted.tolist()


@every_kind
def test_beams_are_those_of_the_model_on_the_smaller_images(kind):
    model, samples = model_of(kind), rows_of(kind)[:2]
    options = GENERATED | {"num_beams": 3}
    wanted = model.generate(**collate([smaller(sample) for sample in samples]), **options)[:, -4:]
    with visibench.prune(model, parse(METHOD)):
        assert model.generate(**collate(samples), **options)[:, -4:].tolist() == wanted.tolist()


BY_TOKEN = {"input_ids", "attention_mask", "mm_token_type_ids"}


def whole(turns):
    """Turns as one prompt."""
    keys = {key for turn in turns for key in turn}
    return {key: torch.cat([turn[key] for turn in turns if key in turn], dim=int(key in BY_TOKEN)) for key in keys}


def in_turns(model, turns):
    """Logits behind the last of some turns, one call for each, with the positions that they have in one prompt."""
    together, cache, fed = whole(turns), None, 0
    mask = together["attention_mask"]
    places, _ = model.model.get_rope_index(**{k: v for k, v in together.items() if k != "pixel_values"})
    for turn in turns:
        end = fed + turn["input_ids"].shape[1]
        more = {"attention_mask": mask[:, :end], "position_ids": places[..., fed:end]}
        output = model(**turn | more, past_key_values=cache, use_cache=True)
        cache, fed = output.past_key_values, end
    return output.logits


@every_kind
def test_a_later_text_counts_on_as_it_does_behind_the_smaller_images(kind):
    model, samples = model_of(kind), rows_of(kind)
    ids = LATER.expand(len(samples), -1)
    later = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": torch.zeros_like(ids)}
    with torch.no_grad():
        wanted = in_turns(model, [collate([smaller(sample) for sample in samples]), later])
        with visibench.prune(model, parse(METHOD)):
            found = in_turns(model, [collate(samples), later])
    close(found, wanted)


@every_kind
@pytest.mark.parametrize("first", [[(4, 5)], []], ids=str)
def test_a_later_image_is_that_of_the_model_on_both_smaller_images(kind, first):
    model, turns = model_of(kind), [images_of(kind, first), images_of(kind, [(9, 4)], seed=3)]
    small = [smaller(turn) for turn in turns]
    with torch.no_grad():
        wanted = model(**whole(small)).logits[:, -1]
        close(in_turns(model, small)[:, -1], wanted)
        with visibench.prune(model, parse(METHOD)):
            found = in_turns(model, turns)[:, -1]
    close(found, wanted)


@every_kind
def test_later_images_of_a_padded_batch_are_those_of_each_row(kind):
    """Rows are padded in front of each turn; one had no image before, another image stays as it is."""
    model = model_of(kind)
    rows = [([(4, 5)], [(9, 4)], 9), ([], [(2, 2)], 6), ([(7, 1), (3, 6)], [], 7)]
    turns = [[images_of(kind, row[turn], seed=turn, text=row[2]) for turn in (0, 1)] for row in rows]
    first, second = (collate(list(each)) for each in zip(*turns, strict=True))
    mask = torch.cat([first["attention_mask"], second["attention_mask"]], dim=1)
    with torch.no_grad():
        wanted = [model(**whole([smaller(turn) for turn in row])).logits[0, -1] for row in turns]
        with visibench.prune(model, parse(METHOD)):
            cache = model(**first, use_cache=True).past_key_values
            places = (mask.cumsum(1) - 1).clamp(min=0)[:, -second["input_ids"].shape[1] :].expand(3, -1, -1)
            more = {"attention_mask": mask, "position_ids": places}
            found = model(**second | more, past_key_values=cache, use_cache=True).logits[:, -1]
    close(found, torch.stack(wanted))


@every_kind
def test_looked_up_drafts_change_no_answer(kind):
    model, sample = model_of(kind), images_of(kind, [(4, 5)])
    wanted = model.generate(**smaller(sample), **GENERATED)[0, -4:]
    with visibench.prune(model, parse(METHOD)):
        assert model.generate(**sample, **GENERATED, prompt_lookup_num_tokens=2)[0, -4:].tolist() == wanted.tolist()


@every_kind
def test_generation_goes_on_behind_a_cache(kind):
    """A second question about the same image, as ``generate`` is asked it."""
    model, sample = model_of(kind), images_of(kind, [(4, 5)])

    def chat(first):
        cache = model.generate(**first, **GENERATED, return_dict_in_generate=True)
        ids = torch.cat([cache.sequences, LATER], dim=1)
        kinds = (ids == VISUAL).int()
        answer = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=kinds,
            past_key_values=cache.past_key_values,
            **GENERATED,
        )
        return answer[0, first["input_ids"].shape[1] :].tolist()

    wanted = chat(smaller(sample))
    with visibench.prune(model, parse(METHOD)):
        assert chat(sample) == wanted


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_sees_the_same_smaller_image(kind, dtype):
    """Pixels are resized in fp32 and rounded once, as those in the test."""
    model, sample = model_of(kind), images_of(kind, [(9, 4)], dtype=dtype)
    tower, seen = Adapter(model).vision_tower, []
    note = lambda m, args, kwargs: seen.append((args[0], kwargs["grid_thw"]))  # noqa: E731
    model.to(dtype)
    try:
        with torch.no_grad(), visibench.prune(model, parse(METHOD)):
            hook = tower.register_forward_pre_hook(note, with_kwargs=True)
            assert model(**sample).logits.isfinite().all()
    finally:
        hook.remove()
        model.to(torch.float32)
    ((pixels, grids),) = seen
    assert torch.equal(pixels, smaller(sample)["pixel_values"])
    assert torch.equal(grids, smaller(sample)["image_grid_thw"])


@every_kind
def test_what_was_made_of_the_larger_image_beforehand_is_not_used(kind):
    """Positions and lengths for the tower, which a caller may hand over with the images."""
    model, sample = model_of(kind), images_of(kind, [(9, 4)])
    patches = len(sample["pixel_values"])
    made = {"image_cu_seqlens": torch.tensor([0, patches], dtype=torch.int32)}
    with torch.no_grad(), visibench.prune(model, parse(METHOD)):
        close(model(**sample, **made).logits, model(**sample).logits)


@pytest.mark.slow
@every_kind
def test_compute_is_that_of_the_model_on_the_smaller_images(kind):
    """Row by row and part by part; and what the batch executed, by torch's counter."""
    model, samples = model_of(kind, "eager"), rows_of(kind)
    with torch.no_grad():
        with visibench.prune(model, parse("none")) as dense:
            model(**collate([smaller(sample) for sample in samples]))
        with visibench.prune(model, parse(METHOD)) as session, FlopCounterMode(display=False) as counter:
            model(**collate(samples), logits_to_keep=1)
    parts, wanted = (flops.executed(one.trace, one.geometry).components() for one in (session, dense))
    assert parts == wanted
    rotary = [sum(ops.values()) for name, ops in counter.get_flop_counts().items() if name.endswith("rotary_emb")]
    (ran,) = flops.executed_by_batch(session.trace, session.geometry).total()
    assert ran == (counter.get_total_flops() - sum(rotary)) / 2


@pytest.mark.parametrize("share", [0.02, 0.1, 0.25, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(36, 36), (36, 72), (48, 27), (5, 60), (60, 5), (1, 50)], ids=str)
def test_the_grid_is_the_largest_of_the_images_own_aspect(shape, share):
    """Of all grids whose sides are within one of the exact; the processor's own, of as many pixels, is no larger."""
    tokens = shape[0] * shape[1]
    vision, budget = Adapter(model_of("qwen2_vl")).geometry.vision, int(share * tokens)
    _, *found = parse(f"downsample:tokens={budget}").smaller((1, *shape), vision)
    exact = [side * (budget / tokens) ** 0.5 for side in shape]
    if min(exact) < 1:
        assert (min(found), max(found)) == (1, min(budget, max(shape)))
        assert found.index(1) == exact.index(min(exact)) or budget == 1
        return

    def rank(h, w):
        return h * w, -abs(h - exact[0]) - abs(w - exact[1])

    every = [(h, w) for h in range(1, shape[0] + 1) for w in range(1, shape[1] + 1) if h * w <= budget]
    near = [grid for grid in every if all(abs(side - one) < 1 for side, one in zip(grid, exact, strict=True))]
    assert rank(*found) == max(rank(*grid) for grid in near)
    sides = smart_resize(shape[0] * 12, shape[1] * 12, factor=12, min_pixels=1, max_pixels=budget * 144)
    assert found[0] * found[1] >= sides[0] * sides[1] // 144


def test_a_plan_is_that_of_the_smaller_image():
    """36 × 36 tokens become 18 × 18, in windows of 8 patches and a rest of 4."""
    loaded = visibench.load_model("qwen2.5-vl-7b", weights="meta")
    small, dense = (
        planned_prefill(loaded, parse(text), 64, tokens)
        for text, tokens in (("downsample:keep=0.25", 1296), ("none", 324))
    )
    assert small.tower_grids.tolist() == dense.grids.tolist() == [[1, 36, 36]]
    assert flops.executed(small, loaded.geometry).components() == flops.executed(dense, loaded.geometry).components()


@every_kind
def test_videos_are_refused_by_name(kind):
    model = model_of(kind)
    given = {"input_ids": torch.tensor([[5, 6]]), "pixel_values_videos": torch.zeros(16, 3 * 2 * PATCH**2)}
    with (
        visibench.prune(model, parse(METHOD)),
        pytest.raises(UnsupportedModelError, match="downsample acts on the vision side, where frames of a video"),
    ):
        model(**given, video_grid_thw=torch.tensor([[1, 4, 4]]))


def test_pictures_say_that_tokens_are_new():
    model, sample = model_of("qwen2_5_vl"), images_of("qwen2_5_vl", [(4, 5), (2, 2)])
    with visibench.prune(model, parse(METHOD)) as session:
        model(**sample)
    picture = session.trace.show([Image.new("RGB", (60, 48)), Image.new("RGB", (24, 24))])
    assert [shape for (shape,) in picture.places] == [[4, 5, 1, 1, 0], [2, 2, 1, 1, 0]]
    assert [said for said, _ in picture.strips[0].steps()] == ["layers 0–5: 4 + 6 merged"]


@every_kind
def test_nothing_stays_behind(kind):
    model, sample = model_of(kind), images_of(kind, [(4, 5)])
    tower = Adapter(model).vision_tower
    before, hooks = model(**sample).logits, [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tower.modules()]
    with torch.no_grad(), visibench.prune(model, parse(METHOD)):
        model(**sample)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tower.modules()] == hooks
    assert torch.equal(model(**sample).logits, before)
    assert CONFIGS[kind]["vision_config"]["patch_size"] == PATCH


@pytest.mark.parametrize("says", [(1, 2, 2), (1, 4, 5), (1, 8, 5)], ids=["other", "same", "larger"])
def test_a_method_that_makes_other_images_than_it_says_is_told(says):
    class Halved(Method):
        name, hook_points, vision_blocks, positions = "halved", ("image",), (), "renumber"

        def image(self, pixels, grid, vision):
            return pixels[..., ::2, :] if grid != says else pixels

        def smaller(self, grid, vision):
            return says

    told = pytest.raises(VisibenchError, match=r"^halved.image: of images \(1, 6, 48, 60\), \(1, 4, 5\) tokens")
    with visibench.prune(model_of("qwen2_5_vl"), Halved()), told:
        model_of("qwen2_5_vl")(**images_of("qwen2_5_vl", [(4, 5)]))
