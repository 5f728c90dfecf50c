"""Runs for the HTML report: cells whose answers say who gave them, and a run full of hostile strings."""

import base64

import numpy as np
from storing import config, frame, put
from visibench.results.store.records import Compute, ScoreRecord, VisualTokens
from visibench.results.store.store import Store

N = 40


RIGHT, WRONG = np.ones(N), np.zeros(N)


HALF = (np.arange(N) % 2).astype(float)


def pack(bits) -> str:
    return base64.b64encode(np.packbits(np.array(bits, bool)).tobytes()).decode()


def cell(
    store, method, scores, tokens=16, task="gqa", seed=0, kept=None, label=None, control=False, macs=2e9, **columns
):
    """A cell whose questions have these scores; the answer says who gave it."""
    answers = columns.pop("answer", [f"{method} {place}" for place in range(len(scores))])
    extra = {"visual_tokens": [[16, tokens]] * len(scores), "prompt_visual_tokens": 16}
    if kept is not None:
        extra["kept"] = [pack(kept)] * len(scores)
    samples = frame([f"i{place}" for place in range(len(scores))], scores, answer=answers, **extra, **columns)
    value = ScoreRecord(key="exact_match", title="exact match", value=float(np.mean(scores)), maximum=1)
    counts = VisualTokens(prompt=16, per_layer=[16, tokens])
    own = config(method, task, seed, control=control, **({"label": label} if label else {}))
    spent = Compute(macs=macs, macs_sd=0, components={"ffn": macs})
    put(store, own, samples=samples, scores=[value], visual_tokens=counts, compute=spent)


HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "</style></script><svg onload=alert(3)>"]


def hostile_store(folder):
    """A run whose label, questions, targets, answers, categories and ids are hostile."""
    store, script, image = Store(folder), *HOSTILE[:2]
    text = {"prompt": [f"{image} {i}" for i in range(N)], "target": script, "category": image, "question_id": script}
    cell(store, "none", RIGHT, answer=[HOSTILE[2]] * N, **text)
    cell(store, "fastv", HALF, 8, label=f"{script}{image}", answer=[script] * N, **text)
    return store
