"""Published figures as text, Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import OptionError, suggest
from ...utils.rows import laid_out
from ..tables.render import unformulated
from . import Figure, in_order, vocabulary

SECTIONS = {"benchmarks": {"benchmark"}, "summaries and cost": {"summary", "cost"}}
COUNTED = {"inputs": "mean over layer inputs", "outputs": "mean over layer outputs", "after": "after the last cut"}


@dataclass(frozen=True)
class Grid:
    """A table as it is shown: a title, a header, lines of text, notes below; the first ``left`` columns are words."""

    title: str
    header: list[str]
    lines: list[list[str]]
    notes: list[str]
    left: int = 2


def render(selected: Sequence[Figure], form: str = "text", width: int | None = None) -> str:
    """All figures in the format ``text``, ``md``, ``csv`` or ``json``; ``width``: columns of a terminal for text."""
    return formatted(form, lambda: _grids(selected), lambda: [record(figure) for figure in in_order(selected)], width)


def formatted(
    form: str,
    grids: Callable[[], list[Grid]],
    records: Callable[[], list[dict[str, Any]]],
    width: int | None = None,
) -> str:
    """Grids as text or Markdown, records as CSV or JSON. Raises :class:`OptionError` for another format."""
    forms: dict[str, Callable[[], str]] = {
        "text": lambda: "\n".join(_text(grid, width) for grid in grids()),
        "md": lambda: "\n\n".join(map(_markdown, grids())),
        "csv": lambda: _csv(records()),
        "json": lambda: json.dumps(records(), indent=1, ensure_ascii=False),
    }
    if form not in forms:
        raise OptionError(f"unknown format {form!r}; {suggest(form, forms)}")
    return forms[form]()


def record(figure: Figure) -> dict[str, Any]:
    """One figure and all that is known of it: ``value`` or, where only a range is known, ``low`` and ``high``."""
    row, quantity = figure.row, figure.quantity
    low, high = figure.value if isinstance(figure.value, tuple) else (None, None)
    return {
        "paper": figure.paper.name,
        "paper_title": figure.paper.title or None,
        "arxiv": figure.paper.arxiv or None,
        "version": figure.paper.version or None,
        "link": figure.paper.link or None,
        "full_text_read": figure.paper.full_text,
        "where": figure.table.where,
        "quoted_from": figure.table.quoted_from or None,
        "model": figure.table.model,
        "method": row.method,
        "fine_tuned": row.fine_tuned,
        "setting": row.budget or None,
        "tokens": row.tokens,
        "tokens_counted": row.counted,
        "ratio": figure.ratio,
        "options": row.options,
        "quantity": figure.name,
        "title": quantity.title,
        "benchmark": figure.family if quantity.kind == "benchmark" else None,
        "metric": quantity.metric or None,
        "unit": quantity.unit,
        "value": None if isinstance(figure.value, tuple) else float(figure.value),
        "low": None if low is None else float(low),
        "high": None if high is None else float(high),
        "printed": figure.printed,
        "convention": figure.table.conventions.get(figure.name),
        "remarks": figure.remarks,
    }


def _grids(selected: Iterable[Figure]) -> list[Grid]:
    ordered = in_order(selected)
    models = dict.fromkeys(figure.table.model for figure in ordered)
    parts = [
        (model, section, [f for f in ordered if f.table.model == model and f.quantity.kind in kinds])
        for model in models
        for section, kinds in SECTIONS.items()
    ]
    return [_grid(f"{vocabulary().models[model].title}: {section}", part) for model, section, part in parts if part]


def _grid(title: str, selected: list[Figure]) -> Grid:
    """One line a printed row, one column a quantity; remarks and conventions are numbered below."""
    used = {figure.name for figure in selected}
    columns = {name: quantity for name, quantity in vocabulary().quantities.items() if name in used}
    by_row: dict[int, list[Figure]] = {}
    for figure in selected:
        by_row.setdefault(id(figure.row), []).append(figure)
    notes: dict[str, int] = {}
    lines = []
    for row in by_row.values():
        printed, first = {figure.name: figure.printed for figure in row}, row[0]
        told = [*first.remarks, *(_convention(figure) for figure in row if figure.name in figure.table.conventions)]
        marks = [str(notes.setdefault(note, len(notes) + 1)) for note in told]
        cells = [printed.get(name, "–") for name in columns]
        lines.append([first.row.method, _setting(first), *cells, origin(first), " ".join(marks)])
    header = [f"{quantity.title}\n{quantity.unit}" for quantity in columns.values()]
    metrics = [f"{quantity.title}: {quantity.metric}." for quantity in columns.values() if quantity.metric]
    numbered = [f"{number}  {note}" for note, number in notes.items()]
    return Grid(title, ["method", "setting", *header, "source", "notes"], lines, [" ".join(metrics), *numbered])


def _setting(figure: Figure) -> str:
    row = figure.row
    counted = f", {COUNTED[row.counted]}" if row.counted in COUNTED else ""
    return row.budget + counted if row.method != "none" else "all tokens"


def origin(figure: Figure) -> str:
    """Paper with its identifier, and the place in it."""
    paper = figure.paper
    where = f"{paper.arxiv}{paper.version}" if paper.arxiv else paper.link
    return f"{paper.name}{f' ({where})' if where else ''}, {figure.table.where}"


def _convention(figure: Figure) -> str:
    quantity = figure.quantity
    return f"{quantity.title}, {quantity.unit}: {figure.table.conventions[figure.name]}."


def _text(grid: Grid, width: int | None) -> str:
    words = [*grid.header[: grid.left], "source", "notes"]
    right = [head for head in grid.header if head not in words]
    table = [laid_out(grid.header, grid.lines, width, right)] if grid.lines else []
    notes = [note if width is None else textwrap.fill(note, width) for note in grid.notes if note]
    return "\n\n".join([grid.title, *table, "\n".join(notes)]).rstrip() + "\n"


def _markdown(grid: Grid) -> str:
    rule = ["---", "---", *["---:"] * (len(grid.header) - 2)]
    lines = ["| " + " | ".join(line).replace("\n", " ") + " |" for line in (grid.header, rule, *grid.lines)]
    return "\n\n".join([f"### {grid.title}", *(["\n".join(lines)] if grid.lines else []), *filter(None, grid.notes)])


def _csv(records: list[dict[str, Any]]) -> str:
    stream = io.StringIO()
    fields = list(dict.fromkeys(key for record in records for key in record))
    writer = csv.DictWriter(stream, fields, lineterminator="\n")
    writer.writeheader()
    for line in records:
        writer.writerow({key: unformulated(_flat(value)) for key, value in line.items()})
    return stream.getvalue().rstrip("\n")


def _flat(value: Any) -> Any:
    """Lists as sentences, mappings as options on the command line."""
    if isinstance(value, dict):
        return ",".join(f"{k}={'+'.join(map(str, v)) if isinstance(v, list) else v}" for k, v in value.items())
    return " ".join(value) if isinstance(value, list) else value
