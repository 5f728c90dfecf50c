"""What statistics need of cells: answers as arrays, and what all methods were asked, held once however many answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ...errors import DataError
from ..store.store import Cell

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]
Words = NDArray[np.object_]
ASKED = ("doc_id", "question_id", "image", "category", "prompt", "target")
SAME = ("doc_id", "prompt", "target", "image")
PROMPT, TOKENS = "prompt_visual_tokens", "visual_tokens"
_SET_OFF = re.compile(r"^[\"'`“”‘’(\[{]+|[\"'`“”‘’)\]},;:.!?]+$")


@dataclass(frozen=True, eq=False)
class Clusters:
    """Questions that have something in common. ``codes``: the cluster of each, -1 for none; ``names`` of clusters."""

    codes: Integers
    names: Sequence[Any]

    @classmethod
    def of(cls, values: NDArray[Any], *, sort: bool = False) -> Clusters:
        """By equal values, in the order in which they first come, or sorted."""
        codes, names = pd.factorize(values, sort=sort)
        return cls(codes.astype(np.int64), names)

    @cached_property
    def sizes(self) -> Floats:
        """How many questions each has."""
        return np.bincount(self.codes, minlength=len(self.names)).astype(float)

    def sums(self, terms: Floats) -> Floats:
        """Sums of ``terms`` (questions, k) over each cluster: (clusters, k)."""
        return np.stack([np.bincount(self.codes, term, len(self.names)) for term in terms.T], axis=1)


@dataclass(frozen=True, eq=False)
class Asked:
    """The questions of a task, in their order; ``table`` has the columns :data:`ASKED`."""

    table: pa.Table
    _parts: dict[Callable[[Asked], Flags], tuple[Flags, Asked]] = field(default_factory=dict)
    _groups: dict[bytes, Clusters] = field(default_factory=dict)

    def column(self, name: str) -> NDArray[Any]:
        """One of the columns, None where there is nothing."""
        column = self.table[name]
        return np.full(len(column), None) if pa.types.is_null(column.type) else column.to_numpy()

    @cached_property
    def targets(self) -> Words:
        """Reference answers in lower case, without space around them."""
        return _plain(self.column("target"))

    @cached_property
    def images(self) -> Clusters:
        """By the image that they are about."""
        return Clusters.of(self.column("image"))

    def images_of(self, group: Flags) -> Clusters:
        """The same of some of the questions; many methods are asked about the same ones."""
        key = group.tobytes()
        if key not in self._groups:
            self._groups[key] = Clusters.of(self.images.codes[group])
        return self._groups[key]

    @cached_property
    def categories(self) -> Clusters:
        """By category, sorted by name."""
        return Clusters.of(self.column("category"), sort=True)

    @cached_property
    def pairs(self) -> Clusters:
        """By category and what they are about. Raises :class:`DataError` for a question that stands alone."""
        things = Clusters.of(self.column("question_id"))
        pairs = Clusters.of(self.categories.codes * len(things.names) + things.codes)
        if min(self.categories.codes.min(initial=0), things.codes.min(initial=0)) < 0 or (pairs.sizes != 2).any():
            raise DataError("MME scores pairs of questions, but some question stands alone: run it again")
        return pairs

    def part(self, chosen: Callable[[Asked], Flags]) -> tuple[Flags, Asked]:
        """Which questions are ``chosen``, and those alone."""
        if chosen not in self._parts:
            which = chosen(self)
            self._parts[chosen] = which, self if which.all() else Asked(self.table.filter(pa.array(which)))
        return self._parts[chosen]


@dataclass(frozen=True, eq=False)
class Answers:
    """One method's answers, one seed: the ``score`` of each question, and what was ``said``.

    ``prompt``, ``tokens`` (questions, layers): visual tokens in the prompt and at the input of each decoder layer; None
    where that is not known.
    """

    asked: Asked
    score: Floats
    said: Words
    prompt: Integers | None = None
    tokens: Floats | None = None

    @classmethod
    def of(cls, run: Answers | pd.DataFrame) -> Answers:
        """Samples in memory, in their order."""
        if isinstance(run, Answers):
            return run
        asked = Asked(pa.Table.from_pandas(run[list(ASKED)], preserve_index=False))
        return cls(asked, run["score"].to_numpy(float), run["answer"].to_numpy(object))

    def only(self, chosen: Flags, asked: Asked) -> Answers:
        """Those to the ``chosen`` questions, which are ``asked``."""
        return self if asked is self.asked else Answers(asked, self.score[chosen], self.said[chosen])

    @cached_property
    def plain(self) -> Words:
        """What was said, in lower case, without space around it."""
        return _plain(self.said)

    @cached_property
    def normalised(self) -> Words:
        """What was said, as agreement reads it (:func:`normalised`)."""
        return np.array([normalised(text or "") for text in self.said], object)

    @property
    def adapts(self) -> bool:
        """Whether questions with the same number of visual tokens in the prompt keep different ones."""
        if self.prompt is None or self.tokens is None:
            return False
        if (self.tokens == self.tokens[:1]).all():
            return False
        _, first, alike = np.unique(self.prompt, return_index=True, return_inverse=True)
        return bool((self.tokens != self.tokens[first[alike]]).any())

    @property
    def spread(self) -> float:
        """Variance over the questions of T, visual tokens averaged over layers."""
        assert self.tokens is not None
        known = self.tokens >= 0
        return float((np.where(known, self.tokens, 0).sum(1) / known.sum(1)).var())


_known: WeakValueDictionary[tuple[str, int], Asked] = WeakValueDictionary()


def answers(cell: Cell) -> Answers:
    """The samples of a cell, in the order of the questions. What was asked alike is one object, compared in full."""
    table = in_order(cell.table(*ASKED, "answer", "score", PROMPT, TOKENS))
    named, questions = (cell.config.task, len(table)), table.select(ASKED)
    asked = _known.get(named)
    if asked is None or not asked.table.equals(questions):
        _known[named] = asked = Asked(questions)
    have = table.column_names
    return Answers(
        asked=asked,
        score=table["score"].to_numpy().astype(float),
        said=np.full(len(table), None) if pa.types.is_null(table["answer"].type) else table["answer"].to_numpy(),
        prompt=table[PROMPT].to_numpy() if PROMPT in have else None,
        tokens=_layers(table[TOKENS]) if TOKENS in have else None,
    )


def in_order(table: pa.Table) -> pa.Table:
    """Samples in the order of the questions."""
    number = table["doc_id"].to_numpy()
    return table.take(np.argsort(number, kind="stable")) if (number[1:] < number[:-1]).any() else table


def check_same_questions(one: Answers | pd.DataFrame, other: Answers | pd.DataFrame) -> None:
    """Raise :class:`DataError` unless both hold the same questions, targets and images in the same order."""
    first, second = Answers.of(one).asked, Answers.of(other).asked
    if first is second:
        return
    if len(first.table) != len(second.table):
        raise DataError(
            f"{len(first.table)} questions cannot be paired with {len(second.table)}: run both with the same --limit "
            "on the same data"
        )
    differ = np.zeros(len(first.table), bool)
    for name in SAME:
        differ |= np.array([str(a) != str(b) for a, b in zip(first.column(name), second.column(name), strict=True)])
    if differ.any():
        doc = first.column("doc_id")[int(differ.argmax())]
        raise DataError(
            f"{differ.sum()} of {len(differ)} questions differ (first: doc_id {doc}), so answers cannot be paired: run "
            "both on the same data"
        )


@lru_cache(maxsize=1 << 16)  # many answers are the same few words
def normalised(answer: str) -> str:
    """An answer in lower case without extra spaces and without the marks that set off a word, as in "a cat." or "(no)".

    Marks inside a word, a sign and a decimal point count: 3.5 is not 35. So does an answer of marks alone.
    """
    words = (_SET_OFF.sub("", word) for word in answer.lower().split())
    return " ".join(filter(None, words)) or answer.strip()


def _plain(texts: Words) -> Words:
    return np.array([(text or "").lower().strip() for text in texts], object)


def _layers(column: pa.ChunkedArray) -> Floats:
    """Lists of numbers as rows of one width, -1 behind what is shorter."""
    width = pc.list_value_length(column).to_numpy()
    rows = np.full((len(width), int(width.max(initial=0))), -1.0)
    rows[np.arange(rows.shape[1]) < width[:, None]] = pc.list_flatten(column).to_numpy()
    return rows
