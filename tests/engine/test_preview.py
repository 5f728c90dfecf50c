"""Attention weights that a layer would compute, before it runs: what the layer itself then computes."""

from dataclasses import dataclass

import pytest
import torch
import visibench
from families import TEXT
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


@pytest.mark.parametrize("kind", DECODERS)
def test_preview_is_what_the_layer_then_computes(kind):
    """In front of every layer, on the tokens that the model then gives it."""
    llava = AutoConfig.for_model(
        "llava",
        text_config=TEXT | DECODERS[kind] | {"model_type": kind},
        vision_config=VISION | {"model_type": "clip_vision_model", "image_size": 24, "patch_size": 6},
        image_token_id=63,
    )
    model = LlavaForConditionalGeneration._from_config(llava, attn_implementation="eager").eval()
    model.model.language_model = eager(llava.text_config).model
    ids = torch.randint(3, 60, (2, 30), generator=torch.Generator().manual_seed(1))
    ids[:, 4:20] = 63
    batch = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 24, 24), "attention_mask": torch.ones_like(ids)}
    batch["input_ids"][1, :2], batch["attention_mask"][1, :2] = 0, 0
    computed = model(**batch, output_attentions=True).attentions
    looks = Looks()
    with visibench.prune(model, Look(looks=looks)):
        model(**batch)
    seen = looks.seen
    assert len(seen) == len(computed) == TEXT["num_hidden_layers"]
    for preview, attention in zip(seen, computed, strict=True):
        torch.testing.assert_close(preview, attention[:, :, -1:], atol=1e-6, rtol=1e-5)
