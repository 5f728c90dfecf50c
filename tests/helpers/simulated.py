"""Answers drawn at random for tests of statistics, lmms-eval's own scores of them, and what a coverage may be."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pandas as pd
from storing import frame
from visibench.results.statistics import metrics
from visibench.results.statistics.metrics import MEAN, Measured, measure


def of_scores(scores) -> Measured:
    """A mean over questions; ``scores`` (images, questions an image)."""
    images, each = scores.shape
    return measure("exact_match", [frame(np.repeat(np.arange(images), each), scores.ravel())])


def quick(scores) -> Measured:
    """The same without a detour over data frames, for simulations."""
    images, each = scores.shape
    sums = np.stack([scores.sum(1), np.full(images, each)], axis=1)[None].astype(float)
    return Measured(MEAN, sums, scores.reshape(1, -1), np.full(images, float(each)), 1.0)


def clustered(rng, images, each, share, correlation):
    """0/1 scores whose questions about one image are correlated (beta-binomial)."""
    size = 1 / correlation - 1
    chance = rng.beta(share * size, (1 - share) * size, images)
    return (rng.random((images, each)) < chance[:, None]).astype(float)


def assert_covers(hits, runs, most=0.97):
    """Coverage of 95 % intervals between 93 and 97 %, give or take one Monte-Carlo standard error."""
    margin = math.sqrt(0.95 * 0.05 / runs)
    assert 0.93 - margin <= hits / runs <= most + margin


def changed(rng, images, each, gained, lost, together=0.1):
    """Two methods, one of which scores higher on a share ``gained`` of questions and lower on a share ``lost``.

    The true difference is gained - lost. ``together``: how much changes strike the questions of an image together.
    """
    size = 1 / together - 1
    up, down = (rng.beta(share * size, (1 - share) * size, (images, 1)) if share else 0.0 for share in (gained, lost))
    both, draw = clustered(rng, images, each, 0.8, 0.3), rng.random((images, each))
    rises, falls = draw < up, (draw > 1 - down) & (draw >= up)
    return quick(np.where(rises, 1, np.where(falls, 0, both))), quick(np.where(rises, 0, np.where(falls, 1, both)))


CATEGORIES = ("count", "color", "OCR", "code_reasoning")


def pope(rng, images=20, each=6) -> pd.DataFrame:
    truth = np.tile(["yes", "no"], images * each // 2)
    said = rng.choice(["yes", "Yes ", "no", "no idea"], len(truth))
    score = [s.lower().strip() == t for s, t in zip(said, truth, strict=True)]
    return frame(np.repeat(np.arange(images).astype(str), each), score, target=truth, answer=said)


def mme(rng, images=12) -> pd.DataFrame:
    """Two questions a category about each image; some images lack some categories."""
    rows = [(c, f"{c}/{i}", str(i)) for i in range(images) for c in CATEGORIES if rng.random() < 0.8 for _ in range(2)]
    category, pair, image = zip(*rows, strict=True)
    return frame(image, rng.random(len(rows)) < 0.7, category=category, question_id=pair)


def lmms_eval(task):
    """lmms-eval's scoring code of a task, without the rest of lmms-eval."""
    root = Path(importlib.util.find_spec("lmms_eval").submodule_search_locations[0])
    spec = importlib.util.spec_from_file_location(f"lmms_{task}", root / "tasks" / task / "utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lmms_value(key, samples) -> float:
    """A metric by lmms-eval's own aggregation."""
    if key.startswith("mme"):
        rows = samples[samples["category"].isin(metrics.MME_COGNITION) == (key == "mme_cognition_score")]
        return lmms_eval("mme").mme_aggregate_results(rows.to_dict("records"))
    module = lmms_eval("pope")
    docs = samples.rename(columns={"target": "answer", "answer": "said"}).to_dict("records")
    results = [module.pope_process_results(doc, [doc["said"]])[key] for doc in docs]
    return getattr(module, f"pope_aggregate_{key.removeprefix('pope_')}")(results)
