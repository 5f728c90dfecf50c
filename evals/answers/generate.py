"""A pruned model answers questions batch by batch; what is answered already is not asked again."""

from __future__ import annotations

import base64
import hashlib
import random
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL.Image import Image
from transformers import LogitsProcessor, LogitsProcessorList

from ...engine import prune
from ...engine.trace import Trace
from ...engine.vision.features import FeatureStore
from ...errors import FOREIGN, DataError, InputError, NoRoomError, VisibenchError, reason
from ...models import LoadedModel
from ...models.inputs import upright
from ...models.load import release
from ...results.store.records import Failure, digest
from ...results.store.samples import Answer
from ...utils.token_grids import Places, size
from ..compute import flops
from ..compute.memory import check_prefill, out_of_memory
from ..compute.timing import clock_of
from ..tasks import lmms_eval
from ..tasks.question import Question
from ..tasks.tasks import Task
from .cell_spec import CellSpec
from .checkpoint import Batch, KeptAnswers, bound_to
from .control import ControlSession

DEFAULT_MAX_NEW_TOKENS = 32
"""Cap on new tokens for tasks that set none (TextVQA): lmms-eval asks for a word or phrase there."""
HOPELESS = 16
"""After so many failed questions in a row a cell is given up."""


def answer(
    loaded: LoadedModel,
    spec: CellSpec,
    task: Task,
    folder: Path,
    *,
    shard: tuple[int, int] = (0, 1),
    on_batch: Callable[[int], Any] | None = None,
    features: FeatureStore | None = None,
) -> KeptAnswers:
    """Answer the questions of a cell, or a share of them, and keep the answers in ``folder``.

    The basis of executors. A cell is cut into the same batches whoever runs it; ``shard`` (k, n) takes every n-th of
    them, from the k-th on, and writes a file of its own. Any number of processes that share ``folder`` may do so at
    once. A last call without ``shard``, as :func:`visibench.evals.answers.cell.run_cell` makes, finds all answers
    there, runs what is still missing, and scores. Who runs a batch changes nothing about it, apart from hardware.

    A batch that does not fit into memory, or fails otherwise, runs again in halves, down to single questions; those
    that fail even so are in ``failures`` of what is returned, and their batch is not kept, so that it runs again next
    time. After ``HOPELESS`` failures in a row, but for faults of the questions, the rest is not asked, which the last
    of ``failures`` says. ``on_batch`` is called with the number of questions after each batch, kept ones included; what
    it raises stops the work with nothing lost. ``features``: where cells share what the vision tower computes; without
    one, or with another one, the answers are the same.
    """
    config = spec.config
    answers = KeptAnswers(folder, bound_to(config, loaded.describe()), shard)
    session: Any
    if config.control:
        session = ControlSession(loaded.model, spec.method, config.seed, features or FeatureStore(0))
    else:
        session = prune(loaded.model, spec.method, features=features or FeatureStore(0))
    with lmms_eval.quiet(), session:
        bridge = Bridge(loaded, session, task, config.batch_size, on_batch, answers, config.seed, forgiving=True)
        bridge.around = session.around if config.control else bridge.around
        bridge.answer(questions(task, task.size(config.limit)[0]), shard)
    return answers


def questions(task: Task, size: int) -> list[Question]:
    """The first ``size`` questions, as lmms-eval's ``simple_evaluate`` asks them."""
    with lmms_eval.quiet():
        task.harness.build_all_requests(limit=size)
    return [Question.of(request) for request in task.harness.instances for _ in range(request.repeats)]


OnFirst = Callable[[list[int], torch.Tensor], None]


class Pictured(Protocol):
    """Where the images of a question come from, such as a :class:`Task`."""

    def images(self, doc_id: int) -> list[Image]:
        """The decoded images of a question."""
        ...


class Bridge:
    """Answers questions with a model inside a pruning session.

    ``answers`` holds what is answered and takes what is new. ``seed``: each batch starts from generators of Python,
    NumPy and torch seeded with it and the batch's number, so that a method that draws from them draws the same
    whatever ran before; None leaves them alone. ``forgiving``: failures are noted in ``answers``, not raised.
    ``on_first`` is handed each batch that ran: its doc_ids, and the logits (B, vocabulary) of the first new token.
    ``around``: a context, of its inputs, in which each batch generates.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        session: Any,
        task: Pictured,
        batch_size: int,
        on_batch: Callable[[int], Any] | None = None,
        answers: KeptAnswers | None = None,
        seed: int | None = None,
        *,
        forgiving: bool = False,
        on_first: OnFirst | None = None,
    ) -> None:
        self.loaded, self.session, self.task = loaded, session, task
        self.batch_size, self.on_batch = batch_size, on_batch or (lambda answered: None)
        self.answers = answers if answers is not None else KeptAnswers()
        self.seed, self.forgiving, self.on_first = seed, forgiving, on_first
        self.hardware = loaded.describe()["hardware"]
        self.clock = clock_of(loaded.model.device)
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.records: dict[int, Answer] = {}
        self.around: Callable[[Any], AbstractContextManager[None]] = lambda inputs: nullcontext()
        self._in_a_row = 0

    def answer(self, questions: Sequence[Question], shard: tuple[int, int] = (0, 1)) -> None:
        """Answer the batches of a shard, those that are not answered yet."""
        todo = islice(enumerate(batches(questions, self.batch_size)), shard[0], None, shard[1])
        for number, chunk in todo:
            key = batch_key(chunk)
            batch = self.answers.find(key, self._image)
            if batch is None:
                batch = self._answered(key, number, chunk)
                self.answers.add(batch)
                for part, seconds in batch.seconds.items():
                    self.seconds[part] += seconds
            self.records |= batch.records
            self.on_batch(len(chunk))
            if self._in_a_row >= HOPELESS:
                self._give_up([chunk for _, chunk in todo])
                return

    def _give_up(self, chunks: list[list[Question]]) -> None:
        """Note how many questions are left of those that come, if any."""
        left = sum(len(chunk) for chunk in chunks if batch_key(chunk) not in self.answers.batches)
        if left:
            self.answers.failures.append(given_up(self._in_a_row, left))

    def _image(self, doc_id: int) -> str:
        try:
            return picture_hash(self.task.images(doc_id))
        except VisibenchError:  # said when the question is asked again
            return ""

    def _answered(self, key: str, number: int, chunk: list[Question]) -> Batch:
        started = time.perf_counter()
        if self.seed is not None:
            _seed(self.seed + number)
        batch = Batch(key, hardware=self.hardware)
        self._attempt(chunk, batch)
        batch.seconds["answer"] = time.perf_counter() - started
        return batch

    def _attempt(self, chunk: list[Question], batch: Batch) -> None:
        """Run questions, in halves if they fail together."""
        try:
            batch.join(self._run(chunk))
            self._in_a_row = 0
            return
        except FOREIGN as error:
            no_room = out_of_memory(error)
            if not (no_room or self.forgiving):
                raise
            why = "out of memory" if no_room else reason(error)
            if len(chunk) == 1:
                self._fail(chunk[0].doc_id, error, no_room, batch)
        if no_room:  # outside the clause above: what the failed run holds goes with its traceback
            release()
        if len(chunk) > 1:
            batch.smaller = batch.smaller or why
            for part in (chunk[: len(chunk) // 2], chunk[len(chunk) // 2 :]):
                self._attempt(part, batch)

    def _fail(self, doc_id: int, error: BaseException, no_room: bool, batch: Batch) -> None:
        if not self.forgiving:
            raise VisibenchError(
                f"out of memory at batch size 1 (question {doc_id}): choose a smaller model, another --dtype, or "
                "another device"
            ) from error
        if not isinstance(error, InputError | DataError | NoRoomError):  # the question's own, not the method's
            self._in_a_row += 1
        batch.failures.append(failure(error, doc_id))

    def _run(self, chunk: list[Question]) -> Batch:
        prompts = [question.prompt for question in chunk]
        images = [[upright(image) for image in self.task.images(question.doc_id)] for question in chunk]
        pixels = [picture_hash(pictures) for pictures in images]
        inputs = self.loaded.inputs(prompts, images, digest([prompts, pixels]) if self._shares else None)
        check_prefill(self.loaded, *inputs["input_ids"].shape)
        watch, reused = Nonfinite(), self._reused
        start = self.clock.mark()
        new = self._generate(inputs, generation(chunk[0].options), watch)
        end = self.clock.mark()
        if self.on_first is not None and watch.first is not None:
            self.on_first([question.doc_id for question in chunk], watch.first)
        trace = self.session.trace
        compute = flops.executed(trace, self.loaded.geometry)
        (together,) = flops.executed_by_batch(trace, self.loaded.geometry).total()
        nonfinite = watch.rows()  # read from the device behind ``end``, which therefore lies in the past
        latency = self.clock.between(start, end)
        columns: dict[str, list[Any]] = {
            "prompt": prompts,
            "output": self.loaded.decode(new),
            "pixels": pixels,
            "prompt_tokens": inputs["attention_mask"].sum(1).tolist(),
            "new_tokens": _lengths(new, self.loaded),
            "prompt_visual_tokens": list(trace.prompt.visual_counts),
            "visual_tokens": trace.visual_counts().tolist(),
            "kv_lengths": trace.kv_lengths().tolist(),
            "executed_macs": compute.total(),
            "kept": _kept(trace),
            "nonfinite": nonfinite,
            "latency_ms": [latency] * len(chunk),
            "batch_questions": [len(chunk)] * len(chunk),
            "places": _places(self.loaded, inputs, images, trace),
            "batch_macs": [together / len(chunk)] * len(chunk),
        }
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return Batch(
            asked="",
            records={question.doc_id: Answer(**row) for question, row in zip(chunk, rows, strict=True)},
            components={component: sum(macs) for component, macs in compute.components().items()},
            seconds={"generate": latency / 1e3},
            reused=self._reused - reused,
        )

    @property
    def _shares(self) -> bool:
        """Whether cells share what they have in common."""
        features = self.session.features
        return features is not None and features.limit > 0

    @property
    def _reused(self) -> int:
        features = self.session.features
        return 0 if features is None else features.reused

    def _generate(self, inputs: Any, options: dict[str, Any], watch: Nonfinite) -> torch.Tensor:
        """New token ids (B, n), on the host."""
        model: Any = self.loaded.model
        greedy = {"temperature": None, "top_p": None, "top_k": None}
        with torch.inference_mode(), self.around(inputs):
            ids = model.generate(**inputs, **options, **greedy, logits_processor=LogitsProcessorList([watch]))
        return ids[:, inputs["input_ids"].shape[1] :].cpu()


class Nonfinite(LogitsProcessor):
    """Notes rows whose logits are NaN or infinite at some step, without a look at the device before the end.

    Minus infinity alone counts only where it is all there is: it is how tokens are forbidden. ``first``: the logits of
    the first step.
    """

    def __init__(self) -> None:
        self._seen: torch.Tensor | None = None
        self.first: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.first = scores if self.first is None else self.first
        bad = ~torch.isfinite(scores.amax(-1))
        self._seen = bad if self._seen is None else self._seen | bad
        return scores

    def rows(self) -> list[bool]:
        """Whether it happened, a row each."""
        return [] if self._seen is None else self._seen.tolist()


def batches(questions: Sequence[Question], size: int) -> list[list[Question]]:
    """Questions in batches of one way of generating and of prompts of similar length, to pad little.

    They depend on all questions of a task, and on nothing else.
    """
    order = lambda question: (-len(question.prompt), question.prompt, question.doc_id)  # noqa: E731
    collator = lmms_eval.Collator(questions, order, group_fn=lambda question: question.options, grouping=True)
    return list(collator.get_batched(n=size))


def generation(wanted: dict[str, Any]) -> dict[str, Any]:
    """Options of ``generate``: greedy, whatever the task asks, within its cap on new tokens."""
    cap = wanted.get("max_new_tokens") or DEFAULT_MAX_NEW_TOKENS
    return {"max_new_tokens": int(cap), "do_sample": False, "num_beams": 1}


def failure(error: BaseException, doc_id: int | None = None) -> Failure:
    """The record of an exception."""
    lines = traceback.format_exception(error)
    return Failure(doc_id=doc_id, error=reason(error), traceback="".join(lines))


def given_up(failed: int, left: int) -> Failure:
    """The record of questions that were not asked."""
    error = f"given up after {failed} failures in a row, {left} {'question' if left == 1 else 'questions'} not asked"
    return Failure(doc_id=None, error=error, traceback="")


def batch_key(chunk: list[Question]) -> str:
    """Hash of a batch's questions, their prompts, and the way of generating."""
    return digest([chunk[0].options, [[question.doc_id, question.prompt] for question in chunk]])


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


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


def _places(loaded: LoadedModel, inputs: Any, images: list[list[Image]], trace: Trace) -> list[Places]:
    """Where the visual tokens of each row lie; empty for a row whose tokens are not those that its images say."""
    views, number, rows = loaded.adapter.family.views, 0, []
    for pictures, count in zip(images, trace.prompt.visual_counts, strict=True):
        places: Places = []
        for picture in pictures:
            if views is None:
                break
            processor = getattr(loaded.processor, "image_processor", None)
            places.append(views(loaded.model.config, processor, inputs, number, picture.size))
            number += 1
        rows.append(places if size(places) == count else [])
    return rows


def picture_hash(images: list[Image]) -> str:
    """Hash of decoded images, which names an image where the data set does not."""
    hashed = hashlib.blake2b(digest_size=8)
    for image in images:
        hashed.update(f"{image.mode}{image.size}".encode())
        hashed.update(image.tobytes())
    return hashed.hexdigest()
