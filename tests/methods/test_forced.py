"""VisiPruner by a forced plan: layers of the cut and of the exit, and tokens kept, as given."""

import pytest
import torch
import visibench
from support import collate, make_batch, make_llava
from visibench.errors import OptionError


@pytest.mark.parametrize("more", [{}, {"skip": True}, {"layer0": "13b"}], ids=str)
def test_forced_plan_holds_in_every_row(more):
    """At the filter the tokens of largest |c_j| stay, measured here by hand from the dense model's own attention."""
    model = make_llava(layers=9)
    batch = collate(make_batch([(5, 9, 1), (3, 12, 2), (4, 6, 0), (2, 7, 1)]))
    method = visibench.load_method(
        "visipruner", shallow_layers=1, forced=True, filter_layer=4, filter_tokens=3, exit_layer=7, **more
    )
    with visibench.prune(model, method) as session:
        model(**batch)
    visual = torch.tensor([[16, 32, 0, 16]]).T
    expected = torch.cat([visual.expand(4, 4), visual.clamp(max=3).expand(4, 3), torch.zeros(4, 2)], dim=1)
    assert torch.equal(session.trace.visual_counts(), expected.long())


def test_forced_plan_keeps_the_largest_contributions():
    model = make_llava(layers=6, attention="eager")
    (sample,) = make_batch([(5, 9, 1)])
    method = visibench.load_method(
        "visipruner", shallow_layers=1, stages=["middle"], forced=True, filter_layer=4, filter_tokens=6
    )
    with visibench.prune(model, method) as session:
        model(**sample)
    dense = model(**sample, output_attentions=True, use_cache=True)
    weights, values = dense.attentions[3][0, :, -1], dense.past_key_values.layers[3].values[0].repeat_interleave(2, 0)
    parts = (weights[:, 5:21, None] * values[:, 5:21]).transpose(0, 1).flatten(1)
    largest = parts.norm(dim=1).topk(6).indices.sort().values
    assert session.trace.kept(4)[0].nonzero().flatten().tolist() == largest.tolist()


def test_default_plan_scales_with_the_model():
    method = visibench.load_method("visipruner", forced=True, layers="scaled")
    geometry = visibench.load_model("llava-cpu", weights="meta").geometry
    method.check(geometry)
    assert method.planned(geometry) == (5, 12)
    assert method.planned(visibench.load_model("llava-1.5-7b", weights="meta").geometry) == (9, 24)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filter_layer": 12}, "filter_layer has no effect with forced=False"),
        ({"forced": True, "layer_threshold": 0.9}, "layer_threshold has no effect with forced=True"),
        ({"forced": True, "stages": ["shallow"]}, "forced has no effect without stage 'middle'"),
        ({"forced": True, "stages": ["middle"], "exit_layer": 20}, "exit_layer has no effect without stage 'deep'"),
        ({"forced": True, "filter_tokens": -1}, "filter_tokens must be >= 0"),
    ],
)
def test_forced_options_that_do_nothing_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        visibench.load_method("visipruner", **options)


def test_plan_must_fit_the_model():
    with pytest.raises(OptionError, match="layers='scaled'"):
        visibench.load_method("visipruner", forced=True).check(visibench.load_model("tiny", device="cpu").geometry)
