"""The bridge: a pruned model answers under lmms-eval's ``simple_evaluate``, which asks, filters and scores."""

from __future__ import annotations

import base64
import hashlib
import tempfile
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from PIL.Image import Image
from tenacity import RetryError

from .. import machine
from ..engine import prune
from ..engine.trace import Trace
from ..errors import OptionError, VisibenchError
from ..methods import Method
from ..models import LoadedModel
from ..results.metrics import MME_COGNITION
from ..results.records import ScoreRecord
from . import flops, harness
from .tasks import MME_CATEGORY_MAXIMUM, Metric, Task, reason

DEFAULT_MAX_NEW_TOKENS = 32
"""Cap on new tokens for tasks that set none (TextVQA): lmms-eval asks for a word or phrase there."""


@dataclass
class Evaluation:
    """What one method did on one task.

    ``size`` questions of ``total`` were asked; ``note`` says if that differs from the limit. ``scores``: the task's
    headline metrics. ``metrics``: all of lmms-eval's, by its keys. ``categories``: the mean per-question score by
    category, for tasks that have categories. ``samples``: one row a question (see :func:`evaluate`). ``components``:
    executed MACs of a prefill by component, mean over questions. ``generation``: how answers were generated.
    ``seconds``: ``answer`` for preparing inputs and generating, ``generate`` for generating alone, ``total`` with
    lmms-eval's scoring. ``data_hash``: of the questions, targets and pixels that were really used.
    """

    task: str
    origin: str
    size: int
    total: int
    note: str
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
    its input, entries of its KV cache after prefill), executed_macs (of the prefill), and kept (see :func:`_kept`;
    older runs lack it).

    Raises :class:`VisibenchError` for images that cannot be read, questions without one, and unusable options.
    """
    machine.one_process()
    if batch_size < 1:
        raise OptionError(f"batch size must be at least 1, not {batch_size}")
    size, note = task.size(limit)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch, prune(loaded.model, method) as session:
        bridge = Bridge(loaded, session, task, batch_size, on_batch or (lambda answered: None))
        result = _simple_evaluate(bridge, task, size, seed, output_dir or Path(scratch))
    logged = {sample["doc_id"]: sample for sample in result["samples"][task.name]}
    samples = pd.DataFrame([_sample(task, bridge.records[i], logged[i]) for i in sorted(bridge.records)])
    metrics = _metrics(result["results"][task.name])
    return Evaluation(
        task=task.name,
        origin=task.origin,
        size=len(samples),
        total=len(task.docs),
        note=note,
        scores=[_score(metric, metrics, samples) for metric in task.info.metrics],
        metrics=metrics,
        categories={
            str(k): float(v) for k, v in samples.dropna(subset="category").groupby("category")["score"].mean().items()
        },
        samples=samples.drop(columns="pixels"),
        components={name: macs / len(samples) for name, macs in bridge.components.items()},
        generation=bridge.generation,
        seconds=bridge.seconds | {"total": time.perf_counter() - started},
        data_hash=_data_hash(samples),
    )


@dataclass
class Record:
    """What the bridge saw of one question."""

    prompt: str
    output: str
    pixels: str
    prompt_tokens: int
    new_tokens: int
    prompt_visual_tokens: int
    visual_tokens: list[int]
    kv_lengths: list[int]
    executed_macs: float
    kept: str


class Pictured(Protocol):
    """Where the images of a question come from, such as a :class:`Task`."""

    def images(self, doc_id: int) -> list[Image]:
        """The decoded images of a question."""
        ...


class Bridge(harness.lmms):
    """lmms-eval's view of a model inside a pruning session."""

    is_simple = True

    def __init__(
        self, loaded: LoadedModel, session: Any, task: Pictured, batch_size: int, on_batch: Callable[[int], Any]
    ) -> None:
        super().__init__()
        self.loaded, self.session, self.task = loaded, session, task
        self.batch_size, self.on_batch = batch_size, on_batch
        self.records: dict[int, Record] = {}
        self.generation: dict[str, Any] = {}
        self.seconds = {"answer": 0.0, "generate": 0.0}
        self.components: defaultdict[str, float] = defaultdict(float)

    def clean(self) -> None:
        """lmms-eval drops a model's modules here, after generation; ours is used again."""

    def loglikelihood(self, requests: list) -> list:
        raise OptionError("tasks scored by log-likelihood cannot run here: choose one of kind generate_until")

    def generate_until_multi_round(self, requests: list) -> list:
        raise OptionError("tasks of several rounds cannot run here: choose one of kind generate_until")

    def generate_until(self, requests: list) -> list[str]:
        """Answers to all requests, in their order. Batches hold prompts of similar length, to pad little."""
        arguments = [request.args for request in requests]
        collator = harness.Collator(
            arguments, lambda a: (-len(a[0]), a[0], a[3]), group_fn=lambda a: a[1], grouping=True
        )
        answers: list[str] = []
        started = time.perf_counter()
        for chunk in collator.get_batched(n=self.batch_size):
            answers += self._answer(chunk)
            self.on_batch(len(chunk))
        self.seconds["answer"] = time.perf_counter() - started
        return collator.get_original(answers)

    def _answer(self, chunk: list[tuple]) -> list[str]:
        prompts, ids, wanted = [a[0] for a in chunk], [a[3] for a in chunk], chunk[0][1]
        images = [self.task.images(doc_id) for doc_id in ids]
        inputs = self.loaded.inputs(prompts, images)
        options = _generation(wanted)
        self.generation = options | {"until": wanted.get("until")}
        started = time.perf_counter()
        new = self._generate(inputs, options)
        self.seconds["generate"] += time.perf_counter() - started
        trace = self.session.trace
        compute = flops.executed(trace, self.loaded.geometry)
        for component, macs in compute.components().items():
            self.components[component] += sum(macs)
        rows = zip(
            ids,
            prompts,
            self.loaded.decode(new),
            images,
            inputs["attention_mask"].sum(1).tolist(),
            _lengths(new, self.loaded),
            trace.prompt.visual_counts,
            trace.visual_counts().tolist(),
            trace.kv_lengths().tolist(),
            compute.total(),
            _kept(trace),
            strict=True,
        )
        outputs = []
        for doc_id, prompt, output, pictures, *numbers in rows:
            self.records[doc_id] = Record(prompt, output, _pixels(pictures), *numbers)
            outputs.append(_until(output, wanted.get("until")))
        return outputs

    def _generate(self, inputs: Any, options: dict[str, Any]) -> torch.Tensor:
        """New token ids (B, n), on the host."""
        model: Any = self.loaded.model
        try:
            with torch.inference_mode():
                ids = model.generate(**inputs, **options, temperature=None, top_p=None, top_k=None)
        except torch.OutOfMemoryError as error:
            raise VisibenchError(f"out of GPU memory at batch size {self.batch_size}: lower --batch-size") from error
        return ids[:, inputs["input_ids"].shape[1] :].cpu()


def _simple_evaluate(bridge: Bridge, task: Task, size: int, seed: int, output_dir: Path) -> dict[str, Any]:
    try:
        with harness.quiet():
            return harness.simple_evaluate(
                model=bridge,
                tasks=[task.harness],
                task_manager=harness.TaskManager(include_defaults=False),
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


def _generation(wanted: dict[str, Any]) -> dict[str, Any]:
    """Options of ``generate``: greedy, whatever the task asks, within its cap on new tokens."""
    cap = wanted.get("max_new_tokens") or DEFAULT_MAX_NEW_TOKENS
    return {"max_new_tokens": int(cap), "do_sample": False, "num_beams": 1}


def _until(output: str, stops: Any) -> str:
    for stop in [stops] if isinstance(stops, str) else stops or []:
        output = output.split(stop, 1)[0] if stop else output
    return output


def _lengths(new: torch.Tensor, loaded: LoadedModel) -> list[int]:
    special = torch.tensor(loaded.processor.tokenizer.all_special_ids)
    return (~torch.isin(new, special)).sum(1).tolist()


def _kept(trace: Trace) -> list[str]:
    """For each row, which visual tokens of the prompt, in their order there, are at the input of the last layer.

    A bit each, packed from the highest bit of a byte down, in base64. Tokens that a merge made do not show.
    """
    kept = trace.kept(trace.layers - 1).cpu().numpy()
    rows = zip(kept, trace.prompt.visual_counts, strict=True)
    return [base64.b64encode(np.packbits(row[:count]).tobytes()).decode() for row, count in rows]


def _pixels(images: list[Image]) -> str:
    """Hash of decoded images, which names an image where the data set does not."""
    digest = hashlib.blake2b(digest_size=8)
    for image in images:
        digest.update(f"{image.mode}{image.size}".encode())
        digest.update(image.tobytes())
    return digest.hexdigest()


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
