"""Images and questions as users hand them over: the same as Pillow and transformers make of them, or one clear line."""

import io
from types import SimpleNamespace

import numpy as np
import processors
import pytest
import torch
import visibench
from PIL import Image
from transformers import LlamaConfig
from visibench.errors import DataError, InputError
from visibench.models import LoadedModel
from visibench.models.inputs import as_rgb

SIDE = 144
RAMP = np.arange(SIDE * SIDE, dtype=np.uint16).reshape(SIDE, SIDE) // 81
GREY = Image.fromarray(RAMP.astype(np.uint8))
COLOUR = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8))


@pytest.fixture(scope="module")
def tiny():
    return visibench.load_model("tiny", device="cpu")


def pixels(tiny, image):
    return tiny.inputs(["What color is it?"], [[image]])["pixel_values"]


def reopened(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return Image.open(stream)


# ---- images ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_mean_what_their_8_bits_do(tiny, kind):
    deep = reopened(Image.fromarray(RAMP * 257), kind)
    assert deep.mode == "I;16"
    assert torch.equal(pixels(tiny, deep), pixels(tiny, GREY))


def test_16_bits_are_rounded_to_the_nearest_of_8():
    values = np.array([[0, 128, 129, 385, 386, 32767, 65406, 65407, 65535]], dtype=np.uint16)
    expected = [round(value / 257) for value in values[0].tolist()]
    for order in ("<u2", ">u2"):
        image = Image.frombytes("I;16" if order == "<u2" else "I;16B", (9, 1), values.astype(order).tobytes())
        assert np.asarray(as_rgb(image))[0, :, 0].tolist() == expected


# EXIF's orientations, as operations on rows and columns of the stored image.
UPRIGHT = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a.swapaxes(0, 1), 2),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_images_are_turned_as_their_exif_data_say(tiny, orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    photo = reopened(COLOUR, "PNG", exif=exif)
    turned = Image.fromarray(np.ascontiguousarray(UPRIGHT[orientation](np.asarray(COLOUR))))
    assert torch.equal(pixels(tiny, photo), pixels(tiny, turned))
    # lmms-eval's tasks convert, which keeps the tag; what is turned already has none.
    assert torch.equal(pixels(tiny, photo.convert("RGB")), pixels(tiny, turned))
    assert as_rgb(as_rgb(photo)).size == turned.size


@pytest.mark.parametrize("mode", ["1", "L", "P", "PA", "LA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I"])
def test_other_modes_are_what_pillow_makes_of_them(tiny, mode):
    image = (COLOUR if mode != "PA" else COLOUR.convert("P")).convert("L" if mode == "I" else mode).convert(mode)
    assert image.mode == mode
    assert torch.equal(pixels(tiny, image), pixels(tiny, image.convert("RGB")))


def test_paths_and_arrays_are_the_images_they_hold(tiny, tmp_path):
    COLOUR.save(tmp_path / "colour.png")
    for image in (tmp_path / "colour.png", str(tmp_path / "colour.png"), np.asarray(COLOUR)):
        assert torch.equal(pixels(tiny, image), pixels(tiny, COLOUR))
    for array in (np.asarray(GREY), np.asarray(GREY)[..., None]):
        assert torch.equal(pixels(tiny, array), pixels(tiny, GREY))


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([COLOUR], InputError, r"images\[0\] is a Image, not the list of images of question 0: give \[\[image\], …\]"),
        (["a.png"], InputError, r"images\[0\] is a str, not the list"),
        ([np.asarray(GREY)], InputError, r"images\[0\] is a ndarray, not the list"),
        ([[COLOUR, Image.new("RGB", (0, 0))]], InputError, r"images\[0\]\[1\]: an image of 0 × 0 pixels"),
        ([[np.zeros((0, 5, 3), np.uint8)]], InputError, "an image of 5 × 0 pixels"),
        ([[RAMP]], InputError, r"an array of uint16 \(144, 144\): give uint8"),
        (
            [[np.zeros((3, 5, 7), np.uint8)]],
            InputError,
            r"\(3, 5, 7\): give uint8, .height, width. or .height, width, 3",
        ),
        ([[None]], InputError, r"images\[0\]\[0\]: cannot use a NoneType: give a PIL image, a path or a uint8 array"),
        ([[Image.new("F", (4, 4), 0.5)]], InputError, "mode F with values from 0.5 to 0.5: scale it to 8 bits first"),
        ([[Image.new("I", (4, 4), 300)]], InputError, "mode I with values from 300 to 300: scale it to 8 bits first"),
        ([[Image.new("La", (4, 4))]], InputError, "mode La cannot be made RGB .*convert it first"),
        ([["missing.png"]], DataError, "cannot read image 'missing.png': No such file or directory"),
        ([[__file__]], DataError, "cannot read image .*test_inputs.py': not an image"),
    ],
)
def test_what_is_no_image_says_so_in_one_line(tiny, images, error, message):
    with pytest.raises(error, match=message) as caught:
        tiny.inputs(["What?"], images)
    assert "\n" not in str(caught.value)


def test_half_a_file_says_so(tiny, tmp_path):
    COLOUR.save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    with pytest.raises(DataError, match=r"cannot read image .*half\.png': .*truncated"):
        tiny.inputs(["What?"], [[tmp_path / "half.png"]])


# ---- questions ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llava", "internvl", "qwen2_5_vl"])
def asked(request):
    """A processor without a model: 16 tokens for a square image."""
    return LoadedModel("processor", SimpleNamespace(config=LlamaConfig()), processors.PROCESSORS[request.param](24))


@pytest.mark.parametrize("images", [0, 1, 2])
def test_an_image_token_in_a_question_is_text(asked, images):
    """Neither one more image nor a crash: the prompt reads as that of a user who writes the token with a space."""
    processor, squares = asked.processor, [Image.new("RGB", (24, 24), "red")] * images
    tokens = [processor.image_token, *filter(None, [getattr(processor, "video_token", None)])]
    question = "Is " + " like ".join(tokens) + "?"
    spaced = "Is " + " like ".join(f"{token[0]} {token[1:]}" for token in tokens) + "?"
    got, expected = (asked.encoded([text], [squares]) for text in (question, spaced))
    assert got["input_ids"].tolist() == expected["input_ids"].tolist()
    special = processor.tokenizer.convert_tokens_to_ids(tokens)
    assert [(got["input_ids"] == token).sum().item() for token in special] == [16 * images, 0][: len(special)]
    assert processor.tokenizer.decode(got["input_ids"][0]).endswith(f"{spaced} ASSISTANT:")
    assert ("pixel_values" in got) == bool(images)


@pytest.mark.parametrize("template", ["", "{{ bos_token }}"])
def test_prompts_begin_with_one_bos(asked, template):
    """As transformers tokenises the same conversation."""
    processor = asked.processor
    own, processor.chat_template = processor.chat_template, template + processor.chat_template
    red = Image.new("RGB", (24, 24), "red")
    parts = [{"type": "image", "image": red}, {"type": "text", "text": "Is it red?"}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    expected = processor.apply_chat_template([{"role": "user", "content": parts}], **options)
    got = asked.encoded(["Is it red?"], [[red]])
    processor.chat_template = own
    assert got["input_ids"].tolist() == expected["input_ids"].tolist()
    assert got["input_ids"][0].tolist().count(1) == 1
    assert got["input_ids"][0, 0] == 1


def test_answers_of_tiny_to_ordinary_inputs_stay(tiny):
    """One BOS, and the pixels that Pillow's own conversion gives."""
    image, question = Image.effect_noise((200, 120), 90), "What color is the circle?"
    text = "A chat between a user and an assistant. USER: <image>\nWhat color is the circle? ASSISTANT:"
    expected = tiny.processor(text=[text], images=[image.convert("RGB")], return_tensors="pt")
    got = tiny.encoded([question], [[image]])
    for name in ("input_ids", "pixel_values"):
        assert torch.equal(got[name], expected[name])


def test_questions_that_are_no_text_are_named(tiny):
    for question in (None, 7, ["What?"]):
        with pytest.raises(InputError, match=rf"questions\[1\] is a {type(question).__name__}, not text"):
            tiny.inputs(["What?", question], [[COLOUR], [COLOUR]])
