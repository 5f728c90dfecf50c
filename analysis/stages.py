"""How a model fuses images: what its layers look at, and what it says when vision is taken away in some of them.

One dense pass over the questions records attention, value norms, contributions and the logit lens
(:mod:`.recorder`); one pass for each window of layers (:mod:`.windows`) measures what is lost without vision there; a
rule finds the stages (:mod:`.boundaries`). Every figure is a mean over questions with a 95 % interval clustered by
image.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..errors import OptionError
from ..evals.answers.score import Evaluation
from ..evals.tasks.tasks import Task
from ..models import LoadedModel
from ..models.load import fingerprint
from ..results.statistics.intervals import Estimate, estimate
from ..results.statistics.metrics import agreement, measure, measure_values
from ..results.store import code, disk
from ..results.store.records import digest, environment
from ..results.store.stage_records import (
    ALL,
    AnalysedTask,
    Curve,
    Mean,
    StageRecord,
    StagesFound,
    TopTokens,
    WindowEffect,
)
from . import boundaries
from .asking import Asker
from .recorder import Recorder, Row
from .windows import Window, windows

LOOKS = ("attention", "values", "contributions", "lens")
PARTS = (*LOOKS, "windows")


@dataclass
class Seen:
    """The dense model on a task; by doc_id, log-probabilities of the next token and what was recorded."""

    evaluation: Evaluation
    log_p: dict[int, Tensor] = field(default_factory=dict)
    rows: dict[int, Row] = field(default_factory=dict)
    tops: dict[int, dict[str, list[list[int]]]] = field(default_factory=dict)

    @property
    def samples(self) -> pd.DataFrame:
        """A row a question."""
        return self.evaluation.samples

    @property
    def images(self) -> list[str]:
        """The image of each question, apart from those of other tasks."""
        return [f"{task}/{image}" for task, image in zip(self.samples["task"], self.samples["image"], strict=True)]


@dataclass
class StageAnalysis:
    """An analysis of ``loaded`` on ``tasks``.

    ``layers``: where to look, and where windows begin and end; all by default. ``parts``: of :data:`PARTS`. ``limit``:
    the first so many questions of each task. ``journal``: a file that keeps what is measured, window by window, and
    from which an interrupted analysis goes on. ``on_batch``: called with the number of questions after each batch.
    """

    loaded: LoadedModel
    tasks: Sequence[Task]
    layers: Sequence[int] = ()
    parts: Sequence[str] = PARTS
    limit: int | None = None
    batch_size: int = 8
    seed: int = 0
    journal: Path | None = None
    on_batch: Callable[[int], Any] = lambda questions: None

    def __post_init__(self) -> None:
        check_trained(self.loaded.weights)
        self.depth = self.loaded.geometry.layers
        self.layers = sorted({*self.layers}) or list(range(self.depth))
        if self.layers[0] < 0 or self.layers[-1] >= self.depth:
            raise OptionError(f"layers {self.layers[0]}–{self.layers[-1]}: the model has layers 0–{self.depth - 1}")
        self.windows = windows(self.layers, self.depth) if "windows" in self.parts else []
        self.checkpoint = fingerprint(self.loaded.name)
        self._asker = Asker(self.loaded, self.limit, self.batch_size, self.seed, lambda done: self.on_batch(done))
        self._bound = json.dumps({"analysis": self._identity()}).encode() + b"\n"
        self._kept = self._read()

    @property
    def passes(self) -> int:
        """How often every question is asked."""
        return 1 + len(self.windows)

    def run(self) -> StageRecord:
        """Measure what is not measured yet, and put all of it together."""
        dense = {task.name: self._dense(task) for task in self.tasks}
        lost = {
            window: {task.name: self._without(window, task, dense[task.name]) for task in self.tasks}
            for window in self.windows
        }
        by_task = {**dense, ALL: None}
        return StageRecord(
            model=self.loaded.name,
            checkpoint=self.checkpoint,
            depth=self.depth,
            layers=list(self.layers),
            seed=self.seed,
            batch_size=self.batch_size,
            tasks={task.name: _questions(task, dense[task.name]) for task in self.tasks},
            curves=[curve for name in by_task for curve in self._curves(name, _of(dense, name))],
            windows=[_effect(window, by, dense) for window, by in lost.items()],
            top_tokens=self._top_tokens(list(dense.values())),
            stages=[found for name in by_task for found in self._stages(name, _of(dense, name), lost)],
            rule=" ".join((boundaries.__doc__ or "").split()),
            tolerance_nats=boundaries.TOLERANCE,
            environment=environment(self.loaded.describe()),
        )

    # ---- asking ---------------------------------------------------------------------------------------------------

    def _dense(self, task: Task) -> Seen:
        looks = tuple(look for look in LOOKS if look in self.parts)
        recorder = Recorder(looks=looks, at_layers=tuple(self.layers))
        seen: dict[int, tuple[Tensor, Row, dict[str, list[list[int]]]]] = {}

        def on_first(doc_ids: list[int], logits: Tensor) -> None:
            recording = recorder.seen[-1]
            recorder.seen.clear()
            rows, tops = recording.finish(logits)
            seen.update(zip(doc_ids, zip(_log_p(logits), rows, tops, strict=True), strict=True))

        found = Seen(self._asker.evaluated(recorder, task, on_first))
        for doc_id, (log_p, row, top) in seen.items():
            found.log_p[doc_id], found.rows[doc_id], found.tops[doc_id] = log_p, row, top
        return found

    def _without(self, window: Window, task: Task, dense: Seen) -> pd.DataFrame:
        """What is answered without vision in a window: columns kl, agree, answer, score, a row a question."""
        key = f"{window.name} {task.name} {dense.evaluation.outcome.data_hash}"
        if key not in self._kept:
            kl: dict[int, float] = {}

            def on_first(doc_ids: list[int], logits: Tensor) -> None:
                before = torch.stack([dense.log_p[doc_id] for doc_id in doc_ids])
                divergence = (before.exp() * (before - _log_p(logits))).sum(-1).clamp(min=0)
                kl.update(zip(doc_ids, divergence.tolist(), strict=True))

            samples = self._asker.scored(window.method, task, on_first)
            self._keep(
                key,
                {
                    "kl": [kl[doc_id] for doc_id in samples["doc_id"]],
                    "agree": agreement(dense.samples, samples).astype(bool).tolist(),
                    "answer": samples["answer"].tolist(),
                    "score": samples["score"].tolist(),
                },
            )
        else:
            self.on_batch(len(dense.samples))
        return pd.DataFrame(self._kept[key])

    # ---- what is kept ---------------------------------------------------------------------------------------------

    def _identity(self) -> str:
        """Hash of all that decides about the answers, beside the questions."""
        facts = {key: str(value) for key, value in self.loaded.describe().items() if key not in ("hardware", "threads")}
        tasks = {task.name: task.origin for task in self.tasks}
        made = [code.engine(), *map(code.of_method, sorted({type(w.method).__module__ for w in self.windows}))]
        return digest([facts, self.checkpoint, tasks, self.limit, self.batch_size, self.seed, made])

    def _read(self) -> dict[str, dict[str, list[Any]]]:
        if self.journal is None:
            return {}
        disk.bind(self.journal, self._bound)
        lines = (json.loads(line) for line in disk.bound_lines(self.journal, self._bound))
        return {line["window"]: line["columns"] for line in lines}

    def _keep(self, key: str, columns: dict[str, list[Any]]) -> None:
        self._kept[key] = columns
        if self.journal is not None:
            with disk.writing(self.journal):
                disk.append(self.journal, (json.dumps({"window": key, "columns": columns}) + "\n").encode())

    # ---- putting together -----------------------------------------------------------------------------------------

    def _curves(self, name: str, seen: Sequence[Seen]) -> list[Curve]:
        rows = [row for one in seen for _, row in sorted(one.rows.items())]
        images = [image for one in seen for image in one.images]
        curves = []
        for quantity in rows[0] if rows else ():
            values = np.array([row[quantity] for row in rows])
            layers = list(self.layers)[: values.shape[1]]
            if quantity.endswith("_rank"):
                first = [_mean(column == 1, images, 1.0) for column in values.T]
                curves.append(Curve(task=name, quantity=quantity.replace("rank", "first"), layers=layers, means=first))
                means = [_power(_mean(np.log(column), images)) for column in values.T]
            else:
                share = quantity.partition("_")[2] in ("share", "strongest", "entropy")
                means = [_mean(column, images, 1.0 if share else None) for column in values.T]
            curves.append(Curve(task=name, quantity=quantity, layers=layers, means=means))
        return curves

    def _top_tokens(self, seen: Sequence[Seen]) -> list[TopTokens]:
        tops = [top for one in seen for top in one.tops.values()]
        found = []
        kinds: tuple[Literal["hidden", "visual"], ...] = ("hidden", "visual")
        for kind in (kind for kind in kinds if any(kind in top for top in tops)):
            for place, layer in enumerate(list(self.layers)[: len(tops[0][kind])]):
                counts = Counter(top[kind][place][0] for top in tops)
                tokens = [(self.loaded.processor.tokenizer.decode([token]), n) for token, n in counts.most_common(5)]
                found.append(TopTokens(kind=kind, layer=layer, tokens=tokens))
        return found

    def _stages(
        self, name: str, seen: Sequence[Seen], lost: dict[Window, dict[str, pd.DataFrame]]
    ) -> list[StagesFound]:
        if not lost:
            return []
        tasks = [str(one.samples["task"].iloc[0]) for one in seen]
        joined = {window: pd.concat([by[task] for task in tasks]) for window, by in lost.items()}
        tolerance = boundaries.TOLERANCE
        by_token = {window: (frame["kl"] <= tolerance).to_numpy() for window, frame in joined.items()}
        by_answer = {window: frame["agree"].to_numpy(bool) for window, frame in joined.items()}
        found = {
            "next token": boundaries.find(by_token, self.depth),
            "answer": boundaries.find(by_answer, self.depth),
        }
        return [_found(by, name, one) for by, one in found.items()]


def check_trained(weights: str) -> None:
    """Raise :class:`OptionError` for a model without trained weights."""
    if weights != "pretrained":
        raise OptionError(
            f"--weights {weights}: how a model fuses images is what training made of it, and such weights were never "
            "trained: leave --weights out"
        )


def _of(dense: dict[str, Seen], name: str) -> list[Seen]:
    return list(dense.values()) if name == ALL else [dense[name]]


def _log_p(logits: Tensor) -> Tensor:
    return logits.double().log_softmax(-1).cpu()


def _questions(task: Task, seen: Seen) -> AnalysedTask:
    asked, images = len(seen.samples), seen.samples["image"].nunique()
    return AnalysedTask(asked=asked, total=len(task.docs), origin=task.origin, images=images)


def _effect(window: Window, by: dict[str, pd.DataFrame], dense: dict[str, Seen]) -> WindowEffect:
    effects = {}
    for name in (*by, ALL):
        frame = pd.concat([by[task] for task in (by if name == ALL else [name])])
        images = [image for one in _of(dense, name) for image in one.images]
        effects[name] = {
            "kl": _mean(frame["kl"].to_numpy(float), images),
            "agreement": _mean(frame["agree"].to_numpy(float), images, 1.0),
        }
        if name != ALL:
            changed = dense[name].samples.assign(answer=frame["answer"].to_numpy(), score=frame["score"].to_numpy())
            headline = dense[name].evaluation.outcome.scores[0]
            effects[name]["score"] = _as_mean(estimate(measure(headline.key, [changed], headline.maximum)))
    return WindowEffect(kind=window.kind, first=window.first, end=window.end, effects=effects)


def _found(by: Any, task: str, found: boundaries.Found) -> StagesFound:
    some = len(found.begins) > 0
    quartiles = lambda values: tuple(np.quantile(values, (0.25, 0.75)).tolist()) if some else None  # noqa: E731
    return StagesFound(
        by=by,
        task=task,
        begin=found.begin if some else None,
        end=found.end if some else None,
        begins=quartiles(found.begins),
        ends=quartiles(found.ends),
        needed=len(found.begins),
        asked=found.asked,
        none_because=found.none_because,
    )


def _mean(values: Any, images: Sequence[str], maximum: float | None = None) -> Mean:
    return _as_mean(estimate(measure_values(np.asarray(values, float), images, maximum)))


def _as_mean(one: Estimate) -> Mean:
    return Mean(value=one.value, low=one.low, high=one.high)


def _power(mean: Mean) -> Mean:
    return Mean(value=float(np.exp(mean.value)), low=float(np.exp(mean.low)), high=float(np.exp(mean.high)))
