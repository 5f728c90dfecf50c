"""Every method against vectors recorded from its authors' code: same tokens, same caches, same logits."""

import json

import numpy as np
import pytest
import torch
import visibench
from support import GOLDEN

MANIFEST = json.loads((GOLDEN / "manifest.json").read_text())


def visipruner_options(entry):
    config = entry["config"]
    renamed = {
        "stages": "mode",
        "shallow_layers": "shallow_mid_layer",
        "layer_threshold": "layer_threshold",
        "token_threshold": "tokens_threshold",
    }
    options = {ours: config[theirs] for ours, theirs in renamed.items() if theirs in config}
    return options | ({"layer0": entry["model_size"]} if "shallow" in config["mode"] else {})


def cases(name):
    for config, entry in MANIFEST[name]["configs"].items():
        for case in entry["margins"]:
            yield pytest.param(config, case, entry, id=f"{name}-{config}-{case}")


def check(model, inputs, method, vectors, prefix, case, kv_lengths):
    embeddings = inputs[f"inputs_embeds_{case}"].reshape(1, -1, 32)
    end = 35 + vectors[f"{prefix}.kept"].shape[1]
    layout = visibench.TokenLayout.from_spans(embeddings.shape[1], visual=[(35, end)])
    with visibench.prune(model, method, layout=layout) as session:
        out = model(inputs_embeds=embeddings, use_cache=True)
        trace = session.trace
        kept = torch.cat([trace.kept(layer) for layer in range(32)]).numpy()
        np.testing.assert_array_equal(kept, vectors[f"{prefix}.kept"])
        np.testing.assert_array_equal(trace.kv_lengths()[0], kv_lengths)
        cached = [layer.keys.shape[-2] for layer in out.past_key_values.layers]
        np.testing.assert_array_equal(cached, kv_lengths)
        np.testing.assert_allclose(out.logits[0, -1], vectors[f"{prefix}.last_logits"], atol=1e-4)
        if f"{prefix}.text_logits" in vectors:
            text = vectors[f"{prefix}.text_logits"]
            np.testing.assert_allclose(out.logits[0, -len(text) :], text, atol=1e-4)
        for token, logits in zip(inputs["forced_ids"].flatten(), vectors[f"{prefix}.decode_logits"], strict=True):
            step = model(input_ids=token.view(1, 1), past_key_values=out.past_key_values, use_cache=True)
            np.testing.assert_allclose(step.logits[0, -1], logits, atol=1e-4)


@pytest.mark.parametrize(("config", "case", "entry"), cases("visipruner"))
def test_visipruner(golden_llama, golden_inputs, config, case, entry):
    vectors, prefix = np.load(GOLDEN / "visipruner.npz"), f"{config}.{case}"
    dense = entry["config"] is None
    method = visibench.load_method("none") if dense else visibench.load_method("visipruner", **visipruner_options(entry))
    check(golden_llama, golden_inputs, method, vectors, prefix, case, vectors[f"{prefix}.kv_len"])


@pytest.mark.parametrize(("config", "case", "entry"), cases("fastv"))
def test_fastv(golden_llama, golden_inputs, config, case, entry):
    vectors, prefix = np.load(GOLDEN / "fastv.npz"), f"{config}.{case}"
    method = visibench.load_method("fastv", layer=entry["K"], tokens=entry["n_keep"])
    lengths = vectors[f"{prefix}.kv_len"].copy()
    lengths[entry["K"] - 1] //= 2  # recorded twice by the authors' class
    check(golden_llama, golden_inputs, method, vectors, prefix, case, lengths)
