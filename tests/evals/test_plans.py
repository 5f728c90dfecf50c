"""Plans of prefills against the same prefills, run on miniatures of all families."""

import re

import pytest
import torch
import units
import visibench
from decoders import CONFIGS, decoder_model, rows_of
from visibench.engine.layout import TokenLayout
from visibench.errors import VisibenchError
from visibench.evals.compute import flops
from visibench.evals.compute.prefill_plan import planned, planned_prefill
from visibench.evals.settings.method_spec import parse, spell
from visibench.methods import list_methods
from visibench.models import LoadedModel
from visibench.models.adapters import Adapter
from visibench.models.geometry import published, synthetic_inputs, typical

RECEIVED = ["fastervlm:keep=0.4", "visionzip:keep=0.6", "vispruner:keep=0.5", "scope:keep=0.3", "holov:keep=0.5,runs=2"]
METHODS = [
    *(spell(cls, cls.examples[0]) for cls in list_methods().values()),
    *(f"{x},attention=received" for x in RECEIVED),
]
METHODS += ["divprune:keep=0.5,newlines=drop", "divprune:keep=0.4,newlines=compete", "fastervlm:keep=0.5,newlines=drop"]
METHODS += ["fastervlm:keep=0.5,unpad=false,positions=renumber", "pact:keep=0.4,cluster=false"]
# Work in attention that a plan does not know.
EDITED = {"visipruner", "visipruner_forced", "sparsevlm"}
QUICK = {"llava", "llava_next", "qwen2_5_vl", "smolvlm"}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in QUICK else pytest.mark.slow) for kind in CONFIGS]
)
def test_a_plan_is_what_then_runs(kind):
    """Tokens by layer and compute, without what the method itself computes, and the images of the prompt."""
    loaded, seen = LoadedModel(kind, decoder_model(kind), None, "random"), 0
    text, visual = rows_of(kind)[0]
    inputs = synthetic_inputs(loaded.adapter, 1, text, visual)
    for method in map(parse, METHODS):
        try:
            plan = planned_prefill(loaded, method, text, visual)
        except VisibenchError:
            continue
        with torch.no_grad(), visibench.prune(loaded.model, method) as session:
            loaded.model(**inputs)
        trace, seen = session.trace, seen + 1
        assert torch.equal(plan.visual_counts(), trace.visual_counts()), method
        assert torch.equal(plan.kv_lengths(), trace.kv_lengths()), method
        assert trace.prompt.images in (None, plan.prompt.images)
        promised, executed = (vars(flops.executed(one, loaded.geometry)) for one in (plan, trace))
        for part, macs in promised.items():
            if part != "scoring" and not (part == "attention" and method.name in EDITED):
                assert macs.tolist() == executed[part].tolist(), (method, part)
    assert seen >= 9


@pytest.mark.parametrize("visual", [16 + 8 * 9, 16 + 5 * 6])
def test_an_image_of_more_tiles_than_the_limit_is_as_large_as_the_model_makes_it(visual, monkeypatch):
    """OneVision keeps the features of two tiles, 4 × 4 each, and makes those of four smaller, behind the projector."""
    model = decoder_model("llava_onevision")
    loaded = LoadedModel("own", model, None, "random")
    monkeypatch.setattr(model.config, "vision_aspect_ratio", "anyres_max_2" if visual < 88 else "anyres_max_9")
    inputs = synthetic_inputs(loaded.adapter, 1, 9, visual)
    assert inputs["image_sizes"].tolist() == [[48, 48]]
    for method in map(parse, ["none", "divprune:keep=0.4", "fastv:keep=0.5"]):
        plan = planned_prefill(loaded, method, 9, visual)
        with torch.no_grad(), visibench.prune(model, method) as session:
            model(**inputs)
        assert torch.equal(plan.visual_counts(), session.trace.visual_counts())
        assert plan.prompt.images == session.trace.prompt.images
        promised, executed = (flops.executed(one, loaded.geometry) for one in (plan, session.trace))
        assert promised.vision_tower == executed.vision_tower


SIZED = [name for name, entry in published().items() if "checkpoint" in entry or "smol" in name]
# The prompt decides how much some keep, and some have a reason of their own on models with tiles or windows.
UNPLANNED = "shows only when it runs|CLS token|acts on the vision side|vision block|square of patches"


def unless_refused(loaded, method, visual):
    """The plan, or what stands against it."""
    try:
        return planned_prefill(loaded, method, 64, visual), ""
    except VisibenchError as error:
        return None, str(error)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name, entry in published().items() if "checkpoint" in entry or "smol" in name]
)
def test_every_entry_has_plans_of_an_ordinary_image_for_all_methods_that_fit(name):
    loaded = visibench.load_model(name, weights="meta")
    visual, found = typical(loaded.adapter), 0
    dense = planned_prefill(loaded, visibench.load_method("none"), 64, visual)
    for method in map(parse, METHODS):
        plan, reason = unless_refused(loaded, method, visual)
        if plan is None:
            assert re.search(UNPLANNED, reason), reason
            continue
        found += 1
        (macs,), (most,) = (flops.executed(one, loaded.geometry).total() for one in (plan, dense))
        assert 0 < macs <= most
    assert found >= 12


RAGGED = [
    ("llava_next", "fastervlm:keep=0.5"),
    ("llava_onevision", "divprune:keep=0.3"),
    ("qwen2_vl", "pooling:tokens=5"),
    ("qwen2_vl", "tome:keep=0.5"),
    ("qwen3_vl", "tome:tokens=5"),
    ("qwen3_vl", "downsample:keep=0.4"),
    ("qwen2_5_vl", "downsample:tokens=6"),
    ("qwen2_5_vl", "holov:keep=0.5,runs=2,attention=received"),
    ("smolvlm", "cdpruner:tokens=3,condition=none"),
    ("smolvlm", "tome:keep=0.5"),
    ("llava_onevision", "tome:keep=0.5"),
]


@pytest.mark.parametrize(("kind", "text"), RAGGED)
def test_left_counts_by_image_in_rows_of_several_of_any_shape_or_none(kind, text):
    """Padded tiles, two images in a row, none; by what a processor says of them, and by what then ran."""
    model, batch, method = units.model_of(kind), units.collate(units.samples_of(kind)), parse(text)
    adapter = Adapter(model)
    layout = TokenLayout.from_masks(batch["input_ids"] == units.VISUAL, batch["attention_mask"])
    sizes = {key: value for key, value in batch.items() if key != "pixel_values"}
    plan = planned(adapter, method, layout, sizes)
    with torch.no_grad(), visibench.prune(model, method) as session:
        model(**batch)
    trace = session.trace
    assert [len(images) for images in trace.prompt.images] == [1, 2, 0, 1 if kind != "smolvlm" else 3]
    assert plan.prompt.images == trace.prompt.images
    assert torch.equal(method.visual_counts(trace.prompt, adapter.geometry), trace.visual_counts())
    for part in ("vision_tower", "projector", "ffn"):
        ran, promised = (getattr(flops.executed(one, adapter.geometry), part) for one in (trace, plan))
        assert ran.tolist() == promised.tolist()
