"""Settings found for decoders whose best ones are known, on questions apart from the evaluation's."""

import json

import pytest
import torch
import yaml
from refusals import assert_refused
from visibench import synthetic
from visibench.analysis import fit, searches
from visibench.analysis.asking import Asker
from visibench.analysis.bench import SettingBench
from visibench.analysis.calibrate import calibrate, check_apart, least, presets
from visibench.analysis.candidates import SearchPrompts
from visibench.errors import DataError
from visibench.evals.settings import method_spec
from visibench.evals.tasks.tasks import load_tasks
from visibench.methods import load_method
from visibench.models import load_model
from visibench.results.store.calibration_records import Agreement, CalibratedPoint, CalibrationRecord

DEPTH = 10


@pytest.fixture(scope="module")
def tasks(disk_data):
    return load_tasks(["gqa"], str(disk_data))


@pytest.fixture(scope="module")
def blind_from_5(checkpoint):
    """A model whose layers from 5 on have no attention, so that nothing needs visual tokens there."""
    loaded = load_model(str(checkpoint))
    for layer in loaded.model.model.language_model.layers[5:]:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    return loaded


def bench(loaded, tasks, limit, target, overall=0.0):
    return SettingBench(Asker(loaded, limit, 2), tasks, target, overall)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "overall"), [(0.5, 0.0), (0.75, 0.8)])
def test_what_is_given_up_would_have_failed(loaded, disk_data, target, overall):
    """The verdict on every setting is that of all questions, whichever are asked first and however few."""
    both = load_tasks(["gqa", "pope"], str(disk_data))
    early, whole = (bench(loaded, both, 8, target, overall) for _ in range(2))
    methods = [load_method("vtw", layer=layer) for layer in range(DEPTH)]
    methods += [load_method("fastv", layer=2, keep=keep) for keep in (0.1, 0.5, 0.9)]
    for method in methods:
        shares = [one.share for one in whole.measure(method).agreement.values()]
        assert early.passes(method) == (min(shares) >= target and sum(shares) / 2 >= overall)
    assert 0 < len(early.given_up) < len(methods)
    for method in methods:
        assert early.measure(method).agreement == whole.points[str(method)].agreement


SMALL = {
    "KEEPS": (0.9, 0.5, 0.2),
    "MAGNITUDES": (0.001, 0.016, 0.1),
    "LAYER_THRESHOLDS": (1.0, 0.95),
    "SPARED": (0.05, 0.4, 0.8),
    "LAYERS": 4,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", searches.GRIDS)
def test_the_least_of_a_grid_is_found(name, monkeypatch):
    """Against brute force: each setting asked all questions by itself, and its prefills counted."""
    for part, values in SMALL.items():
        monkeypatch.setattr(searches, part, values)
    loaded, tasks = load_model("tiny"), load_tasks(["gqa", "mme"], str(synthetic.ensure(calibration=True)))
    search, alone, anything = (bench(loaded, tasks, 4, target) for target in (0.75, 0.75, 0.0))
    grid = searches.GRIDS[name](SearchPrompts(search, 4))
    passing = []
    for one in grid:
        point = alone.measure(one.method)
        assert one.macs == pytest.approx(point.macs, rel=1e-6 if name == "visipruner" else 1e-3)
        assert one.counts.mean() == pytest.approx(point.tokens)
        if alone.passes(one.method) and point.macs < alone.dense.macs:
            passing.append(point)
    chosen = least(name, grid, search, anything)
    if passing:
        assert chosen.point.macs == pytest.approx(min(point.macs for point in passing), rel=1e-6)
    assert (chosen.point is None) == (not passing)
    assert not {point.spec for point in passing} & {*search.given_up}


def test_too_few_questions_are_refused(cli, checkpoint, disk_data):
    few = ["--model", checkpoint, "--data", disk_data, "--tasks", "gqa", "--limit", 6, "--confirm", 6]
    assert_refused(cli("calibrate", *few), "gqa has 8 questions, fewer than --limit 6 and --confirm 6 take together")


def test_withdrawal_is_as_early_as_nothing_is_lost(blind_from_5, tasks):
    record = calibrate(blind_from_5, tasks, ["vtw"], target=1.0, limit=4, confirm=4, batch_size=4)
    (chosen,) = record.chosen
    assert chosen.options["layer"] <= 5
    assert chosen.point.confirmed
    assert chosen.point.agreement["gqa"].share == 1
    assert chosen.point.agreement["gqa"].questions == 4
    assert record.dense_macs > chosen.point.macs
    assert all(point.agreement["gqa"].questions == 4 for point in record.points)
    assert record.grids == {"vtw": DEPTH}
    preset = presets(record)["vtw"]
    assert preset.options == chosen.options
    assert preset.model.checkpoint == record.checkpoint
    assert preset.evidence["questions of each task"] == {"search": 4, "confirmation": 4}


def test_a_target_out_of_reach_names_the_nearest(blind_from_5, tasks, monkeypatch):
    monkeypatch.setitem(searches.GRIDS, "vtw", lambda prompts: [])
    (chosen,) = calibrate(blind_from_5, tasks, ["vtw"], limit=2, confirm=2, batch_size=4).chosen
    assert chosen.point is chosen.nearest is None  # nothing was searched
    assert not presets(calibrate(blind_from_5, tasks, ["vtw"], limit=2, confirm=2, batch_size=4))


def test_questions_of_the_evaluation_are_refused(tasks, hub_data, disk_data):
    with pytest.raises(DataError, match=r"gqa: 3 of the questions to calibrate on are among those of the evaluation"):
        check_apart(tasks, load_tasks(["gqa"], str(hub_data)), 3)
    check_apart(tasks, load_tasks(["pope"], str(disk_data)), 3)


def test_frontier_holds_what_nothing_beats():
    def point(macs, share, confirmed=False):
        agreement = {"gqa": Agreement(share=share, low=0, high=1, questions=9, images=3)}
        return CalibratedPoint(method="m", spec="m", macs=macs, tokens=1, agreement=agreement, confirmed=confirmed)

    cheap, dear, beaten = point(1, 0.5), point(3, 0.9), point(2, 0.4)
    points = [dear, beaten, cheap, point(0.5, 1.0, confirmed=True)]
    assert CalibrationRecord.model_construct(points=points).frontier("m") == [cheap, dear]


@pytest.mark.slow
def test_command_calibrates_by_measuring_and_by_authors(cli, checkpoint, disk_data, tmp_path):
    asked = ["--model", checkpoint, "--data", disk_data, "--tasks", "gqa", "--limit", 4, "--confirm", 4]
    code, out, err = cli("calibrate", *asked, "--methods", "vtw,fastv", "--out", "found", "--target", 0.7)
    assert code == 0, err
    assert "lower bound" in out
    record = json.loads((tmp_path / "found" / "calibration.json").read_text())
    for chosen in record["chosen"]:
        if chosen["point"] is not None:
            method = method_spec.parse(f"{chosen['method']}@{tmp_path}/found/{chosen['method']}.yaml")
            assert str(method) == chosen["point"]["spec"]
    assert {"calibration.png", "calibration.svg"} <= {file.name for file in (tmp_path / "found").iterdir()}
    code, _, err = cli("calibrate", *asked, "--methods", "vtw,fitprune", "--kl", 9, "--spare", 0.5, "--out", "authors")
    assert code == 0, err
    loaded, (task,) = load_model(str(checkpoint)), load_tasks(["gqa"], str(disk_data))
    samples = [dict(loaded.inputs(*map(list, zip(*map(task.question, range(4)), strict=True))))]
    by_hand = fit.fit("fitprune", loaded.model, samples, target=0.5).method
    assert yaml.safe_load((tmp_path / "authors" / "fitprune.yaml").read_text())["options"] == {
        "deletions": list(by_hand.deletions),
        "out_of": by_hand.out_of,
    }
    assert method_spec.parse("vtw@authors/vtw.yaml") == fit.fit("vtw", loaded.model, samples, threshold=9.0).method


def test_command_refuses(cli):
    for weights in ("meta", "random"):
        refused = cli("calibrate", "--model", "llava-1.5-7b", "--weights", weights)
        assert_refused(refused, "such weights were never trained: leave --weights out")
    assert_refused(cli("calibrate", "--model", "tiny", "--methods", "fastw"), "did you mean 'fastv'")
    assert_refused(cli("calibrate", "--model", "tiny", "--target", 98), "give one above 0 and up to 1, such as 0.98")
    assert_refused(cli("calibrate", "--model", "tiny", "--methods", "fastv", "--kl", 1), "not among --methods")
