"""Where visual tokens lie in images: closed forms of each family, and pixels of the pictures."""

from copy import deepcopy
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import units
from decoders import decoder_model
from families import model_of
from PIL import Image
from visibench.models.adapters import FAMILIES
from visibench.reports.image_loader import DIMMED, dimmed
from visibench.utils.token_grids import placed, size, views

TILED = SimpleNamespace(
    crop_to_patches=False, min_patches=1, max_patches=12, size={"height": 48, "width": 48}
)  # as the processor of InternVL


def places_of(kind, sizes, inputs=None):
    config = units.model_of(kind).config
    return [FAMILIES[kind].views(config, TILED, inputs or {}, number, one) for number, one in enumerate(sizes)]


def only(token, places):
    """The views in which the token alone stays, as (view, row, column) of what is drawn, and loose tokens kept."""
    kept = np.arange(size(places)) == token
    found = [(k, *map(int, cell)) for k, view in enumerate(views(kept, places)) for cell in np.argwhere(view.cells)]
    return found, sum(view.loose_kept for view in views(kept, places))


def test_tiles_lie_where_the_canvas_has_them():
    places = places_of("internvl", [(96, 48)])  # twice as wide as high: two tiles side by side, and the whole again
    assert size(places) == 3 * 16
    assert only(5, places) == ([(0, 1, 1)], 0)
    assert only(16 + 6, places) == ([(0, 1, 4 + 2)], 0)
    assert only(32 + 7, places) == ([(1, 1, 3)], 0)


def test_newlines_are_no_patch():
    places = places_of(
        "llava_next", [(96, 48)]
    )  # wide: a canvas of 24 × 48 pixels, 4 × 8 patches, and the base of 4 × 4
    assert size(places) == 16 + 4 * 9
    assert only(6, places) == ([(0, 1, 2)], 0)
    assert only(16 + 9 + 7, places) == ([(1, 1, 7)], 0)
    assert only(16 + 8, places) == ([], 1)
    assert list(views([True] * 52, places))[1].about == "4 × 8 tokens; of 4 that are no patch 4 stayed"


@pytest.mark.parametrize("original", [(96, 48), (48, 96), (40, 40), (100, 31), (31, 100)])
def test_views_hold_as_many_tokens_as_the_model_makes(original):
    model, (places,) = model_of("llava_next"), places_of("llava_next", [original])
    down, across = (2, 2) if original == (40, 40) else (1, 2) if original[0] > original[1] else (2, 1)
    features = model.get_image_features(
        torch.zeros(1, 1 + down * across, 3, 24, 24), torch.tensor([original[::-1]])
    ).pooler_output
    assert len(features[0]) == size([places])


def test_several_rectangles_one_after_the_other():
    grids = {"image_grid_thw": torch.tensor([[1, 6, 10], [1, 4, 2]])}
    places = places_of("qwen2_5_vl", [(60, 36), (12, 24)], grids)
    assert places == [[[3, 5, 1, 1, 0]], [[2, 1, 1, 1, 0]]]
    assert only(7, places) == ([(0, 1, 2)], 0)
    assert only(16, places) == ([(1, 1, 0)], 0)
    kept = np.arange(17) == 7
    view, second = views(kept, places)
    assert (view.image, second.image) == (0, 1)
    assert not second.cells.any()
    picture = np.asarray(dimmed(Image.new("RGB", (50, 30), (200, 200, 200)), view.cells))
    expected = np.full((30, 50, 3), round(200 * DIMMED))
    expected[10:20, 20:30] = 200
    assert np.abs(picture.astype(int) - expected).max() <= 1


def test_places_that_do_not_fit_are_not_drawn():
    assert placed([[[2, 3, 1, 1, 0]]], 6, [0], whole=True) == [[[2, 3, 1, 1, 0]]]
    assert placed([[[2, 3, 1, 1, 0]]], 7, [0], whole=True) == []
    assert placed([[[2, 3, 1, 1, 0]]], 6, [0, 0], whole=True) == []
    assert placed([[[2, 3, 1, 1, 0]]], 6, [0], whole=False) == []
    assert placed([], 16, [4], whole=True) == [[[4, 4, 1, 1, 0]]]


# ---- the order of tokens, asked of the models themselves ----------------------------------------------------------


def tiled(model, side, image, made=None):
    """(the model, its own image processor, its inputs, visual tokens) of an image cut into tiles of one size."""
    from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor

    processor = (made or GotOcr2ImageProcessor)(size={"height": side, "width": side})
    inputs = processor(images=[image], crop_to_patches=True, return_tensors="pt")  # as the families' processors call it
    return model, processor, inputs, model.get_image_features(inputs["pixel_values"]).pooler_output.flatten(0, 1)


def internvl(image):
    return tiled(model_of("internvl"), 48, image)


def aya_vision(image):
    return tiled(decoder_model("aya_vision", "sdpa"), 24, image)


def cohere2_vision(image):
    from transformers import Cohere2VisionImageProcessor

    return tiled(decoder_model("cohere2_vision", "sdpa"), 24, image, Cohere2VisionImageProcessor)


def qwen2_5_vl(image):
    """The same with Qwen2.5-VL, whose vision tower sorts patches into windows and back."""
    from transformers import Qwen2VLImageProcessor

    model, size = model_of("qwen2_5_vl"), {"shortest_edge": 1, "longest_edge": 10**6}
    processor = Qwen2VLImageProcessor(patch_size=6, merge_size=2, temporal_patch_size=2, size=size)
    inputs = processor(images=[image], return_tensors="pt")
    features = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output[0]
    return model, processor, inputs, features


def shuffled(kind, made, image):
    """The same with SmolVLM or Idefics3: tiles of 24 pixels and 2 × 2 tokens, then the whole."""
    model, processor = units.model_of(kind), made(size={"longest_edge": 72}, max_image_size={"longest_edge": 24})
    inputs = processor(images=[[image]], return_tensors="pt")
    return model, processor, inputs, torch.cat(list(model.get_image_features(**inputs).pooler_output))


def smolvlm(image):
    from transformers import SmolVLMImageProcessor

    return shuffled("smolvlm", SmolVLMImageProcessor, image)


def idefics3(image):
    from transformers import Idefics3ImageProcessor

    return shuffled("idefics3", Idefics3ImageProcessor, image)


@cache
def limited_to_one_tile():
    model = deepcopy(units.model_of("llava_onevision"))
    model.config.vision_aspect_ratio = "anyres_max_1"
    return model


def llava_onevision(image):
    """The same with LLaVA-OneVision, which makes the grid of more than one tile smaller."""
    from transformers import LlavaOnevisionImageProcessor

    model = limited_to_one_tile()
    shapes = model.config.image_grid_pinpoints
    processor = LlavaOnevisionImageProcessor(size={"height": 24, "width": 24}, image_grid_pinpoints=shapes)
    inputs = processor(images=[image], return_tensors="pt")
    features = model.get_image_features(
        inputs["pixel_values"], inputs["image_sizes"], vision_aspect_ratio=model.config.vision_aspect_ratio
    )
    return model, processor, inputs, features.pooler_output[0]


@torch.no_grad()
@pytest.mark.parametrize(
    ("features", "width", "height", "shapes"),
    [
        (internvl, 144, 96, [(8, 12), (4, 4)]),  # 3 × 2 tiles, and all of it once more
        (internvl, 48, 144, [(12, 4), (4, 4)]),
        (internvl, 48, 48, [(4, 4)]),
        (aya_vision, 24, 48, [(4, 2), (2, 2)]),
        (cohere2_vision, 60, 48, [(4, 6), (2, 2)]),  # 3 × 2 tiles, by its own choice
        (qwen2_5_vl, 84, 60, [(5, 7)]),  # windows of 2 × 2 tokens do not fill it
        (qwen2_5_vl, 36, 108, [(9, 3)]),
        (smolvlm, 72, 48, [(4, 6), (2, 2)]),
        (smolvlm, 30, 120, [(6, 2), (2, 2)]),
        (idefics3, 96, 60, [(4, 6), (2, 2)]),
        (llava_onevision, 48, 48, [(4, 4), (4, 4)]),  # 8 × 8 tokens, made smaller
        (llava_onevision, 48, 24, [(4, 4), (2, 5)]),
    ],
)
def test_a_token_answers_to_the_place_where_it_is_drawn(features, width, height, shapes):
    """Where pixels change, the token that changes most is the one drawn there, in each view of the image."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    model, processor, inputs, before = features(Image.fromarray(pixels))
    places = [FAMILIES[features.__name__].views(model.config, processor, inputs, 0, (width, height))]
    assert [view.cells.shape for view in views([True] * size(places), places)] == shapes
    assert len(before) == size(places)
    for number, (rows, columns) in enumerate(shapes):
        for row, column in list(np.ndindex(rows, columns))[::5]:
            changed = pixels.copy()
            area = changed[row * height // rows : (row + 1) * height // rows, column * width // columns :]
            area[:, : width // columns] ^= 255
            moved = (features(Image.fromarray(changed))[-1] - before).norm(dim=-1).numpy()
            own = np.concatenate([np.full(size([[view]]), k == number) for k, view in enumerate(*places)])
            ((view, *cell),) = only(int(np.where(own, moved, -1).argmax()), places)[0]
            assert (view, cell) == (number, [row, column])


def test_of_several_images_onevision_keeps_squares_and_a_newline():
    several = {"batch_num_images": [1, 2]}
    alone, *others = places_of("llava_onevision", [(48, 48)] * 3, several)
    assert alone == [[4, 4, 1, 1, 0], [8, 8, 1, 1, 1]]
    assert others == [[[4, 4, 1, 1, 0], [1, 0, 1, 1, 1]]] * 2
    assert size(others) == 2 * 17
    assert only(17 + 5, others) == ([(1, 1, 1)], 0)
    assert only(16, others)[0] == []
