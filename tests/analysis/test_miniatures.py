"""The analysis, calibration and pictures of models that were made like LLaVA-NeXT, InternVL and Qwen2.5-VL."""

import json

import numpy as np
import pytest
import visibench
from families import FAMILIES, every_family
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from processors import askable, made_up, save_askable
from refusals import assert_refused
from visibench.analysis.calibrate import calibrate
from visibench.analysis.overlay import overlay
from visibench.analysis.stages import PARTS, StageAnalysis
from visibench.evals.settings import method_spec
from visibench.evals.tasks.tasks import load_tasks
from visibench.models.adapters import FAMILIES as SUPPORTED
from visibench.results.store import stage_records
from visibench.utils.token_grids import size

pytestmark = pytest.mark.slow
DEPTH = 6


@pytest.fixture
def tasks(disk_data):
    return load_tasks(["gqa"], str(disk_data))


def check(record):
    assert {curve.quantity.partition("_")[0] for curve in record.curves} == {
        "last",
        "text",
        "value",
        "contribution",
        "lens",
    }
    assert all(np.isfinite([mean.value for mean in curve.means]).all() for curve in record.curves)
    blind = {(w.kind, w.first, w.end): w.effects["gqa"]["kl"].value for w in record.windows}
    assert blind["masked", 0, DEPTH] > 1e-4
    assert blind["dropped", 4, DEPTH] < blind["dropped", 1, DEPTH]


@every_family
def test_all_is_measured(kind, tasks):
    check(StageAnalysis(askable(kind), tasks, (1, 4), PARTS, limit=3, batch_size=3).run())


@pytest.mark.parametrize("kind", [kind for kind, family in SUPPORTED.items() if family.vision_tower])
def test_all_is_measured_in_every_supported_family(kind, tasks):
    check(StageAnalysis(made_up(kind), tasks, (1, 4), PARTS, limit=2, batch_size=2).run())


@every_family
def test_a_setting_is_confirmed(kind, tasks):
    record = calibrate(askable(kind), tasks, ["vtw"], target=0.5, limit=3, confirm=3, batch_size=3)
    (chosen,) = record.chosen
    assert chosen.point or chosen.nearest
    assert all(point.agreement["gqa"].questions == 3 for point in record.points)


@every_family
def test_the_picture_has_a_place_for_each_token(kind):
    loaded, image = askable(kind), Image.effect_noise((96, 40), 90).convert("RGB")
    drawn, (dense, pruned) = overlay(loaded, [image], "Is it red?", [visibench.load_method("vtw", layer=3)])
    assert dense.tokens == size(drawn.places) == len(drawn.attention)
    assert pruned.tokens == dense.tokens / 2
    assert drawn.figure.subfigs


@every_family
def test_a_long_title_fits_the_picture(kind):
    many = visibench.load_method(
        "visipruner", shallow_layers=1, layer_threshold=0.9, token_threshold=1.5, exit_layers=1
    )
    drawn, _ = overlay(askable(kind), [Image.new("RGB", (24, 24))], "?", [many])
    figure = drawn.figure
    FigureCanvasAgg(figure).draw()
    title = figure.subfigs[-1]._suptitle
    assert title.get_text().count("\n")
    assert title.get_window_extent().x1 <= figure.bbox.x1


# ---- the commands ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of saved miniatures, by family."""
    return {kind: save_askable(kind, tmp_path_factory.mktemp(kind)) for kind in FAMILIES}


@every_family
def test_analyze(kind, saved, cli, disk_data, tmp_path):
    few = ["--data", disk_data, "--tasks", "gqa", "--limit", 2, "--layers", "1,5", "--out", "out"]
    code, out, err = cli("analyze", "--model", saved[kind], *few)
    assert code == 0, err
    assert "gqa, by the next token:" in out
    record = stage_records.read(tmp_path / "out" / "stages.json")
    assert (record.depth, record.tasks["gqa"].asked) == (DEPTH, 2)
    assert {"stages.png", "stages.svg"} <= {file.name for file in (tmp_path / "out").iterdir()}


@every_family
def test_calibrate(kind, saved, cli, disk_data, tmp_path):
    few = ["--data", disk_data, "--tasks", "gqa", "--limit", 2, "--confirm", 2, "--target", 0.5, "--out", "out"]
    code, out, err = cli("calibrate", "--model", saved[kind], *few, "--methods", "fastv,vtw")
    assert code == 0, err
    record = json.loads((tmp_path / "out" / "calibration.json").read_text())
    for chosen in record["chosen"]:
        assert (chosen["point"] or chosen["nearest"])["spec"] in out
        if chosen["point"]:
            method = method_spec.parse(f"{chosen['method']}@{tmp_path}/out/{chosen['method']}.yaml", str(saved[kind]))
            assert str(method) == chosen["point"]["spec"]


@every_family
def test_show(kind, saved, cli, tmp_path):
    Image.effect_noise((96, 40), 90).convert("RGB").save(tmp_path / "a.png")
    asked = ["--image", "a.png", "--question", "Is it red?", "--methods", "fastv:keep=0.5", "--out", "out.png"]
    code, out, err = cli("show", "--model", saved[kind], *asked)
    assert code == 0, err
    assert [line.partition(": ")[0] for line in out.splitlines()] == ["none", "fastv:keep=0.5"]
    assert Image.open(tmp_path / "out.png").width > 300


ASKED = {
    "analyze": [],
    "calibrate": [],
    "show": ["--image", "a.png", "--question", "?", "--methods", "vtw"],
}


@pytest.mark.parametrize("command", ASKED)
@pytest.mark.parametrize("model", ["llava-next-7b", "qwen2.5-vl-7b", "internvl3-8b"])
def test_weights_that_nobody_trained_are_refused(command, model, cli, tmp_path):
    for weights in ("meta", "random"):
        refused = cli(command, "--model", model, *ASKED[command], "--weights", weights)
        assert_refused(refused, f"--weights {weights}: how a model fuses images is what training made of it")
    assert not list(tmp_path.iterdir())
