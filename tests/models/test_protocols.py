"""Protocols: how a model is asked, against what LLaVA's own code does."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import visibench
from PIL import Image
from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil, Qwen2VLImageProcessor
from visibench.errors import DataError, InputError, OptionError, UnknownNameError
from visibench.models.protocols import HF, Protocol, find, packaged

WIDE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8))
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)


class Processor:
    """As much of one as prompts need; ``chat_template``: keeps or drops system turns."""

    image_token = "<image>"

    def __init__(self, chat_template=None):
        self.chat_template = chat_template

    def apply_chat_template(self, turns, add_generation_prompt):
        kept = [turn for turn in turns if turn["role"] != "system" or self.chat_template == "keeps"]
        return "|".join(part.get("text", "<image>") for turn in kept for part in turn["content"]) + "|"


def test_llava_is_asked_as_its_own_code_asks():
    """conv_vicuna_v1 of haotian-liu/LLaVA: system, a space, USER: <image>\\nquestion ASSISTANT:"""
    prompt = find("llava-1.5").prompt(Processor("keeps"), "What {is} it?", 1)
    assert prompt == f"{VICUNA} USER: <image>\nWhat {{is}} it? ASSISTANT:"
    assert HF.prompt(Processor("keeps"), "What?", 2) == "<image>|<image>|What?|"
    assert HF.prompt(Processor(), "What?", 1) == "USER: <image>\nWhat? ASSISTANT:"
    assert HF.template_of(Processor()).startswith("none of the checkpoint's")


def test_padded_images_are_those_of_transformers_own_port_of_llavas_padding():
    """With the settings of the hub's llava-1.5: shortest edge resized, centre cropped, which cuts both sides off."""
    processor = Processor()
    processor.image_processor = CLIPImageProcessorPil(size={"shortest_edge": 84}, crop_size=84)
    port = LlavaImageProcessorPil(size={"shortest_edge": 84}, crop_size=84, do_pad=True)
    read = lambda processor, images: torch.as_tensor(processor(images, return_tensors="pt")["pixel_values"])  # noqa: E731
    for image in (WIDE, WIDE.rotate(90, expand=True), WIDE.resize((50, 50))):
        ours = read(processor.image_processor, find("llava-1.5").shaped(processor, [image]))
        assert torch.equal(ours, read(port, [image]))
        plain = read(processor.image_processor, HF.shaped(processor, [image]))
        assert torch.equal(ours, plain) is (image.width == image.height)


def test_a_system_text_is_a_turn_of_the_chat_template_or_refused():
    mine = Protocol(name="mine", system="Look.")
    assert mine.prompt(Processor("keeps"), "What?", 1) == "Look.|<image>|What?|"
    assert mine.prompt(Processor(), "What?", 1) == "Look. USER: <image>\nWhat? ASSISTANT:"
    with pytest.raises(InputError, match="leaves out its system text: give a template too"):
        mine.prompt(Processor("drops"), "What?", 1)


def test_pixel_limits_decide_how_many_patches_an_image_has_and_need_a_processor_that_knows_them():
    processor = Processor()
    processor.image_processor = Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280})
    image = Image.new("RGB", (1120, 1120))
    counts = []
    for limit in (None, 28 * 28 * 64):
        Protocol(max_pixels=limit).set_up(processor)
        counts.append(int(processor.image_processor(images=[image], return_tensors="pt")["image_grid_thw"].prod()))
    assert counts == [70 * 70, 16 * 16]  # sides of 980 and 224 pixels
    with pytest.raises(OptionError, match=r"protocol hf sets max_pixels, which CLIPImageProcessor.* does not know"):
        visibench.load_model("tiny", device="cpu", weights="meta", protocol=Protocol(max_pixels=1000))


def test_protocols_of_a_file_extend_others(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("mine: {extends: llava-1.5, max_new_tokens: 24}\nmore: {extends: mine, system: Look.}\n")
    mine, more = find(f"{file}:mine"), find(f"{file}:more")
    assert (mine.image_aspect, mine.max_new_tokens, mine.name) == ("pad", 24, "mine")
    assert (more.image_aspect, more.max_new_tokens, more.system) == ("pad", 24, "Look.")
    assert find(mine.record()) == mine.model_copy(update={"about": "", "source": ""})
    assert (HF.record(), find("hf").record()) == ({}, {})
    assert all(find(name).about for name in packaged())


@pytest.mark.parametrize(
    ("text", "reference", "error", "message"),
    [
        (None, "lava-1.5", UnknownNameError, "did you mean 'llava-1.5'"),
        (None, "mine.yaml", DataError, "no protocols in mine.yaml"),
        ("a: {extends: [x]}", "mine.yaml:a", OptionError, "extends: expected the name of a protocol"),
        ("1: {}\na: {extends: b}", "mine.yaml:a", UnknownNameError, "no protocol 'b'"),
        ("a: {sistem: x}", "mine.yaml", OptionError, "protocol a: sistem: did you mean 'system'"),
        ("a: {max_new_tokens: 0}", "mine.yaml", OptionError, "max_new_tokens: input should be greater"),
        ("a: {}\nb: {}", "mine.yaml", OptionError, "holds 2 protocols: name one"),
        ("a: {extends: a}", "mine.yaml", OptionError, "extends itself"),
        ("- a", "mine.yaml", DataError, "holds no protocols"),
        ("a: {}", "mine.yaml:b", UnknownNameError, "no protocol 'b' in mine.yaml"),
    ],
)
def test_unusable_protocols_are_refused_in_one_line(text, reference, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("mine.yaml").write_text(text)
    with pytest.raises(error, match=message):
        find(reference)


def test_the_page_explains_every_key():
    page = (Path(visibench.__file__).parent / "docs" / "protocols.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| [^|]* \| (.*) \|$", page, re.MULTILINE))
    assert set(Protocol.model_fields) - {"name"} | {"extends"} == set(rows)
