"""Plain layers on a method's schedule: each gets as many tokens as the method left it, and nothing else happens."""

import pytest
import torch
import visibench
from visibench.evals.compute import attainable
from visibench.evals.settings.method_spec import parse
from visibench.models import LoadedModel


@pytest.mark.parametrize("text", ["fastv:keep=0.5,layers=scaled", "staged:enter=3,exit=7", "divprune:keep=0.5"])
def test_plain_layers_get_the_tokens_that_the_method_left(llava, text):
    loaded, method, seen = LoadedModel("miniature", llava, None, "random"), parse(text), []
    inputs = loaded.synthetic_inputs(2, 10, 16)
    with torch.inference_mode():
        with visibench.prune(llava, method) as session:
            llava(**inputs)
        plan = attainable.schedule(session.trace, method, loaded)
        hooks = [
            layer.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
            for layer in loaded.adapter.layers
        ]
        assert attainable.time_plain(loaded, inputs, plan) > 0
    for hook in hooks:
        hook.remove()
    assert seen == plan == session.trace.kv_lengths()[0].tolist()
    assert not any(layer._forward_pre_hooks for layer in loaded.adapter.layers)


def test_methods_that_change_the_tower_have_no_plain_schedule(llava):
    method = parse("tome:keep=0.5")
    loaded = LoadedModel("miniature", llava, None, "random")
    with torch.inference_mode(), visibench.prune(llava, method) as session:
        llava(**loaded.synthetic_inputs(1, 10, 16))
    assert attainable.schedule(session.trace, method, loaded) is None
