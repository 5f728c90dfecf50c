"""Tables as text, Markdown, LaTeX, HTML, CSV and JSON. No form knows a column: each asks them all the same."""

from __future__ import annotations

import csv
import io
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from typing import Any

from pydantic_core import to_json
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from ...errors import OptionError, suggest
from .columns import Column, TableEntry, TableLook, brief, choose, every
from .formats import latex, page
from .notes import heading, notes
from .tables import MethodRow, ResultTable

_LABEL = 60  # characters of a method's label in one line
_MARKUP = re.compile(r"[\\`*<\[~&]|(?<![^\W_])_|_(?![^\W_])")
Chosen = Sequence[Sequence[Column]]


def render(
    tables: list[ResultTable], form: str = "text", names: Sequence[str] | None = None, *, noted: bool = True
) -> str:
    """All tables in a format of :data:`FORMATS`, with the columns ``names`` (None: by default) in their order.

    ``noted`` False: without the notes, where the format has some.

    Raises :class:`OptionError` for an unknown format or column, and for a choice of columns in JSON, which holds all.
    """
    if form not in FORMATS:
        raise OptionError(f"unknown format {form!r}; {suggest(form, FORMATS)}")
    if form == "json" and names is not None:
        raise OptionError("JSON holds everything: choose columns with another format")
    return FORMATS[form](tables, choose(tables, names, csv=form == "csv"), TableLook("Bold", notes=noted))


def fitted(
    tables: list[ResultTable],
    names: Sequence[str] | None,
    width: int | None,
    *,
    wide: bool = False,
    noted: bool = True,
) -> str:
    """The text of all tables for a terminal of so many columns: a table that is wider stands there in parts.

    A terminal has the short form, values with one mark, unless columns are named or ``wide`` asks for all of them with
    their intervals, as a file has them (``width`` None).
    """
    if names is None and width is not None and not wide:
        return _text(tables, brief(tables), width, TableLook("*", brief=True, notes=noted))
    return _text(tables, choose(tables, names), width, TableLook("*", notes=noted))


def _text(tables: list[ResultTable], chosen: Chosen, width: int | None, shown: TableLook) -> str:
    """``width`` None: as wide as the widest line."""
    stream = io.StringIO()
    console = Console(file=stream, width=1000, no_color=True)
    for place, (table, columns) in enumerate(zip(tables, chosen, strict=True), start=1):
        grids = "\n".join(_grids(table, columns, width, shown))
        more = ["Intervals, other scores and costs: --wide, or --columns list."] * (shown.brief and shown.notes)
        for line in heading(table, place, len(tables)):
            console.print(line, markup=False, highlight=False, soft_wrap=width is None, width=width)
        print(grids, file=stream)
        for line in [*notes(table, columns, shown), *more, ""]:
            console.print(line, markup=False, highlight=False, soft_wrap=width is None, width=width)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def broken(text: str, width: int) -> str:
    """A label in lines of so many characters, broken behind its commas and colons."""
    lines = [""]
    for part in re.split(r"(?<=,)|(?<=:)(?=\w+=)", text):
        lines += [""] * bool(lines[-1] and len(lines[-1] + part) > width)
        lines[-1] += part
    return "\n".join(lines)


@dataclass(frozen=True)
class _Layout:
    """How entries are spelled, in one line or several, and how wide a label may be. ``narrow``: titles wrap too."""

    spell: Callable[[TableEntry], str]
    label: int = _LABEL
    narrow: bool = False

    def entry(self, column: Column, row: MethodRow) -> str:
        """What stands in a row; a label that is too long is broken."""
        text = self.spell(column.show(row))
        return broken(text, self.label) if column.words else text

    def title(self, table: ResultTable, column: Column) -> str:
        """Of a column; a narrow one is no wider than its entries, if its words allow."""
        if not self.narrow:
            return column.title
        entries = [line for row in table.rows for line in self.spell(column.show(row)).split("\n")]
        room = max(map(len, [*entries, *column.title.split()]))
        return "\n".join(line for part in column.title.split("\n") for line in textwrap.wrap(part, room))

    def width(self, table: ResultTable, column: Column) -> int:
        """Of a column, with what stands between two of them."""
        entries = [self.spell(column.show(row)) for row in table.rows]
        entries += [title for title, _ in table.grouped()] if column.words else []  # they stand in its place
        longest = max(len(line) for text in (self.title(table, column), *entries) for line in text.split("\n"))
        return (min(longest, self.label) if column.words else longest) + 3


def _layouts(width: int, shown: TableLook) -> list[_Layout]:
    """Ways to lay out a table, the most spacious first; the last is also that of parts."""
    label = min(_LABEL, max(width // 3, 12))
    if shown.brief:
        spell = lambda entry: entry.brief("{}*")  # noqa: E731
        return [_Layout(spell), *(_Layout(spell, min(label, room), narrow=True) for room in (_LABEL, 24))]
    return [_Layout(lambda entry: entry.text("{}*")), _Layout(lambda entry: entry.stacked("{}*"), label)]


def _grids(table: ResultTable, columns: Sequence[Column], width: int | None, shown: TableLook) -> list[str]:
    """One grid or, where it is wider than ``width``, several behind each other, each with the labels."""
    layouts = _layouts(width or 0, shown)
    for layout in layouts:
        if width is None or sum(layout.width(table, column) for column in columns) <= width:
            return [_grid(table, columns, layout)]
    narrow = layouts[-1]
    words = [column for column in columns if column.words]
    room = (width or 0) - sum(narrow.width(table, column) for column in words)
    parts: list[list[Column]] = [[]]
    left = room
    for column in (column for column in columns if not column.words):
        needs = narrow.width(table, column)
        if parts[-1] and needs > left:
            parts.append([])
            left = room
        parts[-1].append(column)
        left -= needs
    return [_grid(table, [*words, *part], narrow) for part in parts]


def _grid(table: ResultTable, columns: Sequence[Column], layout: _Layout) -> str:
    """Rows under their titles, words on the left; a label that is too long for its column is folded."""
    nothing = [""] * (len(columns) - 1)
    lines = [[column.title if column.words else layout.title(table, column) for column in columns]]
    for title, rows in table.grouped():
        lines += [["", *nothing], [title, *nothing]] if title else []
        lines += [[layout.entry(column, row) for column in columns] for row in rows]
    natural = [max(cell_len(part) for line in lines for part in line[at].split("\n")) for at in range(len(columns))]
    widths = [min(w, layout.label) if column.words else w for w, column in zip(natural, columns, strict=True)]
    cells = [[_folded(text, width) for text, width in zip(line, widths, strict=True)] for line in lines]
    high = max(map(len, cells[0]))
    cells[0] = [[""] * (high - len(title)) + title for title in cells[0]]  # titles stand on their rule
    head, *body = (_aligned(line, widths, columns) for line in cells)
    return "\n".join(["", head, " " + "─" * (sum(widths) + 3 * len(widths) - 3), *body, ""])


def _folded(text: str, room: int) -> list[str]:
    """The lines of a text, none of them longer."""
    lines = text.split("\n")
    if max(map(cell_len, lines)) <= room:
        return lines
    return [line.plain.rstrip() for line in Text(text).wrap(Console(), room, overflow="fold")]


def _aligned(cells: Sequence[Sequence[str]], widths: Sequence[int], columns: Sequence[Column]) -> str:
    """A row, in as many lines as its highest cell has, three spaces between its cells."""
    lines = []
    for parts in zip_longest(*cells, fillvalue=""):
        gaps = [" " * (width - cell_len(part)) for part, width in zip(parts, widths, strict=True)]
        placed = [
            part + gap if column.words else gap + part for part, gap, column in zip(parts, gaps, columns, strict=True)
        ]
        lines.append(f" {'   '.join(placed)}".rstrip())
    return "\n".join(lines)


def _markdown(tables: list[ResultTable], chosen: Chosen, shown: TableLook) -> str:
    parts = []
    for place, (table, columns) in enumerate(zip(tables, chosen, strict=True), start=1):
        grid = [[column.title for column in columns]]
        grid += [["---" if column.words else "---:" for column in columns]]
        for title, rows in table.grouped():
            grid += [[f"*{title}*", *[""] * (len(columns) - 1)]] if title else []
            grid += [[_plain(column, column.show(row).text("**{}**")) for column in columns] for row in rows]
        lines = ["| " + " | ".join(entry.replace("|", r"\|") for entry in line) + " |" for line in grid]
        lines = [line.replace("\n", " ") for line in lines]
        parts.append(
            "\n\n".join([*heading(table, place, len(tables)), "\n".join(lines), *notes(table, columns, shown)])
        )
    return "\n\n".join(parts)


def _plain(column: Column, entry: str) -> str:
    """An entry in which nothing of a label counts as Markdown or HTML; an underscore inside a word does not anyway."""
    return _MARKUP.sub(r"\\\g<0>", entry) if column.words else entry


def _csv(tables: list[ResultTable], chosen: Chosen, _: TableLook) -> str:
    rows = [
        {"table": place, "model": table.facts["model"]}
        | {key: value for column in columns for key, value in column.figures(row).items()}
        for place, (table, columns) in enumerate(zip(tables, chosen, strict=True), start=1)
        for row in table.rows
    ]
    fields = list(dict.fromkeys(key for row in rows for key in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: unformulated(value) for key, value in row.items()} for row in rows)
    return stream.getvalue().rstrip("\n")


def unformulated(value: Any) -> Any:
    """A value that a spreadsheet takes for text, not for a formula, if it is text."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def _json(tables: list[ResultTable], _: Chosen, __: TableLook) -> str:
    return to_json({"tables": [as_json(table) for table in tables]}, indent=1, inf_nan_mode="null").decode()


FORMATS: dict[str, Callable[[list[ResultTable], Chosen, TableLook], str]] = {
    "text": lambda tables, chosen, shown: _text(tables, chosen, None, replace(shown, best="*")),
    "md": _markdown,
    "latex": latex,
    "html": page,
    "csv": _csv,
    "json": _json,
}


def as_json(table: ResultTable) -> dict[str, Any]:
    """A table as JSON values: scores in lmms-eval's units, compute in MACs and the papers' TFLOPs, times in ms."""
    columns = every(table)
    return {
        "facts": table.facts,
        "commits": table.commits,
        "remarks": table.remarks,
        "differs": table.differs,
        "questions": {task: asdict(questions) for task, questions in table.questions.items()},
        "metrics": {
            task: [score.model_dump(exclude={"value"}) for score in scores] for task, scores in table.metrics.items()
        },
        "rows": [_row_json(columns, row) for row in table.rows],
    }


def _row_json(columns: Sequence[Column], row: MethodRow) -> dict[str, Any]:
    joined: dict[str, Any] = {}
    for column in columns:
        joined = _joined(joined, column.json(row))
    return joined


def _joined(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Both objects in one, and so those inside them that both have."""
    both = {key: _joined(one[key], other[key]) for key in one.keys() & other.keys() if isinstance(one[key], dict)}
    return one | other | both
