"""Hidden states read as tokens: as the model's own LM head reads them, with its scale and cap."""

import pytest
import torch
from decoders import CONFIGS, KINDS, decoder_model, rows_of
from families import TEXT
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from visibench.models.adapters import Adapter
from visibench.models.geometry import synthetic_inputs

CAPPED = {"final_logit_softcapping": 0.5}
BARE = {
    "cohere": {"logit_scale": 0.0625},
    "cohere2": {"logit_scale": 0.25},
    "gemma2": CAPPED,
    "gemma3_text": CAPPED,
    "granite": {"logits_scaling": 8.0},
    "llama": {},
}


def check(model, inputs):
    adapter, states = Adapter(model), []
    hook = adapter.decoder.norm.register_forward_pre_hook(lambda module, args: states.append(args[0]))
    with torch.no_grad():
        logits = model(**inputs).logits
        hook.remove()
        torch.testing.assert_close(adapter.read(states[0]), logits)


@pytest.mark.parametrize("kind", BARE)
def test_bare_decoders(kind):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **TEXT, **BARE[kind])
    check(AutoModelForCausalLM.from_config(config).eval(), {"input_ids": torch.arange(3, 12)[None]})


@pytest.mark.parametrize("kind", KINDS)
def test_families(kind):
    model = decoder_model(kind)
    check(model, synthetic_inputs(Adapter(model), 1, *rows_of(kind)[0]))


@pytest.mark.parametrize(
    ("kind", "own"), [("gemma3", CAPPED), ("paligemma", CAPPED), ("aya_vision", {"logit_scale": 0.25})]
)
def test_families_whose_text_configuration_has_a_scale_or_a_cap(kind, own):
    """Some of transformers' models with images do as it says, others do not: the model itself is asked."""
    text = CONFIGS[kind]["text_config"] | own
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **CONFIGS[kind] | {"text_config": text})
    model = AutoModelForImageTextToText.from_config(config).eval()
    check(model, synthetic_inputs(Adapter(model), 1, *rows_of(kind)[0]))
