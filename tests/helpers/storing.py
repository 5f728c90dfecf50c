"""Made-up cells for tests of what is stored."""

import numpy as np
import pandas as pd
import visibench
from visibench.results.store.records import (
    CellConfig,
    CellMetrics,
    Compute,
    Environment,
    PrefillTime,
    ScoreRecord,
    VisualTokens,
)
from visibench.results.store.store import Store

DENSE = visibench.load_method("none")
SAMPLES = pd.DataFrame(
    {
        "doc_id": [0, 1],
        "question_id": ["7", "8"],
        "image": ["a", "b"],
        "category": None,
        "prompt": ["is it?", "and this?"],
        "target": "yes",
        "answer": "yes",
        "score": [1.0, 0.0],
        "visual_tokens": [[4, 4], [4, 2]],
    }
)


def config(method="none", task="gqa", seed=0, **changes) -> CellConfig:
    options = {"keep": 0.5, "seed": seed} if method == "random" else {}
    values = {"model": "tiny", "method": method, "options": options, "label": method, "task": task, "seed": seed}
    return CellConfig(**values | changes)


def pope_config(method=DENSE, **changes) -> CellConfig:
    """A cell of POPE in batches of three that is answered, not made up; prefill is not timed."""
    values = {"model": "m", "method": method.name, "options": method.hyperparameters(), "label": method.name}
    return CellConfig(**values | {"task": "pope", "origin": "data", "batch_size": 3, "timing": None} | changes)


def metrics(cell: CellConfig, score=0.8, data="d0", versions=None, **changes) -> CellMetrics:
    mme = cell.task == "mme"
    values = {
        "config_hash": cell.digest(),
        "size": cell.limit or 50,
        "total": 50,
        "scores": [ScoreRecord(key="s", title="score", value=score, maximum=1000 if mme else 1)],
        "metrics": {"s": score},
        "visual_tokens": VisualTokens(prompt=16, per_layer=[16, 8]),
        "compute": Compute(macs=2e9, macs_sd=0, components={"ffn": 2e9}),
        "prefill": PrefillTime(times_ms=[1.0, 2.0, 3.0], warmup=1, batch_size=1, device="cpu"),
        "generation": {"max_new_tokens": 16},
        "seconds": {"answer": 1.0},
        "data_hash": data + cell.task + str(cell.limit),
        "environment": Environment(model={"dtype": "float32"}, versions=versions or {"torch": "2"}, machine={}),
    }
    return CellMetrics(**values | changes)


TIMES = {
    "prefill": True,
    "seconds": True,
    "reused_images": True,  # what was in memory: a killed run and its restart share less than a run in one go
    "samples_hash": True,
    "checksum": True,
    "environment": {"code"},
}


def outcome(cell) -> dict:
    """What two runs of a cell have in common: all but times, what was reused, hashes over these, and the commit."""
    return {
        "config": cell.config.model_dump(),
        "metrics": cell.metrics.model_dump(exclude=TIMES),
        "samples": untimed(cell),
    }


def untimed(cell) -> str:
    """The samples of a cell as JSON, all but the measured times, of which there is one for each question."""
    samples = cell.samples()
    assert (samples["latency_ms"] > 0).all()
    return samples.drop(columns="latency_ms").to_json()


def put(store: Store, cell: CellConfig, *args, samples=None, **changes):
    """Store a cell; without ``samples``, as many made-up ones as its metrics say."""
    if samples is not None:
        changes = {"size": len(samples), "total": max(50, len(samples))} | changes
    outcome = metrics(cell, *args, **changes)
    if samples is None:
        samples = pd.concat([SAMPLES] * outcome.size, ignore_index=True)[: outcome.size]
        samples = samples.assign(doc_id=range(outcome.size))
    store.begin(cell)
    return store.finish(cell, samples, outcome)


def full(store: Store):
    """Dense, random with three seeds and fastv on two tasks."""
    for task, scale in (("gqa", 1), ("mme", 1000)):
        put(store, config("none", task), 0.8 * scale)
        put(store, config("fastv", task), 0.6 * scale)
        for seed, score in enumerate((0.4, 0.5, 0.6)):
            put(store, config("random", task, seed), score * scale, compute=Compute(macs=1e9, macs_sd=0, components={}))
    return store


def frame(images, score, **columns) -> pd.DataFrame:
    """Samples of one run with these images and scores."""
    n = len(images)
    base = {"doc_id": range(n), "question_id": [str(i) for i in range(n)], "image": list(images), "category": None}
    base |= {"prompt": [f"q{i}" for i in range(n)], "target": "yes", "answer": "yes", "score": np.asarray(score, float)}
    return pd.DataFrame(base | columns)


def outcomes(cells) -> list:
    """What must be the same whoever runs a cell: all but times, and what says that files are whole.

    Nor what was reused, which depends on what else a worker ran; nor the commit, which each process asks for itself:
    others may work on the checkout meanwhile.
    """
    times = {"prefill": {"times_ms"}, "seconds": True, "reused_images": True, "samples_hash": True, "checksum": True}
    times["environment"] = {"code"}
    found = []
    for cell in cells:
        assert len(cell.metrics.prefill.times_ms) == 2
        found.append((cell.config, cell.metrics.model_dump(exclude=times), untimed(cell)))
    return found
