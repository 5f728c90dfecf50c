"""Attention weights that a layer would compute, before it runs: what the layer itself then computes."""

from dataclasses import dataclass

import pytest
import torch
import visibench
from families import TEXT
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, LlavaForConditionalGeneration
from visibench.methods import Forward, Method

VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
# Plain; norms on queries and keys; layers without rotation; rotation of a part of each head, and biases.
DECODERS = {
    "llama": {},
    "qwen3": {},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0, 0, 1]},
    "glm4": {"attention_bias": True},
}


@dataclass(frozen=True)
class Look(Method):
    """Keeps everything, and what it looks at."""

    name = "look"
    title = "Look"
    hook_points = ("decoder",)
    looks: object = None

    def begin(self, layout, geometry):
        return self.looks


class Looks(Forward):
    def __init__(self):
        self.seen = []

    def layer_input(self, layer, view):
        self.seen.append(view.preview())


def eager(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, weights in model.named_parameters():
        if weights.ndim == 1:
            torch.nn.init.normal_(weights, mean=float("norm" in name), std=0.3)
    return model


def small_llava(kind):
    llava = AutoConfig.for_model(
        "llava",
        text_config=TEXT | DECODERS[kind] | {"model_type": kind},
        vision_config=VISION | {"model_type": "clip_vision_model", "image_size": 24, "patch_size": 6},
        image_token_id=63,
    )
    model = LlavaForConditionalGeneration._from_config(llava, attn_implementation="eager").eval()
    model.model.language_model = eager(llava.text_config).model
    return model


def two_rows(padded=2):
    ids = torch.randint(3, 60, (2, 30), generator=torch.Generator().manual_seed(1))
    ids[:, 4:20] = 63
    batch = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 24, 24), "attention_mask": torch.ones_like(ids)}
    batch["input_ids"][1, :padded], batch["attention_mask"][1, :padded] = 0, 0
    return batch


@pytest.mark.parametrize("kind", DECODERS)
def test_preview_is_what_the_layer_then_computes(kind):
    """In front of every layer, on the tokens that the model then gives it."""
    model, batch = small_llava(kind), two_rows()
    computed = model(**batch, output_attentions=True).attentions
    looks = Looks()
    with visibench.prune(model, Look(looks=looks)):
        model(**batch)
    seen = looks.seen
    assert len(seen) == len(computed) == TEXT["num_hidden_layers"]
    for preview, attention in zip(seen, computed, strict=True):
        torch.testing.assert_close(preview, attention[:, :, -1:], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("padded", [0, 2])
def test_what_stays_is_projected_once(padded):
    """Keys of all tokens in front of the cut, queries and values of those behind it and of the last ones."""
    model, batch = small_llava("qwen3"), two_rows(padded)
    method = visibench.load_method("pyramiddrop", cuts=(2,), ratios=(0.25,))
    with visibench.prune(model, method), FlopCounterMode(display=False) as counter:
        model(**batch)
    attention = model.model.language_model.layers[2].self_attn
    of = {name: counts for name, counts in counter.get_flop_counts().items() if ".layers.2.self_attn." in name}
    tokens = {"k_proj": 60 - padded, "q_proj": 60 - padded - 24 + 2, "v_proj": 60 - padded - 24 + 2}
    for name, count in tokens.items():
        (flops,) = (sum(counts.values()) for module, counts in of.items() if module.endswith(name))
        assert flops == 2 * count * getattr(attention, name).weight.numel()


def test_what_was_not_taken_over_is_taken_back():
    model, batch = small_llava("llama"), two_rows()
    layer = model.model.language_model.layers[2]
    method = visibench.load_method("pyramiddrop", cuts=(2,), ratios=(0.5,))
    seen = []
    kept = layer.self_attn.k_proj.register_forward_hook(lambda module, args, made: seen.append(made.shape[1]))
    broken = layer.input_layernorm.register_forward_hook(lambda *_: 1 / 0 if seen else None)
    with pytest.raises(ZeroDivisionError), visibench.prune(model, method):
        model(**batch)
    assert seen == [58], "the preview ran, the layer did not"
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]
    broken.remove()
    with visibench.prune(model, method):
        model(**batch)
    assert seen == [58, 58, 42], "hooks of others see both"
    kept.remove()
