"""Questions of one's own: a JSONL or Parquet file, or a folder of such, as a task of lmms-eval. All of it is checked.

A row has ``image`` (a path relative to the file, ``{bytes, path}`` as pandas and datasets write them, or a list of
these), ``question``, ``answers`` (a text or a list), and may have ``id``, ``category`` and ``choices``.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import PIL.Image

from ...errors import FOREIGN, DataError, InputError, OptionError, reason
from ...models.inputs import as_rgb, undecoded
from . import lmms_eval
from .definitions import DATA, Definition
from .scorers import LETTERS, SCORERS, Scorer, chosen, listed

NEEDED = ("image", "question", "answers")
ALLOWED = (*NEEDED, "id", "category", "choices")
SHOWN = 3
"""Mistakes that are named."""


def load(definition: Definition) -> tuple[lmms_eval.ConfigurableTask, Scorer]:
    """lmms-eval's task of these questions, and how it is scored: by default by choice where all questions have choices,
    by VQA accuracy where all have ten answers, else by exact match.

    Raises :class:`DataError` for whatever is wrong with the questions and their images, and :class:`OptionError` for a
    scorer that does not suit them.
    """
    rows, images = _checked(definition)
    scorer = SCORERS[definition.scorer or _default(rows)]
    if scorer is SCORERS["choice"] and any(not row["choices"] for row in rows):
        raise OptionError(f"{definition.file}: scored by choice, but not every question has choices: give them all")
    return Own(config=_config(definition.name, scorer, rows, images)), scorer


class Own(lmms_eval.ConfigurableTask):
    """A task whose rows are there already."""

    def download(self, dataset_kwargs: Any = None) -> None:
        """Take the rows over; nothing is downloaded."""
        docs = datasets.Dataset.from_list(list(dataset_kwargs["rows"]))
        self.dataset = self.dataset_no_image = datasets.DatasetDict({"test": docs})


def _config(
    name: str, scorer: Scorer, rows: list[dict[str, Any]], images: Mapping[str, list[bytes | Path]]
) -> dict[str, Any]:
    def doc_to_visual(doc: Mapping[str, Any]) -> list[PIL.Image.Image]:
        return [as_rgb(_opened(source)) for source in images[doc["question_id"]]]

    def doc_to_text(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, str]) -> str:
        return doc["question"] + listed(doc["choices"]) + lmms_eval_specific_kwargs["post_prompt"]

    def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
        return {scorer.key: scorer.score(results[0], doc["answers"], doc["choices"])}

    return {
        "task": name,
        "dataset_path": name,
        "dataset_kwargs": {"rows": tuple(rows)},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_visual": doc_to_visual,
        "doc_to_text": doc_to_text,
        "doc_to_target": "answers",
        "process_results": process_results,
        "generation_kwargs": {"max_new_tokens": 32, "temperature": 0, "num_beams": 1, "do_sample": False},
        "metric_list": [{"metric": scorer.key, "aggregation": "mean", "higher_is_better": True}],
        "lmms_eval_specific_kwargs": {"default": {"pre_prompt": "", "post_prompt": scorer.suffix}},
    }


def _default(rows: Sequence[Mapping[str, Any]]) -> str:
    if all(row["choices"] for row in rows):
        return "choice"
    return "vqa" if all(len(row["answers"]) >= 10 for row in rows) else "exact"


def files(place: Path) -> list[Path]:
    """The files of questions: the one, or those of a folder, all of one kind. Raises :class:`DataError`."""
    if place.is_file():
        return [place]
    found = sorted(file for suffix in DATA for file in place.glob(f"*{suffix}"))
    if not found:
        raise DataError(f"no questions in {place}: put a {' or '.join(DATA)} file there")
    if len({file.suffix for file in found}) > 1:
        raise DataError(f"{place} holds {found[0].name} and {found[-1].name}: leave questions of one kind there")
    return found


def _checked(definition: Definition) -> tuple[list[dict[str, Any]], dict[str, list[bytes | Path]]]:
    """Rows as lmms-eval gets them, and the sources of their images by question id; images are opened once, to see."""
    rows: list[dict[str, Any]] = []
    images: dict[str, list[bytes | Path]] = {}
    mistakes: list[str] = []
    looked: set[Path] = set()
    for file in files(definition.file):
        for number, raw in _read(file):
            where = f"{file.name} {number}"
            try:
                row, sources = _row(raw, len(rows), file.parent)
                for source in sources:
                    if source not in looked:
                        _look(source)
                    looked |= {source} if isinstance(source, Path) else set()
            except ValueError as error:
                mistakes.append(f"{where}: {error}")
                continue
            rows.append(row)
            images[row["question_id"]] = sources
    doubled = [name for name, count in Counter(row["question_id"] for row in rows).items() if count > 1]
    mistakes += [f"id {name!r} is there twice" for name in doubled]
    if mistakes:
        more = f", and {len(mistakes) - SHOWN} more" if len(mistakes) > SHOWN else ""
        raise DataError(f"{definition.file}: {'; '.join(mistakes[:SHOWN])}{more}. Nothing was run: correct them first")
    if not rows:
        raise DataError(f"{definition.file} holds no questions: give one a line (JSONL), or a row (Parquet)")
    return rows, images


def _read(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where a row stands, and the row."""
    if file.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(file)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file} cannot be read as Parquet ({error}): write it anew") from error
        missing = [name for name in NEEDED if name not in table.column_names]
        if missing:
            have = ", ".join(table.column_names)
            raise DataError(f"{file} has no column {missing[0]!r} (it has {have}): questions need {', '.join(NEEDED)}")
        yield from ((f"row {number}", row) for number, row in enumerate(table.to_pylist(), 1))
        return
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is no UTF-8 text ({error.reason}): save it as such") from error
    for number, line in enumerate(text.split("\n"), 1):  # JSON may hold other ends of lines as they are
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                row = reason(error)
            yield f"line {number}", row


def _row(raw: Any, place: int, folder: Path) -> tuple[dict[str, Any], list[bytes | Path]]:
    """A row as lmms-eval gets it, and its images. Raises ``ValueError`` that says what is wrong."""
    if not isinstance(raw, dict):
        raise ValueError(f"no JSON object ({raw})")
    missing = [name for name in NEEDED if raw.get(name) in (None, "", [])]
    if missing:
        raise ValueError(f"no {missing[0]}")
    unknown = sorted(set(raw) - set(ALLOWED))
    if unknown:
        raise ValueError(f"unknown {unknown[0]!r}: known are {', '.join(ALLOWED)}")
    answers, choices = _texts(raw["answers"], "answers"), _texts(raw.get("choices") or [], "choices")
    if choices and len(choices) > len(LETTERS):
        raise ValueError(f"{len(choices)} choices: at most {len(LETTERS)}")
    stray = [answer for answer in answers if choices and chosen(answer, choices) is None]
    if stray:
        raise ValueError(f"answer {stray[0]!r} is none of the choices")
    sources = [_source(one, folder) for one in (raw["image"] if isinstance(raw["image"], list) else [raw["image"]])]
    row = {
        "question_id": str(place if raw.get("id") is None else raw["id"]),
        "question": str(raw["question"]),
        "answers": answers,
        "choices": choices,
        "category": None if raw.get("category") is None else str(raw["category"]),
        "image": " ".join(_named(source, folder) for source in sources),
    }
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # "\ud800" is JSON, but no text
        raise ValueError(f"half a surrogate pair, {error.object[error.start]!a}, in its text") from error
    return row, sources


def _texts(value: Any, name: str) -> list[str]:
    values = value if isinstance(value, list) else [value]
    if any(isinstance(one, dict | list) or one is None for one in values):
        raise ValueError(f"{name} {value!r}: give a text, or a list of texts")
    return [str(one) for one in values]


def _source(value: Any, folder: Path) -> bytes | Path:
    if isinstance(value, Mapping) and set(value) <= {"bytes", "path"}:
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise ValueError("image is neither a path nor {bytes, path}")
    if "://" in value:
        raise ValueError(f"image {value} is a URL: download it and give its path")
    return folder / value


def _named(source: bytes | Path, folder: Path) -> str:
    """What names an image, the same for all questions about it."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()[:16]
    return str(source.relative_to(folder)) if source.is_relative_to(folder) else str(source)


def _look(source: bytes | Path) -> None:
    """Raise ``ValueError`` unless the image can be used; of a JPEG an eighth of its size is decoded."""
    name = "image" if isinstance(source, bytes) else f"image {source.name}"
    if isinstance(source, Path) and not os.path.isfile(source):  # nor a pipe, which might never end; False for any text
        raise ValueError(f"no {name} in {source.parent}")
    try:
        with _opened(source) as image:
            image.draft("RGB", (1, 1))
            image.load()
            as_rgb(image)
    except InputError as error:
        raise ValueError(f"{name}: {error}") from error
    except FOREIGN as error:
        raise ValueError(f"{name} cannot be decoded ({undecoded(error)})") from error


def _opened(source: bytes | Path) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
