"""Checkpoints whose weights are not those that their configuration asks for."""

import json
import os
import shutil
from contextlib import suppress

import pytest
import torch
import visibench
from safetensors.torch import load_file, save_file
from visibench.errors import DataError, NoRoomError, VisibenchError
from visibench.models.load import fingerprint
from visibench.utils import memory

NORM = "language_model.model.layers.1.input_layernorm.weight"


@pytest.fixture
def folder(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "checkpoint")


def weights(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def text_config(folder, **changes):
    file = folder / "config.json"
    content = json.loads(file.read_text())
    content["text_config"] |= changes
    file.write_text(json.dumps(content))


def without(count):
    def change(tensors):
        for key in sorted(tensors)[:count]:
            del tensors[key]

    return change


def misshapen(tensors):
    tensors[NORM] = torch.ones(3)


BROKEN = {
    "one norm missing": (lambda f: weights(f, lambda t: t.pop(NORM)), r"1 missing: \S*layers\.1\.input_layernorm"),
    "seven missing": (lambda f: weights(f, without(7)), r"7 missing: \S+, \S+, \S+ …"),
    "more layers": (lambda f: text_config(f, num_hidden_layers=20), "missing: .*layers"),
    "fewer layers": (lambda f: text_config(f, num_hidden_layers=1), "unexpected: .*layers"),
    "another width": (lambda f: text_config(f, intermediate_size=77), r"of another shape: \S+ \(\d+×\d+ for \d+×\d+\)"),
    "misshapen": (lambda f: weights(f, misshapen), r"1 of another shape: \S*layers\.1\.input_layernorm.weight \(3 for"),
    "a stranger": (lambda f: weights(f, lambda t: t.update(extra=torch.ones(2))), "1 unexpected: extra"),
}


@pytest.mark.parametrize(
    ("part", "key", "value", "most"),
    [
        ("text_config", "num_hidden_layers", 5_000_000, "2,000"),
        ("text_config", "hidden_size", 10**9, "100,000,000"),
        ("text_config", "vocab_size", 10**12, "100,000,000"),
        ("text_config", "max_position_embeddings", 10**30, "100,000,000"),
        ("vision_config", "num_hidden_layers", 10**7, "2,000"),
        ("vision_config", "image_size", 10**6, "10,000"),
        (None, "vision_feature_layer", [-2, -(10**9)], "2,000"),
    ],
)
def test_sizes_that_no_model_has_are_refused_before_anything_is_made(folder, part, key, value, most, monkeypatch):
    content = json.loads((folder / "config.json").read_text())
    (content[part] if part else content)[key] = value
    (folder / "config.json").write_text(json.dumps(content))
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *_, **__: pytest.fail("made"))
    with pytest.raises(DataError, match=rf"{key} is .* in its config\.json, and no model has more than {most}") as told:
        visibench.load_model(str(folder))
    assert len(str(told.value).splitlines()) == 1
    assert len(str(told.value)) < 500


def test_images_of_sizes_that_no_model_sees_are_refused(folder):
    file = folder / "processor_config.json"
    content = json.loads(file.read_text())
    content["image_processor"]["crop_size"]["height"] = 10**7
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"height is 10,000,000 in its processor_config\.json"):
        visibench.load_model(str(folder))


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.int64, torch.bool])
def test_weights_that_are_whole_numbers_are_those_of_nothing_that_config_says(folder, kind):
    """transformers would take them for what they stand for."""
    weights(folder, lambda tensors: tensors.update({NORM: (100 * tensors[NORM]).to(kind)}))
    with pytest.raises(DataError, match=r"1 of its weights are whole numbers, .*layers\.1\.input_layernorm"):
        visibench.load_model(str(folder))


@pytest.mark.parametrize("kind", BROKEN)
def test_weights_that_do_not_fit_are_refused_by_name(folder, kind, capfd):
    breaks, says = BROKEN[kind]
    breaks(folder)
    with pytest.raises(DataError, match=f"not those of its config.json: .*{says}") as refused:
        visibench.load_model(str(folder))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 700
    assert capfd.readouterr() == ("", ""), "the report is read, not printed"


def test_tied_weights_and_known_buffers_may_be_missing_or_too_many(folder):
    plain = visibench.load_model(str(folder)).model
    head, inner = plain.lm_head.weight, plain.get_input_embeddings().weight

    def old(tensors):
        """As early versions of transformers wrote them, with tied embeddings."""
        tensors.pop("lm_head.weight", None)
        tensors.pop("language_model.lm_head.weight", None)
        tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
        tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(3)[None]

    weights(folder, old)
    with pytest.raises(DataError, match=r"1 missing: lm_head\.weight"):
        visibench.load_model(str(folder))
    text_config(folder, tie_word_embeddings=True)
    content = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(content))
    tied = visibench.load_model(str(folder)).model
    assert tied.lm_head.weight is tied.get_input_embeddings().weight
    assert torch.equal(tied.lm_head.weight, inner)
    assert not torch.equal(head, inner)


FILES = {
    "an LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 13\n",
    "noise": bytes(range(256)) * 9,
    "nothing": b"",
    "half of it": None,
}


@pytest.mark.parametrize("kind", FILES)
def test_weights_that_are_none_are_refused_in_one_line(folder, kind):
    file = folder / "model.safetensors"
    content = FILES[kind]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if content is None else content)
    with pytest.raises(DataError, match=f"cannot load model '{folder}': ") as refused:
        visibench.load_model(str(folder))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", ["", "[]", '{"vision_config": null, "a": [}', '{"model_type": "llava"}'])
def test_other_files_of_a_checkpoint_may_hold_anything(folder, content):
    for file in sorted(folder.glob("*.json")):
        before = file.read_text()
        file.write_text(content)
        with suppress(VisibenchError):
            visibench.load_model(str(folder))
        file.write_text(before)


def test_a_model_that_does_not_fit_into_memory_is_refused_before_it_is_read(folder, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 2**10)
    with pytest.raises(NoRoomError, match=r"takes about 0\.000\d+ GiB, and 9\.54e-07 GiB are free: choose a smaller"):
        visibench.load_model(str(folder))
    assert visibench.load_model("llava-1.5-7b", weights="meta").model.num_parameters() > 7e9
    with pytest.raises(NoRoomError, match="are free"):
        visibench.load_model("llava-1.5-7b", weights="random")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "adapter_config.json"])
def test_pipes_among_a_models_files_are_refused(folder, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    for read in (visibench.load_model, fingerprint):
        with pytest.raises(DataError, match=rf"cannot read .*{name} \(no regular file\)"):
            read(str(folder))


@pytest.mark.parametrize("content", [b"[1]", b"\xff", b"{}"])
def test_an_adapter_that_says_nothing_is_refused_before_anything_runs(tmp_path, content):
    (tmp_path / "adapter_config.json").write_bytes(content)
    with pytest.raises(DataError, match=r"cannot read model|an adapter of type None"):
        fingerprint(str(tmp_path))


def test_generation_settings_that_cannot_be_read_are_refused(folder):
    (folder / "generation_config.json").write_bytes(b"\xd0\x00{")
    for read in (visibench.load_model, fingerprint):
        with pytest.raises(DataError, match=r"cannot read .*generation_config.json \("):
            read(str(folder))
