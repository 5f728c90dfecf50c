"""Baselines of the regression gate: what a run answered, scored, kept and computed, question by question, in one file.

Questions, targets and images are not in it: they are those of the run to compare, and one hash of them must agree.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pandas as pd
from pydantic import ValidationError

from ...errors import DataError
from ..statistics.metrics import COLUMNS, Measured, measure, reproduced
from ..store import code, disk
from ..store.records import CellConfig, Environment, Record, ScoreRecord, digest
from ..store.store import Cell

PACKAGED = Path(__file__).parent.parent / "baselines" / "ci.json"
SCHEMA: Literal[1] = 1
MACS_RTOL = 1e-9
FACTS = {
    "visual_tokens": "visual tokens by layer",
    "kv_lengths": "KV lengths by layer",
    "executed_macs": "executed MACs",
}


class Prefill(Record):
    """What one prefill kept and computed; by decoder layer, visual tokens at its input and entries of its KV cache."""

    visual_tokens: tuple[int, ...]
    kv_lengths: tuple[int, ...]
    executed_macs: float

    def agrees(self, other: Prefill, fact: str) -> bool:
        """Whether both are equal in one of ``FACTS``, MACs to rounding."""
        one, two = getattr(self, fact), getattr(other, fact)
        return math.isclose(one, two, rel_tol=MACS_RTOL) if fact == "executed_macs" else one == two


class BaselineCell(Record):
    """One method with one seed on one task, its questions in the order of their numbers.

    ``prefills``: the different ones; ``prefill``: which of them each question had.
    """

    config: CellConfig
    metrics: list[ScoreRecord]
    answers: list[str]
    scores: list[float]
    prefills: list[Prefill]
    prefill: list[int]


class Questions(Record):
    """The questions of a task: their numbers, and the hash of prompts, targets and pixels; ``hashes``: of each.

    Early baselines lack the latter.
    """

    doc_ids: list[int]
    data_hash: str
    hashes: tuple[str, ...] = ()

    def same(self, other: Questions) -> bool:
        """Whether both are the same questions."""
        return (self.doc_ids, self.data_hash) == (other.doc_ids, other.data_hash)


class Baseline(Record):
    """All that a run is compared with, and where it was made. ``checksum``: of all the rest."""

    schema_version: Literal[1] = SCHEMA
    environment: Environment
    questions: dict[str, Questions]
    checksum: str = ""
    cells: list[BaselineCell]

    def digest(self) -> str:
        """What ``checksum`` has to be."""
        return self.hashed(without="checksum")


def baseline_of(cells: Sequence[Cell]) -> Baseline:
    """A run as a baseline. Raises :class:`DataError` if its cells do not belong together or cannot be tested."""
    run, first = by_name(cells), cells[0]
    questions: dict[str, Questions] = {}
    for name, cell in run.items():
        task_questions = questions.setdefault(cell.config.task, asked_of(cell))
        if not task_questions.same(asked_of(cell)) or model_of(cell.config) != model_of(first.config):
            raise DataError(f"{name} has another model or other questions than the rest: give the folder of one sweep")
        if cell.metrics.environment != first.metrics.environment:
            raise DataError(f"{name} ran with other versions or on another machine than the rest: run the sweep anew")
    stored = [_cell(name, cell) for name, cell in run.items()]
    baseline = Baseline(environment=first.metrics.environment, questions=questions, cells=stored)
    return baseline.model_copy(update={"checksum": baseline.digest()})


def _cell(name: str, cell: Cell) -> BaselineCell:
    samples = samples_of(cell)
    for score in cell.metrics.scores:
        measured(name, samples, score)
    numbers: dict[Prefill, int] = {}
    prefill = [numbers.setdefault(prefill, len(numbers)) for prefill in prefills_of(samples)]
    return BaselineCell(
        config=cell.config,
        metrics=cell.metrics.scores,
        answers=samples["answer"].tolist(),
        scores=samples["score"].tolist(),
        prefills=list(numbers),
        prefill=prefill,
    )


def load(path: Path) -> Baseline:
    """Read a baseline. Raises :class:`DataError` if it is missing, damaged, changed by hand, or something else."""
    remedy = "restore it, or write a new one from a run with --update"
    try:
        text = disk.read(path).decode()
        baseline = Baseline.model_validate_json(text)
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not text"
        raise DataError(f"cannot read the baseline {path} ({why}): {remedy}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "JSON"
        raise DataError(f"{path} is no baseline of this version ({where}: {first['msg']}): {remedy}") from error
    content = json.loads(text)
    if content.pop("checksum", "") != digest(content):
        raise DataError(f"{path} was changed after it was written (its checksum differs): {remedy}")
    return baseline


def save(baseline: Baseline, path: Path) -> None:
    """Write a baseline, one cell a line; what stands at ``path`` is always complete."""
    cells = ",\n".join(cell.model_dump_json() for cell in baseline.cells)
    text = f'{baseline.model_dump_json(exclude={"cells"})[:-1]},"cells":[\n{cells}\n]}}\n'
    try:
        disk.make(path.parent)
        disk.write(path, text)
    except OSError as error:
        raise DataError(f"cannot write {path} ({error.strerror or error}): choose another --baseline") from error


def name_of(config: CellConfig) -> str:
    """What a cell is called, unique within a run."""
    return f"{config.label} · {config.task} · seed {config.seed}"


def by_name(cells: Sequence[Cell]) -> dict[str, Cell]:
    """Cells by name, task after task. Raises :class:`DataError` for two of the same name."""
    named: dict[str, Cell] = {}
    present = code.present(cells, lambda cell: cell.config.asked(), lambda cell: bool(cell.other_code))
    for cell in sorted(present, key=lambda cell: (cell.config.task, cell.config.label, cell.config.seed)):
        if name_of(cell.config) in named:
            raise DataError(
                f"{cell.path.parent} holds {name_of(cell.config)} several times, from runs with other settings: give a "
                "folder with one run"
            )
        named[name_of(cell.config)] = cell
    return named


def model_of(config: CellConfig) -> str:
    """What tells one model from another: a local one's fingerprint, a hub model's name."""
    return f"fingerprint {config.checkpoint}" if config.checkpoint else config.model


def asked_of(cell: Cell) -> Questions:
    """The questions that a cell was asked."""
    samples = samples_of(cell)
    parts = samples.reindex(columns=["doc_id", "prompt", "target", "image", "pixels"]).astype(str)
    hashes = tuple(digest(list(row))[:12] for row in parts.itertuples(index=False)) if "pixels" in samples else ()
    return Questions(doc_ids=samples["doc_id"].tolist(), data_hash=cell.metrics.data_hash, hashes=hashes)


def restricted(baseline: Baseline, cells: Sequence[Cell]) -> tuple[Baseline, str]:
    """A baseline of what ``cells`` are of it, and in words what that leaves out.

    Raises :class:`DataError` where they hold questions that are not in the baseline, or not the same ones of a task.
    """
    run = by_name(cells)
    kept = [stored for stored in baseline.cells if name_of(stored.config) in run]
    questions: dict[str, Questions] = {}
    cut = []
    for stored in kept:
        name, task = name_of(stored.config), stored.config.task
        asked = asked_of(run[name])
        places = _places(task, asked, baseline.questions[task])
        if not questions.setdefault(task, asked).same(asked):
            raise DataError(f"{name} was asked other questions of {task} than the rest: give the folder of one sweep")
        cut.append(_cut(stored, run[name], places))
    fewer = {task: (len(asked.doc_ids), len(baseline.questions[task].doc_ids)) for task, asked in questions.items()}
    told = [f"{len(baseline.cells) - len(cut)} of {len(baseline.cells)} cells"] * (len(cut) < len(baseline.cells))
    told += [f"{whole - part} of {whole} questions of {task}" for task, (part, whole) in fewer.items() if part < whole]
    return baseline.model_copy(update={"cells": cut, "questions": questions}), ", ".join(told)


def _places(task: str, asked: Questions, known: Questions) -> list[int]:
    """Where the questions ``asked`` stand among those ``known``."""
    if asked.same(known):
        return [*range(len(known.doc_ids))]
    if not asked.hashes or not known.hashes:
        raise DataError("baseline or run is of an earlier visibench and knows no single questions: make both anew")
    at = {key: place for place, key in enumerate(zip(known.doc_ids, known.hashes, strict=True))}
    missing = [key for key in zip(asked.doc_ids, asked.hashes, strict=True) if key not in at]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(asked.doc_ids)} questions of {task} are not in the baseline (first: number "
            f"{missing[0][0]}): ask a part of its questions"
        )
    return [at[key] for key in zip(asked.doc_ids, asked.hashes, strict=True)]


def _cut(stored: BaselineCell, cell: Cell, places: list[int]) -> BaselineCell:
    """A cell of the baseline with the questions at some ``places``, its scores those of these."""
    answers, scores, prefill = (
        [column[place] for place in places] for column in (stored.answers, stored.scores, stored.prefill)
    )
    samples = samples_of(cell).assign(answer=answers, score=scores)
    metrics = [
        score.model_copy(update={"value": measure(score.key, [samples], score.maximum).value})
        for score in stored.metrics
    ]
    return stored.model_copy(
        update={
            "config": stored.config.model_copy(update={"limit": cell.config.limit}),
            "metrics": metrics,
            "answers": answers,
            "scores": scores,
            "prefill": prefill,
        }
    )


def samples_of(cell: Cell) -> pd.DataFrame:
    """The samples of a cell in the order of the questions."""
    samples = cell.samples()
    missing = [column for column in (*COLUMNS, *FACTS) if column not in samples]
    if missing:
        raise DataError(f"the samples in {cell.path} have no column {missing[0]!r}: delete the folder and run again")
    return samples.sort_values("doc_id", ignore_index=True)


def prefills_of(samples: pd.DataFrame) -> list[Prefill]:
    """The prefill of each question."""
    rows = zip(*(samples[fact] for fact in FACTS), strict=True)
    return [
        Prefill(visual_tokens=tuple(tokens), kv_lengths=tuple(lengths), executed_macs=macs)
        for tokens, lengths, macs in rows
    ]


def measured(name: str, samples: pd.DataFrame, score: ScoreRecord) -> Measured:
    """A metric by image. Raises :class:`DataError` if the scores of single questions do not give its stored value."""
    found = reproduced(score.key, [samples], [score.value], score.maximum)
    if found is None:
        raise DataError(
            f"{name}: its answers do not add up to its {score.title} of {score.value:g}, so no drop can be tested: "
            "leave this task out"
        )
    return found
