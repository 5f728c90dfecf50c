"""Baselines of the regression gate: what a run answered, scored, kept and computed, question by question, in one file.

Questions, targets and images are not in it: they are those of the run to compare, and one hash of them must agree.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pandas as pd
from pydantic import ValidationError

from ...errors import DataError
from ..statistics.metrics import COLUMNS, Measured, measure, reproduces
from ..store import code
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
    """The questions of a task: their numbers, and the hash of prompts, targets and pixels."""

    doc_ids: list[int]
    data_hash: str


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
        if task_questions != asked_of(cell) or model_of(cell.config) != model_of(first.config):
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
        text = path.read_text(encoding="utf-8")
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
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
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
    return Questions(doc_ids=samples_of(cell)["doc_id"].tolist(), data_hash=cell.metrics.data_hash)


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
    if not reproduces(score.key, samples, score.value):
        raise DataError(
            f"{name}: its answers do not add up to its {score.title} of {score.value:g}, so no drop can be tested: "
            "leave this task out"
        )
    return measure(score.key, [samples], score.maximum)
