"""Images by row, and weights that are spread over devices or packed."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
import visibench
from by_hand import check_cuts
from PIL import Image
from support import make_llava
from visibench.errors import OptionError, UnsupportedModelError
from visibench.evals.settings.method_spec import parse
from visibench.models import weights


def test_images_come_to_the_processor_by_row(monkeypatch):
    """SmolVLM and Gemma 3 refuse a flat list; OneVision takes every image for a lone one, and cuts it into tiles."""
    tiny, seen = visibench.load_model("tiny", device="cpu"), []
    call = type(tiny.processor).__call__

    def spy(processor, **kwargs):
        seen.append(kwargs["images"])
        return call(processor, **kwargs)

    monkeypatch.setattr(type(tiny.processor), "__call__", spy)
    picture = Image.new("RGB", (96, 96))
    inputs = tiny.encoded(["Which two?", "No picture?", "One?"], [[picture, picture], [], [picture]])
    tiny.encoded(["No picture?"], [[]])
    assert [len(row) for row in seen[0]] == [2, 0, 1]
    assert seen[1] is None
    assert inputs["pixel_values"].shape[0] == 3


def test_where_parts_lie_is_recorded():
    tiny = visibench.load_model("tiny", device_map="cpu")
    assert tiny.model.device.type == "cpu"
    assert "device_map" not in tiny.describe()  # all of it in one place
    tiny.model.hf_device_map = {"model.vision_tower": 1, "model.language_model": 0}
    assert tiny.describe()["device_map"] == {"model.vision_tower": "1", "model.language_model": "0"}


def test_a_decoder_on_several_devices_is_refused():
    model = make_llava()
    model.model.language_model.layers[1].to("meta")
    with pytest.raises(UnsupportedModelError, match=r"its decoder lies on cpu, meta.*keeps the decoder together"):
        visibench.prune(model, visibench.load_method("none"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "4bit"}, "needs bitsandbytes"),
        ({"quantization": "2bit"}, "unknown quantization '2bit'"),
        ({"quantization": "8bit", "weights": "meta"}, "leave weights out"),
    ],
)
def test_what_cannot_be_packed_is_refused(options, message, monkeypatch):
    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=message):
        visibench.load_model("tiny", device="cpu", **options)


def test_packing_is_made_where_weights_stay(monkeypatch):
    monkeypatch.setattr(weights, "find_spec", lambda name: object())
    options = weights.placement(None, "8bit", torch.device("cpu"), torch.float32)
    assert options["device_map"] == {"": "cpu"}
    assert options["quantization_config"].load_in_8bit


@pytest.fixture(scope="module", params=["8bit", "4bit"])
def packed(request):
    """``tiny``, its weights packed by bitsandbytes, and a question for it."""
    loaded = visibench.load_model("tiny", device="cpu", attn_implementation="eager", quantization=request.param)
    assert loaded.describe()["quantization"][f"load_in_{request.param}"]
    assert "bitsandbytes" in type(loaded.adapter.layers[0].self_attn.q_proj).__module__
    pixels = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    return loaded, loaded.inputs(["What color is the circle?"], [[Image.fromarray(pixels)]])


with_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


@pytest.mark.slow
@with_bitsandbytes
@torch.no_grad()
def test_a_cut_of_packed_weights_equals_the_models_own_layers_on_gathered_inputs(packed):
    loaded, inputs = packed
    check_cuts(loaded.model, inputs, inputs["input_ids"][0] == loaded.adapter.image_token, "keep")


@pytest.mark.slow
@with_bitsandbytes
@pytest.mark.parametrize("method", ["fastv:keep=0.5", "visipruner@tiny"])
@torch.no_grad()
def test_packed_weights_give_with_a_cache_what_they_give_without(packed, method):
    loaded, inputs = packed
    model, options = loaded.model, {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    dense = model(**inputs).logits
    with visibench.prune(model, parse("fastv:keep=1")):
        assert torch.equal(model(**inputs).logits, dense)
    with visibench.prune(model, parse(method)) as session:
        pruned = model(**inputs).logits
        assert session.trace.visual_counts().sum() < 144 * len(loaded.adapter.layers)
        assert not torch.equal(pruned[:, -1], dense[:, -1])
        cached, plain = (model.generate(**inputs, **options, use_cache=used) for used in (True, False))
    assert cached.tolist() == plain.tolist()
    assert torch.equal(model(**inputs).logits, dense)
