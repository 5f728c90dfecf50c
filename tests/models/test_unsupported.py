"""What was not tested is refused by name, when a model is loaded and when it is pruned, before anything runs."""

import json

import pytest
import torch
import visibench
from families import TEXT, VISION
from refusals import assert_refused
from support import make_batch, make_llava
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText
from visibench.errors import UnsupportedModelError
from visibench.models.adapters import family_of

CLIP = VISION | {"model_type": "clip_vision_model", "image_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
SIGLIP = CLIP | {"model_type": "siglip_vision_model", "vision_use_head": False}
LLAMA = TEXT | {"model_type": "llama"}
UNTESTED = "text decoder {!r} has not been tested; tested: cohere, cohere2".format


def config(text=LLAMA, vision=CLIP, **own):
    return AutoConfig.for_model("llava", text_config=text, vision_config=vision, image_token_id=63, **own)


def text(kind, **own):
    return TEXT | {"model_type": kind} | own


REFUSED = {
    "gpt_oss": (config(text("gpt_oss", sliding_window=8)), "attention has sinks.*among 128 experts"),
    "embeddings": (
        config(text("gemma3_text", use_bidirectional_attention=True)),
        "text is seen in both directions, so that no answer can be generated",
    ),
    "mixtral": (config(text("mixtral", num_local_experts=4)), "among 4 experts, whose compute is not counted"),
    "qwen3_moe": (config(text("qwen3_moe", num_experts=6)), "among 6 experts"),
    "qwen3_5": (config(text("qwen3_5_text")), "layers attend by linear_attention, not fully"),
    "phi": (config(text("phi")), UNTESTED("phi")),
    "gpt_neox": (config(text("gpt_neox")), UNTESTED("gpt_neox")),
    "olmo2": (config(text("olmo2")), UNTESTED("olmo2")),
    "a patch taken for CLS": (config(vision=SIGLIP), "is 'default' for siglip_vision_model.*with 'full'"),
    "pooling head": (
        config(vision=SIGLIP | {"vision_use_head": True}, vision_feature_select_strategy="full"),
        "pooling head that nothing reads.*set vision_use_head to false",
    ),
    "the first patch of Pixtral's": (
        config(vision=CLIP | {"model_type": "pixtral", "head_dim": 8}),
        "is 'default' for pixtral, which was tested with 'full'",
    ),
    "another tower": (
        config(vision=CLIP | {"model_type": "dinov2"}),
        "vision tower 'dinov2' has not been tested; tested: clip_vision_model, pixtral, siglip_vision_model",
    ),
}
refused = pytest.mark.parametrize(("configuration", "message"), REFUSED.values(), ids=REFUSED)


def refusal(message):
    return pytest.raises(UnsupportedModelError, match=message)


@refused
def test_loading_refuses_before_weights_are_read(configuration, message, tmp_path):
    """The folder holds none."""
    configuration.save_pretrained(tmp_path)
    for weights in ("pretrained", "random", "meta"):
        with refusal(message) as caught:
            visibench.load_model(str(tmp_path), weights=weights)
        assert str(caught.value).startswith(f"{tmp_path} (llava) cannot be pruned: ")
        assert "\n" not in str(caught.value)


@refused
def test_pruning_refuses_before_anything_runs(configuration, message):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(configuration)
    with refusal(f"LlavaForConditionalGeneration .llava. cannot be pruned: .*{message}"):
        visibench.prune(model, visibench.load_method("none"))


def test_the_command_line_says_it_in_one_line(cli, tmp_path):
    config(text("mixtral", num_local_experts=4)).save_pretrained(tmp_path / "mixtral")
    assert_refused(cli("profile", "--model", tmp_path / "mixtral", "--methods", "none"), "among 4 experts")


@pytest.mark.parametrize(
    ("kind", "message"),
    [("mllama", "cross-attention"), ("llama4", "chunks"), ("phi4_multimodal", "LoRA switched by input")],
)
def test_architectures_that_do_not_fit_are_refused_with_the_reason(kind, message, tmp_path):
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with refusal(f"architecture '{kind}' cannot be pruned: .*{message}"):
        visibench.load_model(str(tmp_path), weights="meta")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model_type": "mobilevlm"}, "'mobilevlm' cannot be pruned: is in the format of its authors' code"),
        ({"model_type": "llava_qwen"}, "'llava_qwen' cannot be pruned: .*load the conversion llava-hf/llava-onevision"),
        ({"model_type": "minicpmv", "auto_map": {"AutoConfig": "c.C"}}, "its code comes with its checkpoint"),
        ({"model_type": "internvl_chat", "auto_map": {"AutoConfig": "c.C"}}, "OpenGVLab/InternVL3-8B-hf"),
        ({"model_type": "nosuch"}, "architecture 'nosuch' has no adapter"),
    ],
)
@pytest.mark.parametrize("trusted", [False, True])
def test_checkpoints_that_transformers_does_not_know_are_refused_with_the_reason(content, message, trusted, tmp_path):
    """Not in its words, which offer to run the code that comes with them."""
    (tmp_path / "config.json").write_text(json.dumps(content))
    with refusal(message) as caught:
        visibench.load_model(str(tmp_path), weights="meta", trust_remote_code=trusted)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "instead"), [("llava_llama", "llava-1.5-7b-hf"), ("internvl_chat", "InternVL3-8B-hf")]
)
def test_checkpoints_of_authors_code_lead_to_their_conversions(kind, instead):
    with refusal(instead):
        family_of(kind, "somebody/model")


def test_code_that_comes_with_a_checkpoint_is_refused(monkeypatch):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config())
    monkeypatch.setattr(type(model), "__module__", "transformers_modules.somebody.modeling")
    with refusal("its code came with its checkpoint"):
        visibench.prune(model, visibench.load_method("none"))


def test_windows_are_refused_where_a_kernel_goes_by_places():
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config(text("mistral", sliding_window=8)))
    model.config.text_config._attn_implementation = "flash_attention_2"
    with refusal("attend within a window.*flash_attention_2 goes by places.*attn_implementation='sdpa'"):
        visibench.prune(model, visibench.load_method("none"))


@pytest.mark.parametrize("options", [{}, {"vision_feature_select_strategy": "full", "vision": SIGLIP}], ids=str)
def test_tested_towers_run(options):
    model = AutoModelForImageTextToText.from_config(config(**options)).eval()
    with visibench.prune(model, visibench.load_method("divprune", tokens=5)) as session:
        model(**make_batch([(3, 4, 1)])[0])
    assert set(session.trace.visual_counts()[0].tolist()) == {5}


@pytest.mark.parametrize(
    ("wrap", "instead"),
    [
        (nn.DataParallel, "pass the model inside, model.module"),
        (torch.compile, "pass the model as it was before torch.compile, model._orig_mod"),
    ],
)
def test_wrappers_say_where_the_model_is(wrap, instead):
    with refusal(f"which wraps a model: {instead}"):
        visibench.prune(wrap(make_llava(layers=1)), visibench.load_method("none"))


@pytest.mark.parametrize("name", ["none", "random", "fastv"])
def test_attention_of_an_unknown_kind_is_refused_whatever_the_method_reads(name):
    """Its masks are of another form, behind a cut too."""
    model = make_llava(layers=2, attention="flex_attention")
    with refusal("attention implementation 'flex_attention' cannot be observed; load the model with .*'sdpa'"):
        visibench.prune(model, visibench.load_method(name, **({} if name == "none" else {"keep": 0.5})))


def test_adapters_are_refused_until_they_are_merged():
    """The compute of those beside the weights would not be counted."""
    peft = pytest.importorskip("peft")
    (inputs,), method = make_batch([(3, 4, 1)]), visibench.load_method("fastv", keep=0.5)
    settings = {"r": 2, "init_lora_weights": False}
    tower = peft.LoraConfig(target_modules=r".*vision_tower.*fc1", **settings)
    with refusal("vision block 0 multiplies by 7,328 weights, by its configuration 7,168: merge adapters"):
        visibench.prune(peft.get_peft_model(make_llava(layers=4), tower).get_base_model(), method)
    decoder = peft.LoraConfig(target_modules=r".*language_model.*q_proj", **settings)
    wrapped = peft.get_peft_model(make_llava(layers=4), decoder)
    with refusal("PeftModel, which wraps a model: pass model.merge_and_unload().*model.unload()"):
        visibench.prune(wrapped, method)
    with refusal(
        "decoder layer 0 multiplies by 16,320 weights, by its configuration 16,128: merge adapters such as LoRA"
    ):
        visibench.prune(wrapped.get_base_model(), method)
    adapted = wrapped(**inputs).logits
    model = wrapped.merge_and_unload()
    with visibench.prune(model, visibench.load_method("fastv", keep=1.0)):
        torch.testing.assert_close(model(**inputs).logits, adapted, atol=1e-4, rtol=1e-5)
    assert not torch.allclose(adapted, make_llava(layers=4)(**inputs).logits, atol=1e-2)


def test_layers_taken_away_by_hand_are_noticed():
    model = make_llava(layers=4)
    del model.model.language_model.layers[2]
    with refusal("has 3 decoder layers where its configuration says 4: set the number there"):
        visibench.prune(model, visibench.load_method("none"))
    model = make_llava(layers=4)
    del model.model.vision_tower.encoder.layers[0]
    with refusal("has 2 vision blocks where its configuration says 3"):
        visibench.prune(model, visibench.load_method("none"))


class Packed(nn.Linear):
    """As 4-bit layers keep their weights: two of them in a byte, in one column."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.bias, self.held = linear.bias, linear.weight
        self.weight = nn.Parameter(torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)

    def forward(self, states):
        return nn.functional.linear(states, self.held, self.bias)


def packed(model):
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, Packed(child))
    return model


def int8(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


@pytest.mark.parametrize("packing", [packed, int8])
@pytest.mark.parametrize("name", ["fastv", "pyramiddrop"])
def test_packed_weights_are_counted_as_what_they_stand_for(packing, name):
    (inputs,), runs = make_batch([(3, 4, 1)]), []
    method = visibench.load_method(name, **({"keep": 0.5} if name == "fastv" else {"cuts": (1, 2, 3)}))
    for model in (make_llava(layers=4), packing(make_llava(layers=4))):
        with visibench.prune(model, method) as session:
            model(**inputs)
        runs.append((session.geometry, session.trace.scoring_macs().tolist()))
    (geometry, scoring), of_packed = runs
    assert of_packed == (geometry, scoring)
    assert geometry.vision.projector_macs == 32 * 48 + 48 * 48
    assert geometry.layer_weights == 2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 64
