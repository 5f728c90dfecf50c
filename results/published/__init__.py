"""Figures that papers print, one YAML file a paper, each figure as it is printed and with its source.

Figures that contradict each other stand side by side. A row belongs to the paper that prints it, which need not be the
paper that measured it. What the columns are, and on which models, says ``vocabulary.yaml``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from ...errors import DataError, UnknownNameError, suggest
from ..store.records import Record

FOLDER = Path(__file__).parent
VOCABULARY = "vocabulary.yaml"
Counted = Literal["inputs", "outputs", "after", "not said"]
Option = int | float | str
Value = Decimal | tuple[Decimal, Decimal]


class Quantity(Record):
    """What a column holds; see ``vocabulary.yaml`` for the fields."""

    title: str
    unit: str
    kind: Literal["benchmark", "summary", "cost"] = "benchmark"
    benchmark: str = ""
    metric: str = ""
    task: str = ""
    keys: list[str] = Field(default_factory=list)
    questions: int = 0
    apart: str = ""


class Model(Record):
    """A model of which figures are printed."""

    title: str
    visual_tokens: int | None = None
    checkpoints: list[str] = Field(default_factory=list)


class Vocabulary(Record):
    """All that figures are named by."""

    quantities: dict[str, Quantity]
    models: dict[str, Model]


class Row(Record):
    """One printed row. ``values``: one for each column, a pair where only a range is known, None where none is printed.

    ``tokens``: the nominal budget, and ``counted`` what it counts: visual tokens in the mean over decoder-layer
    ``inputs`` or ``outputs``, or ``after`` the last cut. ``options``: hyperparameters that the source gives, in the
    words of ``visibench methods``. ``setting``: in words, where ``tokens`` does not say it.
    """

    method: str
    tokens: int | None = None
    counted: Counted = "not said"
    setting: str = ""
    options: dict[str, Option | list[Option]] = Field(default_factory=dict)
    fine_tuned: bool = False
    values: list[Value | None]
    remark: str = ""

    @property
    def budget(self) -> str:
        """The setting in words."""
        told = self.setting or ("" if self.tokens is None else f"{self.tokens} tokens")
        return ", ".join(filter(None, [told, "fine-tuned" if self.fine_tuned else ""]))


class Table(Record):
    """Rows printed in one place for one model. ``conventions``: what a column means here, and how costs are counted."""

    where: str
    model: str
    columns: list[str]
    conventions: dict[str, str] = Field(default_factory=dict)
    quoted_from: str = ""
    remarks: list[str] = Field(default_factory=list)
    rows: list[Row]

    @model_validator(mode="after")
    def _complete(self) -> Table:
        if any(len(row.values) != len(self.columns) for row in self.rows):
            raise ValueError(f"{self.where}: every row needs {len(self.columns)} values, one a column")
        known = vocabulary()
        unknown = [name for name in self.columns if name not in known.quantities]
        if unknown or self.model not in known.models:
            raise ValueError(f"{self.where}: {VOCABULARY} has no {', '.join(unknown) or self.model}")
        costs = {name for name in self.columns if known.quantities[name].kind == "cost"}
        if not costs <= self.conventions.keys() <= set(self.columns):
            raise ValueError(f"{self.where}: conventions must name columns, all costs among them: {sorted(costs)}")
        return self


class Paper(Record):
    """A paper and what it prints. ``full_text``: whether it was read in full; None: not recorded."""

    name: str
    title: str = ""
    arxiv: str = ""
    link: str = ""
    version: str = ""
    full_text: bool | None = None
    remarks: list[str] = Field(default_factory=list)
    tables: list[Table]


@dataclass(frozen=True)
class Figure:
    """One printed figure and all that is known of it."""

    paper: Paper
    table: Table
    row: Row
    name: str
    value: Value

    @property
    def quantity(self) -> Quantity:
        """What was measured."""
        return vocabulary().quantities[self.name]

    @property
    def family(self) -> str:
        """The benchmark, whatever its metric."""
        return self.quantity.benchmark or self.name

    @property
    def names(self) -> dict[str, set[str]]:
        """What :func:`figures` selects by."""
        return {
            "model": {self.table.model},
            "method": {self.row.method},
            "benchmark": {self.name, self.family},
        }

    @property
    def printed(self) -> str:
        """The figure with the digits in print."""
        return "–".join(map(str, self.value)) if isinstance(self.value, tuple) else str(self.value)

    @property
    def source(self) -> str:
        """Paper and place in it."""
        return f"{self.paper.name}, {self.table.where}"

    @property
    def ratio(self) -> float | None:
        """Nominal tokens ÷ the model's visual tokens; None where one of them is not known."""
        all_tokens = vocabulary().models[self.table.model].visual_tokens
        return self.row.tokens / all_tokens if self.row.tokens is not None and all_tokens else None

    @property
    def remarks(self) -> list[str]:
        """What a reader must know before relying on the figure."""
        quoted = [f"Quoted from {self.table.quoted_from}."] if self.table.quoted_from else []
        return [*self.paper.remarks, *quoted, *self.table.remarks, *filter(None, [self.row.remark])]


class _Loader(yaml.SafeLoader):
    """Keeps the digits that are printed: 62.0 stays 62.0."""


def _decimal(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Decimal:
    return Decimal(loader.construct_scalar(node))


_Loader.add_constructor("tag:yaml.org,2002:float", _decimal)


def _read(file: Path, kind: type[Any]) -> Any:
    """A checked file. Raises :class:`DataError` naming the file and what is wrong in it."""
    try:
        return kind.model_validate(yaml.load(file.read_text(encoding="utf-8"), _Loader))
    except yaml.YAMLError as error:
        raise DataError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


@cache
def vocabulary() -> Vocabulary:
    """Quantities and models by name."""
    return _read(FOLDER / VOCABULARY, Vocabulary)


@cache
def papers() -> tuple[Paper, ...]:
    """All papers, by name of their files."""
    return tuple(_read(file, Paper) for file in sorted(FOLDER.glob("*.yaml")) if file.name != VOCABULARY)


def figures(model: str | None = None, method: str | None = None, benchmark: str | None = None) -> list[Figure]:
    """Printed figures, of one model, method or benchmark where one is named.

    ``benchmark``: any column, such as ``mme_perception``, or all metrics of a family, such as ``mme``. Raises
    :class:`UnknownNameError` for a name that no figure has.
    """
    selected = _all()
    for what, wanted in (("model", model), ("method", method), ("benchmark", benchmark)):
        if wanted is None:
            continue
        known = {name for figure in selected for name in figure.names[what]}
        if wanted not in known:
            raise UnknownNameError(f"no published figures of {what} {wanted!r}; {suggest(wanted, known)}")
        selected = [figure for figure in selected if wanted in figure.names[what]]
    return selected


def _all() -> list[Figure]:
    return [
        Figure(paper, table, row, name, value)
        for paper in papers()
        for table in paper.tables
        for row in table.rows
        for name, value in zip(table.columns, row.values, strict=True)
        if value is not None
    ]


def in_order(selected: Iterable[Figure]) -> list[Figure]:
    """Figures by model and method, dense first, and by falling budget, settings without one first."""
    models = list(vocabulary().models)

    def place(figure: Figure) -> tuple[Any, ...]:
        row = figure.row
        budget = float("-inf") if row.tokens is None else -row.tokens
        return models.index(figure.table.model), row.method != "none", row.method, budget

    return sorted(selected, key=place)
