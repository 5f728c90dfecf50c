"""Tables as text, Markdown, LaTeX, HTML, CSV and JSON."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from pydantic_core import to_json
from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from ...errors import OptionError, suggest
from .columns import Column, choose
from .formats import grouped, latex, page
from .notes import heading, notes
from .tables import Row, Table

_LABEL = 60  # characters of a method's label in one line
_MARKUP = re.compile(r"[\\`*<\[~&]|(?<![^\W_])_|_(?![^\W_])")
Chosen = Sequence[Sequence[Column]]


def render(tables: list[Table], form: str = "text", names: Sequence[str] | None = None) -> str:
    """All tables in a format of :data:`FORMATS`, with the columns ``names`` (None: all) in their order.

    Raises :class:`OptionError` for an unknown format or column, and for a choice of columns in JSON, which holds all.
    """
    if form not in FORMATS:
        raise OptionError(f"unknown format {form!r}; {suggest(form, FORMATS)}")
    if form == "json" and names is not None:
        raise OptionError("JSON holds everything: choose columns with another format")
    return FORMATS[form](tables, choose(tables, names))


def _text(tables: list[Table], chosen: Chosen) -> str:
    # Wider than any table: a terminal that is too narrow wraps lines, where rich would cut figures off.
    console = Console(file=io.StringIO(), width=1000, no_color=True)
    for number, (table, columns) in enumerate(zip(tables, chosen, strict=True), start=1):
        grid = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in columns:
            if column.name == "method":
                grid.add_column(column.title, max_width=_LABEL, overflow="fold")
            else:
                grid.add_column(column.title, justify="right", no_wrap=True)
        for title, rows in grouped(table):
            if title:
                grid.add_row()
                grid.add_row(Text(title))
            for row in rows:
                grid.add_row(*(Text(column.show(row).text("{}*")) for column in columns))
        parts: list[str | RichTable] = [*heading(table, number, len(tables)), grid, *notes(table, columns, "*"), ""]
        for part in parts:
            console.print(part, markup=False, highlight=False, soft_wrap=isinstance(part, str))
    stream = console.file
    assert isinstance(stream, io.StringIO)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def _markdown(tables: list[Table], chosen: Chosen) -> str:
    parts = []
    for number, (table, columns) in enumerate(zip(tables, chosen, strict=True), start=1):
        grid = [[column.title for column in columns]]
        grid += [["---" if column.name == "method" else "---:" for column in columns]]
        for title, rows in grouped(table):
            grid += [[f"*{title}*", *[""] * (len(columns) - 1)]] if title else []
            grid += [[_plain(column, column.show(row).text("**{}**")) for column in columns] for row in rows]
        lines = ["| " + " | ".join(entry.replace("|", r"\|") for entry in line) + " |" for line in grid]
        lines = [line.replace("\n", " ") for line in lines]
        parts.append(
            "\n\n".join([*heading(table, number, len(tables)), "\n".join(lines), *notes(table, columns, "Bold")])
        )
    return "\n\n".join(parts)


def _plain(column: Column, entry: str) -> str:
    """An entry in which nothing of a label counts as Markdown or HTML; an underscore inside a word does not anyway."""
    return _MARKUP.sub(r"\\\g<0>", entry) if column.name == "method" else entry


def _csv(tables: list[Table], chosen: Chosen) -> str:
    rows = [
        {"table": number, "model": table.facts["model"]}
        | {key: value for column in columns for key, value in column.figures(row).items()}
        for number, (table, columns) in enumerate(zip(tables, chosen, strict=True), start=1)
        for row in table.rows
    ]
    fields = list(dict.fromkeys(key for row in rows for key in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().rstrip("\n")


def _json(tables: list[Table], _: Chosen) -> str:
    return to_json({"tables": [as_json(table) for table in tables]}, indent=1, inf_nan_mode="null").decode()


FORMATS: dict[str, Callable[[list[Table], Chosen], str]] = {
    "text": _text,
    "md": _markdown,
    "latex": latex,
    "html": page,
    "csv": _csv,
    "json": _json,
}


def as_json(table: Table) -> dict[str, Any]:
    """A table as JSON values: scores in lmms-eval's units, compute in MACs and the papers' TFLOPs, times in ms."""
    return {
        "facts": table.facts,
        "commits": table.commits,
        "remarks": table.remarks,
        "differs": table.differs,
        "questions": {task: asdict(questions) for task, questions in table.questions.items()},
        "metrics": {
            task: [score.model_dump(exclude={"value"}) for score in scores] for task, scores in table.columns.items()
        },
        "rows": [
            {
                "label": row.label,
                "method": row.method,
                "options": row.options,
                "seeds": row.seeds,
                "scores": {task: {key: _score_json(row, task, key) for key in by} for task, by in row.scores.items()},
                "budget": row.evidence.budget,
                "loyalty": {task: asdict(share) for task, share in row.evidence.loyalty.items()},
                "loyalty_mean": asdict(row.evidence.loyalty_mean) if row.evidence.loyalty_mean else None,
                "difficulty": {
                    "smaller_image": row.evidence.groups_by,
                    "groups": {
                        task: {name: asdict(e) for name, e in by.items()} for task, by in row.evidence.groups.items()
                    },
                },
                "retained_percent": _retained_json(row),
                "visual_tokens": row.tokens.model_dump() | {"mean": row.tokens.mean, "last": row.tokens.last},
                "executed_macs": row.macs,
                "executed_tflops": row.macs * 1e-12,
                "executed_macs_by_component": row.components,
                "sd_over_questions": asdict(row.evidence.spread) if row.evidence.spread else None,
                "prefill_ms": asdict(row.prefill) if row.prefill else None,
                "reused_images": _reused_json(row),
            }
            for row in table.rows
        ],
    }


def _reused_json(row: Row) -> dict[str, dict[int, int]]:
    """By task and seed, images whose vision features were there before."""
    found: dict[str, dict[int, int]] = {}
    for cell in row.cells:
        found.setdefault(cell.config.task, {})[cell.config.seed] = cell.metrics.reused_images
    return found


def _retained_json(row: Row) -> dict[str, Any] | None:
    """Mean and standard deviation over seeds, and limits of the 95 % interval over questions (None: not known)."""
    interval = row.evidence.retained
    limits = {"low": 100 * interval.low, "high": 100 * interval.high} if interval else {"low": None, "high": None}
    return asdict(row.retained) | limits if row.retained else None


def _score_json(row: Row, task: str, key: str) -> dict[str, Any]:
    """A score over seeds, its interval over questions (None: not known) and the comparisons with dense and random."""
    interval = row.evidence.scores.get(task, {}).get(key)
    against = {name: by.get(task, {}).get(key) for name, by in row.evidence.against.items()}
    return asdict(row.scores[task][key]) | {
        "interval": asdict(interval) if interval else None,
        "best_p_holm": row.evidence.best.get(task, {}).get(key),
        "against": {
            name: {"reference": v.reference, **asdict(v.comparison), "p_holm": v.p_holm, "sign": v.sign} if v else None
            for name, v in against.items()
        },
    }
