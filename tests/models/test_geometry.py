"""Models known by their sizes alone, and made-up inputs for them."""

import json

import pytest
import torch
import visibench
from support import IMAGE, make_llava
from visibench.errors import InputError, OptionError
from visibench.models.adapters import Adapter
from visibench.models.geometry import published, synthetic_inputs

CHECKPOINTS = [name for name, entry in published().items() if "checkpoint" in entry]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_parameters_are_as_many_as_the_checkpoint_holds(name):
    loaded = visibench.load_model(name, weights="meta")
    assert sum(weight.numel() for weight in loaded.model.parameters()) == published()[name]["parameters"]
    assert {weight.device.type for weight in loaded.model.parameters()} == {"meta"}
    assert loaded.describe()["weights"] == "meta"
    json.dumps(loaded.describe())


@pytest.mark.parametrize(("name", "tmacs"), [("llava-1.5-7b", 3.817), ("llava-1.5-13b", 7.444)])
def test_sizes_give_the_compute_that_papers_print(name, tmacs):
    """Dense, 576 visual tokens, each layer 4nd² + 2n²d + 3ndm."""
    g, n = visibench.load_model(name, weights="meta").geometry, 576
    layer = 4 * n * g.hidden**2 + 2 * n**2 * g.hidden + 3 * n * g.hidden * g.intermediate
    assert g.layers * layer * 1e-12 == pytest.approx(tmacs, abs=5e-4)
    assert g.vision.tokens == 576


def test_random_weights_need_no_checkpoint_and_no_second_copy(monkeypatch):
    """Every weight is made in the dtype and on the device where it stays."""
    made = []
    original = torch.nn.Parameter.__new__

    def seen(cls, data=None, *args, **kwargs):
        made.append(data.dtype)
        return original(cls, data, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Parameter, "__new__", seen)
    loaded = visibench.load_model("tiny", weights="random", layers=2, device="cpu", dtype="bfloat16")
    assert set(made) == {torch.bfloat16} == {weight.dtype for weight in loaded.model.parameters()}
    assert loaded.geometry.layers == 2
    assert not loaded.model.training
    monkeypatch.undo()
    before = torch.random.get_rng_state()
    again = visibench.load_model("tiny", weights="random", layers=2, device="cpu", dtype="bfloat16")
    assert torch.equal(torch.random.get_rng_state(), before)
    for first, second in zip(loaded.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(first, second)
    pretrained = visibench.load_model("tiny", device="cpu", dtype="bfloat16").model.state_dict()
    embedding = "model.language_model.embed_tokens.weight"
    assert not torch.equal(loaded.model.state_dict()[embedding], pretrained[embedding])


def test_random_weights_run_under_a_method():
    loaded = visibench.load_model("tiny", weights="random", layers=3, device="cpu")
    inputs = loaded.synthetic_inputs(batch=2, prompt=9, visual_tokens=288)
    with visibench.prune(loaded.model, visibench.load_method("fastv", keep=0.5)) as session, torch.inference_mode():
        assert loaded.model(**inputs).logits.isfinite().all()
    assert session.trace.visual_counts().tolist() == [[288, 288, 144]] * 2


def test_made_up_inputs_have_the_asked_lengths():
    model = make_llava(layers=1)
    inputs = synthetic_inputs(Adapter(model), batch=3, prompt=7, visual_tokens=32)
    ids = inputs["input_ids"]
    assert ids.shape == inputs["attention_mask"].shape == (3, 39)
    assert (ids == IMAGE).nonzero()[:, 1].view(3, 32).tolist() == [list(range(3, 35))] * 3
    assert inputs["pixel_values"].shape == (6, 3, 24, 24)
    assert not torch.equal(ids[0], ids[1])
    assert model(**inputs).logits.shape == (3, 39, 64)
    assert torch.equal(synthetic_inputs(Adapter(model), 3, 7, 32)["input_ids"], ids)
    text = synthetic_inputs(Adapter(model), batch=1, prompt=4, visual_tokens=0)
    assert "pixel_values" not in text
    assert text["input_ids"].shape == (1, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"visual_tokens": 20}, "multiple"),
        ({"visual_tokens": -16}, "visual tokens >= 0"),
        ({"prompt": 1}, "prompt >= 2"),
        ({"batch": 0}, "batch >= 1"),
    ],
)
def test_inputs_that_cannot_be_made_up_say_why(options, message):
    with pytest.raises(InputError, match=message):
        synthetic_inputs(Adapter(make_llava(layers=1)), **{"batch": 1, "prompt": 4, "visual_tokens": 16} | options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llava-1.5-7b", {}, "give weights random or meta, or load the checkpoint llava-hf/llava-1.5-7b-hf"),
        ("llava-cpu", {}, "give weights random or meta$"),
        ("tiny", {"layers": 2}, "cannot be cut"),
        ("tiny", {"weights": "zero"}, "unknown weights 'zero'"),
        ("tiny", {"weights": "meta", "layers": 99}, r"layers must lie in 1 … \d+ here, not 99"),
    ],
)
def test_what_cannot_be_built_says_why_in_one_line(name, options, message):
    with pytest.raises(OptionError, match=message) as caught:
        visibench.load_model(name, **options)
    assert "\n" not in str(caught.value)


def test_questions_need_a_processor():
    with pytest.raises(InputError, match="no processor"):
        visibench.load_model("llava-cpu", weights="meta").inputs(["Is there a ring?"], [[]])
