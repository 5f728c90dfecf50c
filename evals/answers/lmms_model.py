"""A pruned model under lmms-eval's own command line: ``lmms-eval --model visibench --model_args pretrained=…``."""

from __future__ import annotations

import gc
import inspect
import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
from loguru import logger
from tqdm import tqdm

from ...engine import prune
from ...errors import OptionError, VisibenchError, suggest
from ...methods import Method
from ...models import LoadedModel, load_model
from ...models.load import of_rank
from ...models.protocols import Protocol, find
from ...models.weights import Quantization
from ...results.store import disk
from ...results.store.records import environment
from ...results.store.samples import Answer
from ..settings.method_spec import parse
from ..tasks import lmms_eval
from ..tasks.question import Question
from ..tasks.tasks import decoded
from .generate import Bridge

if TYPE_CHECKING:
    from PIL.Image import Image

_UNITS = {
    "visual_tokens": "visual tokens at the input of each decoder layer, in prefill",
    "kv_lengths": "entries of each decoder layer's KV cache after prefill",
    "executed_macs": "executed multiply-adds (MACs) of the prefill of the question alone",
    "batch_macs": "executed multiply-adds (MACs) of the prefill of its batch, padding included, a question of it",
    "kept": "bits in base64, one a visual token of the prompt: whether it is at the input of the last decoder layer",
    "pixels": "hash of the decoded images",
}
_GREEDY = {"do_sample": False, "temperature": 0, "num_beams": 1}
_USED = {"max_new_tokens", "until"}
_OF_SAMPLING = {"top_p", "top_k"}


class Visibench(lmms_eval.lmms):
    """The model that lmms-eval calls ``visibench``.

    Parameters
    ----------
    pretrained
        ``tiny``, a local folder, or a hub id such as ``llava-hf/llava-1.5-7b-hf``.
    method, method_args
        A method and its options: ``method=fastv,method_args=layer=2;keep=0.5``, or in one ``method=fastv:keep=0.5``.
        Options are separated by semicolons, since lmms-eval takes arguments apart at commas.
    device, dtype, attn_implementation, trust_remote_code, quantization, device_map, compile
        As for :func:`visibench.load_model`. Of several ranks each takes the GPU of its local rank.
    min_pixels, max_pixels
        Fewest and most pixels of an image, for processors that keep its size (Qwen-VL).
    batch_size
        Questions answered at once.
    record
        A JSON file, which must not exist yet, for what lmms-eval's own results have no place for: the visual tokens,
        KV-cache entries and executed MACs of every question; and how the model was loaded and asked.

    Raises :class:`~visibench.errors.VisibenchError`. A model made by :meth:`create_from_arg_string`, as lmms-eval's
    command line does, ends the process instead, with one line and exit code 2: lmms-eval itself would print the
    traceback and exit with 0, and other ranks would wait forever.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        method: str = "none",
        method_args: str = "",
        device: str = "auto",
        dtype: str = "auto",
        attn_implementation: str = "sdpa",
        batch_size: int | str = 1,
        trust_remote_code: bool = False,
        quantization: Quantization | None = None,
        device_map: str | None = None,
        compile: bool = False,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        record: str | None = None,
    ) -> None:
        super().__init__()
        self.method = _method(str(method), str(method_args), str(pretrained))
        self.batch_size, self.record = _batch_size(batch_size), _fresh(record)
        self.loaded: LoadedModel | None = load_model(
            str(pretrained),
            device=_of_this_rank(str(device)),
            dtype=str(dtype),
            attn_implementation=str(attn_implementation),
            trust_remote_code=bool(trust_remote_code),
            quantization=quantization,
            device_map=device_map,
            compile=bool(compile),
            protocol=_limited(min_pixels=min_pixels, max_pixels=max_pixels),
        )
        self.method.check(self.loaded.geometry)
        self.device = self.loaded.model.device
        self.records: dict[tuple[str, int], Answer] = {}
        self.seconds = 0.0
        self._mendable: Callable[[], AbstractContextManager] = nullcontext

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Visibench:
        """What ``--model_args`` describes; ``additional_config`` holds options of lmms-eval's own command line."""
        with _one_line():
            model = cls(**_arguments(cls, arg_string, additional_config or {}))
        model._mendable = _one_line
        return model

    def loglikelihood(self, requests: list) -> NoReturn:
        """Refused: answers are generated."""
        with self._mendable():
            raise OptionError("tasks scored by log-likelihood cannot run here: choose one of kind generate_until")

    def generate_until_multi_round(self, requests: list) -> NoReturn:
        """Refused: a question has one answer."""
        with self._mendable():
            raise OptionError("tasks of several rounds cannot run here: choose one of kind generate_until")

    def generate_until(self, requests: list) -> list[Any]:
        """Answers to all requests, in their order: those that :func:`~visibench.evals.answers.score.evaluate` gives."""
        questions = [Question.of(request) for request in requests]
        answers: list[Any] = [None] * len(questions)
        bar = tqdm(total=len(questions), desc="Model Responding", disable=self.rank != 0)
        with bar, self._mendable():
            if self.loaded is None:
                raise VisibenchError("lmms-eval has dropped this model after its run: make another one")
            with prune(self.loaded.model, self.method) as session:
                for places in _by_task(questions):
                    first = questions[places[0]]
                    _warn(first)
                    bridge = Bridge(self.loaded, session, _Shown(self, first), self.batch_size, bar.update)
                    bridge.answer([questions[place] for place in places])
                    for place in places:
                        question = questions[place]
                        record = self.records[question.task, question.doc_id] = bridge.records[question.doc_id]
                        counts = lmms_eval.TokenCounts(record.prompt_tokens, record.new_tokens)
                        answers[place] = lmms_eval.GenerationResult(question.ended(record.output), counts)
                    self.seconds += bridge.seconds["answer"]
        return answers

    def clean(self) -> None:
        """Called once on every rank after generation: report what all of them did, and drop the model."""
        ranks = _gathered((self.records, self.seconds))
        if ranks is not None:
            # Ranks with fewer questions ask their last one again to keep step: it counts once.
            records = {key: record for answered, _ in ranks for key, record in answered.items()}
            with self._mendable():
                self._report(dict(sorted(records.items())), max(seconds for _, seconds in ranks))
        self.loaded = None
        gc.collect()
        torch.cuda.empty_cache()

    def _report(self, records: dict[tuple[str, int], Answer], seconds: float) -> None:
        """Means go to ``throughput`` of lmms-eval's results, each question to the file of ``record``."""
        if not records:
            return
        new = sum(record.new_tokens for record in records.values())
        means = {
            "visual_tokens": fmean(fmean(record.visual_tokens) for record in records.values()),
            "executed_macs": fmean(record.executed_macs for record in records.values()),
        }
        lmms_eval.log_metrics(seconds, new, new / seconds, means | {"total_requests": len(records)})
        if self.record is not None and self.loaded is not None:
            content = {
                "method": self.method.name,
                "options": self.method.hyperparameters(),
                "batch_size": self.batch_size,
                "protocol": self.loaded.protocol.record(),
                "environment": environment(self.loaded.describe()).model_dump(mode="json"),
                "units": _UNITS,
                "samples": [
                    {"task": task, "doc_id": doc_id} | asdict(record) for (task, doc_id), record in records.items()
                ],
            }
            disk.make(self.record.parent)
            disk.write(self.record, json.dumps(content))


@dataclass(frozen=True)
class _Shown:
    """The images that the questions of a task show, in the place of a task of this package. ``first``: one of them."""

    model: Visibench
    first: Question

    def images(self, doc_id: int) -> list[Image]:
        first = self.first
        docs = self.model.task_dict[first.task][first.split]
        return decoded(first.task, doc_id, lambda: first.visual(docs[doc_id]))


# ---- arguments ----------------------------------------------------------------------------------------------------


def _arguments(cls: type, text: str, additional: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of ``cls`` from lmms-eval's ``--model_args`` and options such as ``--batch_size``."""
    known = list(inspect.signature(cls).parameters)
    try:
        given = lmms_eval.simple_parse_args_string(text)
    except ValueError:
        raise OptionError(f"--model_args {text!r}: expected key=value,key=value") from None
    given = {key.strip(): _bare(value) for key, value in given.items()}
    for key in given:
        if key not in known:
            raise OptionError(
                f"unknown model argument {key!r}; {suggest(key, known)}. Options of the method are separated by "
                "semicolons: method=fastv,method_args=layer=2;keep=0.5"
            )
    if "pretrained" not in given:
        raise OptionError("--model_args needs pretrained=…: tiny, a local folder or a hub id")
    outside = {key: value for key, value in additional.items() if value is not None}
    if str(outside.get("batch_size", 1)) == "1":  # also lmms-eval's default, so it may not have been given
        outside.pop("batch_size", None)
    for key, value in outside.items():
        if key not in known:
            raise OptionError(f"--{key} {value} is not used by the model visibench: leave it out")
        if str(given.setdefault(key, value)) != str(value):
            raise OptionError(f"{key} is given twice: {given[key]} in --model_args and {value} in --{key}")
    return given


def _bare(value: Any) -> Any:
    """``value`` without the quotes that protect commas, which lmms-eval leaves on."""
    quoted = isinstance(value, str) and len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return value[1:-1] if quoted else value


def _method(name: str, options: str, model: str) -> Method:
    if options and ":" in name:
        raise OptionError(f"options of the method are given twice: in method={name} and method_args={options}")
    return parse((f"{name}:{options}" if options else name).replace(";", ","), model)


def _limited(**pixels: int | None) -> Protocol:
    return find({"name": "hf"} | {key: number for key, number in pixels.items() if number is not None})


def _batch_size(given: int | str) -> int:
    if not str(given).isdecimal() or int(given) < 1:
        raise OptionError(f"batch_size must be a whole number of at least 1, not {given}")
    return int(given)


def _fresh(record: str | None) -> Path | None:
    path = None if record is None else Path(str(record))
    if path is not None and path.exists():
        raise OptionError(f"record={path} is there already: remove it, or name another file")
    return path


def _of_this_rank(device: str) -> str:
    """``device``, or that of this rank if there are several."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return of_rank(device, int(os.environ.get("LOCAL_RANK", 0))) if several else device


# ---- running ------------------------------------------------------------------------------------------------------


def _by_task(questions: list[Question]) -> list[list[int]]:
    """Places of the questions of each task: they are batched apart, as when the task runs alone."""
    places: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for place, question in enumerate(questions):
        places[question.task, question.split].append(place)
    return list(places.values())


def _warn(question: Question) -> None:
    """Say which generation options of a question's task are not followed."""
    unused = {
        key: value
        for key, value in question.options.items()
        if key not in _USED and value is not None and value != _GREEDY.get(key) and key not in _OF_SAMPLING
    }
    if unused:
        text = ", ".join(f"{key}={value}" for key, value in unused.items())
        logger.warning(f"{question.task}: answers are generated greedily, without its {text}")


def _gathered(value: Any) -> list[Any] | None:
    """The values of all ranks, on the first one; None on the others."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values, dst=0)
    return values


@contextmanager
def _one_line() -> Iterator[None]:
    """Turn what a user can mend into one line on standard error and exit code 2."""
    try:
        yield
    except VisibenchError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from error
