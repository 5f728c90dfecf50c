"""Controls: random tokens at a method's own layers and counts, sample by sample."""

import json

import pytest
import torch
import visibench
from refusals import assert_refused
from support import collate, make_batch
from visibench.engine.vision.features import FeatureStore
from visibench.evals.answers.control import ControlSession
from visibench.evals.sweeps.cells import cell_specs
from visibench.evals.sweeps.config import parse_config

ADAPTIVE = visibench.load_method("visipruner", shallow_layers=1, layer_threshold=0.9, token_threshold=1.0)
METHODS = [
    ADAPTIVE,
    visibench.load_method("pyramiddrop", cuts=(2, 4, 6)),
    visibench.load_method("divprune", keep=0.4),
    visibench.load_method("visionzip", tokens=7),
]


def kept(model, inputs, method):
    with visibench.prune(model, method) as session:
        model(**inputs, use_cache=False)
    return session.trace


def controlled(model, inputs, method, seed=0):
    session = ControlSession(model, method, seed, FeatureStore(0))
    with session.around(inputs):
        model(**inputs, use_cache=False)
    return session.trace


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_layers_and_counts_are_the_methods_own_and_the_tokens_are_not(method, llava):
    batch = collate(make_batch([(5, 9, 1), (3, 12, 2), (2, 20, 1)]))
    own, random = kept(llava, batch, method), controlled(llava, batch, method)
    assert random.visual_counts().tolist() == own.visual_counts().tolist()
    last = own.visual_counts().min(1).values
    assert (last < torch.tensor(own.prompt.visual_counts)).any(), "something is dropped"
    chosen = [controlled(llava, batch, method, seed).kept(9).tolist() for seed in range(3)]
    assert len({json.dumps(one) for one in chosen}) == 3
    assert controlled(llava, batch, method).kept(9).tolist() == chosen[0]


def test_a_sample_has_its_tokens_in_any_batch(llava):
    samples = make_batch([(5, 9, 1), (3, 12, 1), (2, 20, 1)])
    together = controlled(llava, collate(samples), ADAPTIVE)
    for row, sample in enumerate(samples):
        alone = controlled(llava, sample, ADAPTIVE)
        for layer in range(10):
            assert torch.equal(together.kept(layer)[row], alone.kept(layer)[0])


def test_what_stays_is_nested(llava):
    (sample,) = make_batch([(5, 9, 2)])
    trace = controlled(llava, sample, METHODS[1])
    for layer in range(1, 10):
        assert not (trace.kept(layer) & ~trace.kept(layer - 1)).any()


def configured(**more):
    return parse_config({"model": "tiny", "tasks": ["pope"], **more}, "test")


def test_a_control_is_three_cells_beside_those_of_its_method():
    entry = {"name": "fastv", "grid": {"keep": [0.5, 0.25]}, "control": True}
    cells = [spec.config for spec in cell_specs(configured(methods=[entry, "vtw:layer=6"]))]
    controls = [cell for cell in cells if cell.control]
    assert [(cell.label, cell.seed) for cell in controls] == [
        (f"control of fastv:keep={keep}", seed) for keep in (0.5, 0.25) for seed in (0, 1, 2)
    ]
    assert {cell.method for cell in controls} == {"fastv"}
    assert len({cell.digest() for cell in cells}) == len(cells)
    without = [spec.config for spec in cell_specs(configured(methods=[entry | {"control": False}, "vtw:layer=6"]))]
    assert without == [cell for cell in cells if not cell.control]
    assert all("control" not in cell.model_dump() for cell in without)


def test_controls_of_all_methods_leave_random_and_dense_alone():
    cells = cell_specs(configured(methods=["random:keep=0.5", "vtw:layer=6"], control=True))
    assert {spec.config.method for spec in cells if spec.config.control} == {"vtw"}


def test_what_has_no_control_is_refused(cli):
    for method, why in (
        ("none", "drops nothing: leave its control out"),
        ("random", "keeps random tokens already: leave its control out"),
        ("staged", "takes up again what it held aside"),
    ):
        options = {"keep": 0.5} if method == "random" else {"enter": 4} if method == "staged" else {}
        with pytest.raises(visibench.errors.OptionError, match=why):
            cell_specs(configured(methods=[{"name": method, "control": True} | options]))
    refused = cli("run", "--model", "tiny", "--method", "staged:enter=4", "--tasks", "pope", "--control")
    assert_refused(refused, "it chooses none: leave its control out")


def test_a_run_with_a_control_shows_the_pair(cli, checkpoint, disk_data):
    few = ["--data", disk_data, "--tasks", "pope", "--limit", 4, "--no-timing", "--out", "out"]
    code, out, err = cli("run", "--model", checkpoint, "--method", "fastv:keep=0.25", *few, "--control")
    assert code == 0, err
    assert "control of fastv:keep=0.25" in out
    assert "− control" in out
    code, out, _ = cli("table", "out", "--format", "json")
    rows = {row["label"]: row for row in json.loads(out)["tables"][0]["rows"]}
    own, control = rows["fastv:keep=0.25"], rows["control of fastv:keep=0.25"]
    assert control["seeds"] == [0, 1, 2]
    assert own["visual_tokens"]["per_layer"] == control["visual_tokens"]["per_layer"]
    contrast = own["scores"]["pope"]["pope_f1_score"]["against"]["control"]
    assert contrast["reference"] == "control of fastv:keep=0.25"
    difference = own["scores"]["pope"]["pope_f1_score"]["mean"] - control["scores"]["pope"]["pope_f1_score"]["mean"]
    assert contrast["difference"] == pytest.approx(difference)
