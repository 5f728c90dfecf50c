"""What a pruned model answers, scored by lmms-eval's ``simple_evaluate``, which asks, filters and scores."""

from __future__ import annotations

import hashlib
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import pandas as pd
from tenacity import RetryError

from ...engine import prune
from ...errors import OptionError, VisibenchError, reason
from ...methods import Method
from ...models import LoadedModel
from ...results.statistics.metrics import MME_COGNITION
from ...results.store.records import Compute, Outcome, ScoreRecord, VisualTokens
from ...results.store.samples import Answer, Sample, frame
from ...utils import machine
from ..tasks import lmms_eval
from ..tasks.known import TaskMetric
from ..tasks.question import Question
from ..tasks.tasks import MME_CATEGORY_MAXIMUM, Task
from .checkpoint import Batch, KeptAnswers
from .generate import Bridge, batch_key, batches, generation, questions


@dataclass(frozen=True)
class Evaluation:
    """What one method did on one task: the numbers, and ``samples``, a row a question with the columns of
    :class:`~visibench.results.store.samples.Sample`.
    """

    outcome: Outcome
    samples: pd.DataFrame


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

    Raises :class:`VisibenchError` for images that cannot be read, questions without one, and unusable options.
    """
    machine.one_process()
    if batch_size < 1:
        raise OptionError(f"batch size must be at least 1, not {batch_size}")
    size, _ = task.size(limit)
    answers = KeptAnswers()
    with lmms_eval.quiet(), prune(loaded.model, method) as session:
        Bridge(loaded, session, task, batch_size, on_batch, answers, seed).answer(questions(task, size))
    return score(task, answers, limit=limit, batch_size=batch_size, seed=seed, output_dir=output_dir)


def score(
    task: Task,
    answers: KeptAnswers,
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
    scored = [answers.batches[batch_key(chunk)] for chunk in batches(questions(task, size), batch_size)]
    replay = Replay({doc_id: answer for batch in scored for doc_id, answer in batch.records.items()}, task.taken)
    with tempfile.TemporaryDirectory() as scratch:
        result = _simple_evaluate(replay, task, size, seed, output_dir or Path(scratch))
    logged = {sample["doc_id"]: sample for sample in result["samples"][task.name]}
    rows = [_sample(task, answer, logged[doc_id]) for doc_id, answer in sorted(replay.answers.items())]
    samples, metrics = frame(rows), _metrics(result["results"][task.name])
    seconds = {key: sum(batch.seconds[key] for batch in scored) for key in ("answer", "generate")}
    outcome = Outcome(
        size=len(samples),
        total=len(task.docs),
        note=note,
        remarks=_remarks(scored, batch_size),
        nonfinite=int(samples["nonfinite"].sum()),
        reused_images=sum(batch.reused for batch in scored),
        scores=[_score(metric, metrics, samples) for metric in task.info.metrics],
        metrics=metrics,
        categories=_categories(samples),
        visual_tokens=_visual_tokens(rows),
        compute=_compute(rows, scored),
        generation=replay.generation,
        seconds=seconds | {"total": seconds["answer"] + time.perf_counter() - started},
        data_hash=_data_hash(rows),
    )
    return Evaluation(outcome, samples)


class Replay(lmms_eval.lmms):
    """lmms-eval's view of a model whose answers are there already."""

    is_simple = True

    def __init__(self, answers: dict[int, Answer], taken: Callable[[int, str], str]) -> None:
        super().__init__()
        self.answers, self.taken = answers, taken
        self.generation: dict[str, Any] = {}

    def clean(self) -> None:
        """Nothing to free: there is no model here. lmms-eval's own collects garbage twice, in each cell of a sweep."""

    def loglikelihood(self, requests: list) -> list:
        raise OptionError("tasks scored by log-likelihood cannot run here: choose one of kind generate_until")

    def generate_until_multi_round(self, requests: list) -> list:
        raise OptionError("tasks of several rounds cannot run here: choose one of kind generate_until")

    def generate_until(self, requests: list) -> list[str]:
        """Answers to all requests, in their order."""
        questions = [Question.of(request) for request in requests]
        options = questions[-1].options
        self.generation = generation(options) | {"until": options.get("until")}
        ended = ((question.doc_id, question.ended(self.answers[question.doc_id].output)) for question in questions)
        return [self.taken(doc_id, answer) for doc_id, answer in ended]


def _remarks(batches: list[Batch], batch_size: int) -> list[str]:
    """What a reader must know of the answers beside the numbers."""
    questions = sum(len(batch.records) for batch in batches)
    remarks = []
    smaller = [batch for batch in batches if batch.smaller]
    if smaller:
        count, reasons = sum(len(batch.records) for batch in smaller), sorted({batch.smaller for batch in smaller})
        remarks.append(f"{count} of {questions} answered in batches smaller than {batch_size} ({'; '.join(reasons)})")
    nonfinite = sum(answer.nonfinite for batch in batches for answer in batch.records.values())
    if nonfinite:
        remarks.append(f"{nonfinite} of {questions} with NaN or infinite logits")
    hardware = sorted({batch.hardware for batch in batches})
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


def _sample(task: Task, answer: Answer, logged: dict[str, Any]) -> Sample:
    doc = logged["doc"]
    target = doc[task.info.target] if task.info.target else logged["target"]
    return Sample(
        **vars(answer),
        task=task.name,
        doc_id=logged["doc_id"],
        question_id=str(doc.get("question_id", doc.get("id", logged["doc_id"]))),
        image=str(doc[task.info.cluster]) if task.info.cluster else answer.pixels,
        category=doc.get("category"),
        target="\n".join(map(str, target)) if isinstance(target, list) else str(target),
        answer=str(logged["filtered_resps"][0]),
        score=_sample_score(logged, task),
    )


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
    metrics = {}
    for key, value in results.items():
        metric, _, kind = key.partition(",")
        if isinstance(value, int | float) and not isinstance(value, bool) and "_stderr" not in metric:
            metrics[metric if kind in ("", "none") else key] = float(value)
    return metrics


def _score(metric: TaskMetric, metrics: dict[str, float], samples: pd.DataFrame) -> ScoreRecord:
    maximum = metric.maximum
    if metric.key == "mme_perception_score":
        maximum = MME_CATEGORY_MAXIMUM * len(set(samples["category"]).difference(MME_COGNITION))
    value = metrics.get(metric.key, float("nan"))
    return ScoreRecord(key=metric.key, title=metric.title, value=value, maximum=maximum)


def _categories(samples: pd.DataFrame) -> dict[str, float]:
    means = samples.dropna(subset="category").groupby("category")["score"].mean()
    return {str(category): float(mean) for category, mean in means.items()}


def _visual_tokens(samples: list[Sample]) -> VisualTokens:
    layers = zip(*(sample.visual_tokens for sample in samples), strict=True)
    prompt = fmean(sample.prompt_visual_tokens for sample in samples)
    return VisualTokens(prompt=prompt, per_layer=[fmean(layer) for layer in layers])


def _compute(samples: list[Sample], batches: list[Batch]) -> Compute:
    macs = [sample.executed_macs for sample in samples]
    names = batches[0].components
    components = {name: sum(batch.components[name] for batch in batches) / len(samples) for name in names}
    together = [sample.batch_macs for sample in samples if sample.batch_macs is not None]
    batch_macs = fmean(together) if len(together) == len(samples) else None
    return Compute(macs=fmean(macs), macs_sd=pstdev(macs), components=components, batch_macs=batch_macs)


def _data_hash(samples: list[Sample]) -> str:
    shown = pd.DataFrame([(one.doc_id, one.prompt, one.target, one.pixels) for one in samples]).astype(str)
    return hashlib.sha256(shown.to_json(orient="values").encode()).hexdigest()[:16]
