"""The analysis, calibration and pictures of models that were made like LLaVA-NeXT, InternVL and Qwen2.5-VL."""

import numpy as np
import pytest
import visibench
from families import every_family
from PIL import Image
from processors import askable
from visibench.analysis.calibrate import calibrate
from visibench.analysis.overlay import overlay
from visibench.analysis.stages import PARTS, StageAnalysis
from visibench.evals.tasks.tasks import load_tasks
from visibench.utils.token_grids import size

pytestmark = pytest.mark.slow
DEPTH = 6


@pytest.fixture
def tasks(disk_data):
    return load_tasks(["gqa"], str(disk_data))


@every_family
def test_all_is_measured(kind, tasks):
    record = StageAnalysis(askable(kind), tasks, (1, 4), PARTS, limit=3, batch_size=3).run()
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
