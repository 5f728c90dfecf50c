"""What a pruned model answers, scored by lmms-eval's ``simple_evaluate``, which asks, filters and scores."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from tenacity import RetryError

from ...engine import prune
from ...errors import OptionError, VisibenchError
from ...methods import Method
from ...models import LoadedModel
from ...results.statistics.metrics import MME_COGNITION
from ...results.store.records import ScoreRecord
from ...utils import machine
from ..tasks import lmms_eval
from ..tasks.tasks import MME_CATEGORY_MAXIMUM, Metric, Task, reason
from .checkpoint import Answers, Batch, Record
from .generate import DEFAULT_MAX_NEW_TOKENS, Bridge, batch_key, batches, generation, requests, text_of

__all__ = ["DEFAULT_MAX_NEW_TOKENS", "Bridge", "Evaluation", "Record", "evaluate", "score"]


@dataclass
class Evaluation:
    """What one method did on one task.

    ``size`` questions of ``total`` were asked; ``note`` says if that differs from the limit. ``remarks``: what else a
    reader must know, ``nonfinite`` questions with NaN or infinite logits among it. ``scores``: the task's
    headline metrics. ``metrics``: all of lmms-eval's, by its keys. ``categories``: the mean per-question score by
    category, for tasks that have categories. ``samples``: one row a question (see :func:`evaluate`). ``components``:
    executed MACs of a prefill by component, mean over questions. ``generation``: how answers were generated.
    ``seconds``: ``answer`` for preparing inputs and generating, ``generate`` for generating alone, ``total`` with
    lmms-eval's scoring. ``reused_images``: see :class:`CellMetrics`.
    ``data_hash``: of the questions, targets and pixels that were really used.
    """

    task: str
    origin: str
    size: int
    total: int
    note: str
    remarks: list[str]
    nonfinite: int
    reused_images: int
    scores: list[ScoreRecord]
    metrics: dict[str, float]
    categories: dict[str, float]
    samples: pd.DataFrame
    components: dict[str, float]
    generation: dict[str, Any]
    seconds: dict[str, float]
    data_hash: str


def evaluate(
    loaded: LoadedModel,
    method: Method,
    task: Task,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    output_dir: Path | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Evaluation:
    """Let ``loaded`` answer ``task`` under ``method``, greedily, and score the answers with lmms-eval's own code.

    ``limit``: the first so many questions (whole pairs for MME). ``seed`` goes to lmms-eval, which seeds Python, NumPy
    and torch with it. ``output_dir`` receives the files that some scorers write. ``on_batch`` is called with the
    number of questions answered after each batch.

    The samples have the columns task, doc_id, question_id, image (cluster id), category, prompt, target, output (as
    generated), answer (as scored), score (lmms-eval's per-question score of the headline metric), prompt_tokens,
    new_tokens, prompt_visual_tokens, visual_tokens and kv_lengths (a list, one entry a decoder layer: visual tokens at
    its input, entries of its KV cache after prefill), executed_macs (of the prefill), kept (see
    :func:`visibench.evals.answers.generate._kept`; older runs lack it), nonfinite (whether some step gave logits that
    are NaN or infinite), latency_ms and batch_questions. The latency is the measured time of ``generate`` for the whole
    batch that the question was answered in, with ``batch_questions`` questions: from inputs on the device to the tokens
    of all its answers on the host, so with vision tower, projector, prefill, the method, and decoding up to the longest
    answer; without the decoding and processing of images, and without the tower for images whose features are reused
    (``--feature-cache-gb``). It is what a request in such a batch waits; ``latency_ms / batch_questions``, summed over
    the questions, is the time of all batches. Cells (see :func:`visibench.evals.answers.cell.run_cell`) add
    dense_agreement. ``places``: where visual tokens lie, JSON, see :mod:`visibench.results.store.token_grids`; older
    runs lack it.

    Raises :class:`VisibenchError` for images that cannot be read, questions without one, and unusable options.
    """
    machine.one_process()
    if batch_size < 1:
        raise OptionError(f"batch size must be at least 1, not {batch_size}")
    size, _ = task.size(limit)
    answers = Answers()
    with lmms_eval.quiet(), prune(loaded.model, method) as session:
        Bridge(loaded, session, task, batch_size, on_batch, answers, seed).answer(requests(task, size))
    return score(task, answers, limit=limit, batch_size=batch_size, seed=seed, output_dir=output_dir)


def score(
    task: Task,
    answers: Answers,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    output_dir: Path | None = None,
) -> Evaluation:
    """Score the answers to all questions with lmms-eval's own code; see :func:`evaluate`.

    ``batch_size``: the one they were answered with.
    """
    size, note = task.size(limit)
    started = time.perf_counter()
    asked = [answers.batches[batch_key(chunk)] for chunk in batches(requests(task, size), batch_size)]
    replay = Replay({doc_id: record for batch in asked for doc_id, record in batch.records.items()})
    with tempfile.TemporaryDirectory() as scratch:
        result = _simple_evaluate(replay, task, size, seed, output_dir or Path(scratch))
    logged = {sample["doc_id"]: sample for sample in result["samples"][task.name]}
    samples = pd.DataFrame([_sample(task, record, logged[i]) for i, record in sorted(replay.records.items())])
    metrics = _metrics(result["results"][task.name])
    seconds = {key: sum(batch.seconds[key] for batch in asked) for key in ("answer", "generate")}
    return Evaluation(
        task=task.name,
        origin=task.origin,
        size=len(samples),
        total=len(task.docs),
        note=note,
        remarks=_remarks(asked, batch_size),
        nonfinite=int(samples["nonfinite"].sum()),
        reused_images=sum(batch.reused for batch in asked),
        scores=[_score(metric, metrics, samples) for metric in task.info.metrics],
        metrics=metrics,
        categories={
            str(k): float(v) for k, v in samples.dropna(subset="category").groupby("category")["score"].mean().items()
        },
        samples=samples.drop(columns="pixels"),
        components={
            name: sum(batch.components[name] for batch in asked) / len(samples) for name in asked[0].components
        },
        generation=replay.generation,
        seconds=seconds | {"total": seconds["answer"] + time.perf_counter() - started},
        data_hash=_data_hash(samples),
    )


class Replay(lmms_eval.lmms):
    """lmms-eval's view of a model whose answers are there already."""

    is_simple = True

    def __init__(self, records: dict[int, Record]) -> None:
        super().__init__()
        self.records = records
        self.generation: dict[str, Any] = {}

    def clean(self) -> None:
        """Nothing to free: there is no model here. lmms-eval's own collects garbage twice, in each cell of a sweep."""

    def loglikelihood(self, requests: list) -> list:
        raise OptionError("tasks scored by log-likelihood cannot run here: choose one of kind generate_until")

    def generate_until_multi_round(self, requests: list) -> list:
        raise OptionError("tasks of several rounds cannot run here: choose one of kind generate_until")

    def generate_until(self, requests: list) -> list[str]:
        """Answers to all requests, in their order."""
        wanted = requests[-1].args[1]
        self.generation = generation(wanted) | {"until": wanted.get("until")}
        return [text_of(request, self.records) for request in requests]


def _remarks(asked: list[Batch], batch_size: int) -> list[str]:
    """What a reader must know of the answers beside the numbers."""
    questions = sum(len(batch.records) for batch in asked)
    remarks = []
    smaller = [batch for batch in asked if batch.smaller]
    if smaller:
        count, reasons = sum(len(batch.records) for batch in smaller), sorted({batch.smaller for batch in smaller})
        remarks.append(f"{count} of {questions} answered in batches smaller than {batch_size} ({'; '.join(reasons)})")
    nonfinite = sum(record.nonfinite for batch in asked for record in batch.records.values())
    if nonfinite:
        remarks.append(f"{nonfinite} of {questions} with NaN or infinite logits")
    hardware = sorted({batch.hardware for batch in asked})
    if len(hardware) > 1:
        remarks.append(f"answered on {' and '.join(hardware)}")
    return remarks


def _simple_evaluate(replay: Replay, task: Task, size: int, seed: int, output_dir: Path) -> dict[str, Any]:
    try:
        with lmms_eval.quiet():
            return lmms_eval.simple_evaluate(
                model=replay,
                tasks=[task.harness],
                task_manager=lmms_eval.TaskManager(include_defaults=False),
                limit=size,
                bootstrap_iters=0,
                process_docs_parallel=1,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                # Without this, lmms-eval decodes all images again and keeps them in memory.
                cli_args=Namespace(process_with_media=False, output_path=str(output_dir)),
            )
    except RetryError as error:
        raise VisibenchError(f"{task.name}: lmms-eval's scorer failed: {reason(error)}") from error


def _sample(task: Task, record: Record, logged: dict[str, Any]) -> dict[str, Any]:
    doc = logged["doc"]
    target = doc[task.info.target] if task.info.target else logged["target"]
    answer = logged["filtered_resps"][0]
    return {
        "task": task.name,
        "doc_id": logged["doc_id"],
        "question_id": str(doc.get("question_id", doc.get("id", logged["doc_id"]))),
        "image": str(doc[task.info.cluster]) if task.info.cluster else record.pixels,
        "category": doc.get("category"),
        "prompt": record.prompt,
        "target": "\n".join(map(str, target)) if isinstance(target, list) else str(target),
        "output": record.output,
        "answer": answer if isinstance(answer, str) else str(answer),
        "score": _sample_score(logged, task),
        "prompt_tokens": record.prompt_tokens,
        "new_tokens": record.new_tokens,
        "prompt_visual_tokens": record.prompt_visual_tokens,
        "visual_tokens": record.visual_tokens,
        "kv_lengths": record.kv_lengths,
        "executed_macs": record.executed_macs,
        "kept": record.kept,
        "nonfinite": record.nonfinite,
        "latency_ms": record.latency_ms,
        "batch_questions": record.batch_questions,
        "places": json.dumps(record.places, separators=(",", ":")),
        "pixels": record.pixels,
    }


def _sample_score(logged: dict[str, Any], task: Task) -> float:
    """lmms-eval's score of one question; NaN where a task has none."""
    for key in (*(metric.key for metric in task.info.metrics), *task.harness.aggregation()):
        value = logged.get(key)
        if isinstance(value, dict):
            value = value.get("score")
        if isinstance(value, int | float):
            return float(value)
    return float("nan")


def _metrics(results: dict[str, Any]) -> dict[str, float]:
    """lmms-eval's metrics by their keys, without its standard errors: for most metrics they are another quantity's."""
    found = {}
    for key, value in results.items():
        metric, _, kind = key.partition(",")
        if isinstance(value, int | float) and not isinstance(value, bool) and "_stderr" not in metric:
            found[metric if kind in ("", "none") else key] = float(value)
    return found


def _score(metric: Metric, metrics: dict[str, float], samples: pd.DataFrame) -> ScoreRecord:
    maximum = metric.maximum
    if metric.key == "mme_perception_score":
        maximum = MME_CATEGORY_MAXIMUM * len(set(samples["category"]).difference(MME_COGNITION))
    value = metrics.get(metric.key, float("nan"))
    return ScoreRecord(key=metric.key, title=metric.title, value=value, maximum=maximum)


def _data_hash(samples: pd.DataFrame) -> str:
    asked = samples[["doc_id", "prompt", "target", "pixels"]].astype(str)
    return hashlib.sha256(asked.to_json(orient="values").encode()).hexdigest()[:16]
