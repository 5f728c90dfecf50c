"""Comparing a method on the golden decoder with the vectors recorded from its authors' code."""

import json

import numpy as np
import pytest
import torch
import visibench
from support import GOLDEN

MANIFEST = json.loads((GOLDEN / "manifest.json").read_text())


def cases(name):
    for config, entry in MANIFEST[name]["configs"].items():
        for case in entry["margins"]:
            yield pytest.param(config, case, entry, id=f"{name}-{config}-{case}")


def check(model, inputs, method, vectors, prefix, case, kv_lengths):
    """Kept sets, KV lengths and logits of one configuration ``prefix``, in prefill and in forced decode steps."""
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
