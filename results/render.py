"""Tables as text, Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from ..errors import OptionError, suggest
from .records import ScoreRecord
from .tables import DENSE, Quantity, Row, Table

_LABEL = 60  # characters of a method's label in one line
_UNITS = ((1e12, "TFLOPs"), (1e9, "GFLOPs"), (1e6, "MFLOPs"))


def render(tables: list[Table], form: str = "text") -> str:
    """All tables in the format ``text``, ``md``, ``csv`` or ``json``."""
    if form not in FORMATS:
        raise OptionError(f"unknown format {form!r}; {suggest(form, FORMATS)}")
    return FORMATS[form](tables)


def _text(tables: list[Table]) -> str:
    # Wider than any table: a terminal that is too narrow wraps lines, where rich would cut figures off.
    console = Console(file=io.StringIO(), width=1000, no_color=True)
    for number, table in enumerate(tables, start=1):
        grid = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
        header, *body = _cells(table)
        grid.add_column(header[0], max_width=_LABEL, overflow="fold")
        for title in header[1:]:
            grid.add_column(title, justify="right", no_wrap=True)
        for line in body:
            grid.add_row(*line)
        parts: list[str | RichTable] = [*_heading(table, number, len(tables)), grid, *_notes(table), ""]
        for part in parts:
            console.print(part, markup=False, highlight=False, soft_wrap=isinstance(part, str))
    stream = console.file
    assert isinstance(stream, io.StringIO)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def _markdown(tables: list[Table]) -> str:
    parts = []
    for number, table in enumerate(tables, start=1):
        header, *body = _cells(table)
        rule = ["---", *["---:"] * (len(header) - 1)]
        lines = ["| " + " | ".join(line).replace("\n", " ") + " |" for line in (header, rule, *body)]
        parts.append("\n\n".join([*_heading(table, number, len(tables)), "\n".join(lines), *_notes(table)]))
    return "\n\n".join(parts)


def _csv(tables: list[Table]) -> str:
    rows = [_flat(table, row, number) for number, table in enumerate(tables, start=1) for row in table.rows]
    fields = list(dict.fromkeys(key for row in rows for key in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().rstrip("\n")


def _json(tables: list[Table]) -> str:
    return json.dumps({"tables": [as_json(table) for table in tables]}, indent=1)


FORMATS: dict[str, Callable[[list[Table]], str]] = {"text": _text, "md": _markdown, "csv": _csv, "json": _json}


def as_json(table: Table) -> dict[str, Any]:
    """A table as JSON values: scores in lmms-eval's units, compute in MACs and the papers' TFLOPs, times in ms."""
    return {
        "facts": table.facts,
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
                "scores": {task: {key: asdict(q) for key, q in by.items()} for task, by in row.scores.items()},
                "retained_percent": asdict(row.retained) if row.retained else None,
                "visual_tokens": row.tokens.model_dump() | {"mean": row.tokens.mean, "last": row.tokens.last},
                "executed_macs": row.macs,
                "executed_tflops": row.macs * 1e-12,
                "prefill_ms": asdict(row.prefill) if row.prefill else None,
            }
            for row in table.rows
        ],
    }


def _flat(table: Table, row: Row, number: int) -> dict[str, Any]:
    """A row for CSV: full precision, one column a figure."""
    flat: dict[str, Any] = {"table": number, "model": table.facts["model"], "method": row.label}
    for task, scores in table.columns.items():
        for score in scores:
            quantity = row.scores.get(task, {}).get(score.key)
            flat[f"{task}:{score.key}"] = quantity.mean if quantity else None
            flat[f"{task}:{score.key}:sd"] = quantity.sd if quantity else None
    return flat | {
        "seeds": len(row.seeds),
        "retained_percent": row.retained.mean if row.retained else None,
        "visual_tokens_mean": row.tokens.mean,
        "visual_tokens_last": row.tokens.last,
        "executed_tflops": row.macs * 1e-12,
        "prefill_ms_median": row.prefill.median if row.prefill else None,
        "prefill_ms_iqr": row.prefill.iqr if row.prefill else None,
    }


def _cells(table: Table) -> list[list[str]]:
    """Header and body as they are shown."""
    metrics = [(task, score) for task, scores in table.columns.items() for score in scores]
    unit, name = next(((u, n) for u, n in _UNITS if max(row.macs for row in table.rows) >= u / 10), _UNITS[-1])
    timed = any(row.prefill for row in table.rows)
    header = [
        "method",
        *(_title(task, score) for task, score in metrics),
        "retained\n%",
        "visual\ntokens T",
        "at the\nlast layer",
        f"compute\n{name}",
    ]
    body = []
    for row in table.rows:
        line = [row.label]
        line += [_quantity(row.scores.get(task, {}).get(score.key), score.maximum) for task, score in metrics]
        line += [_quantity(row.retained), f"{row.tokens.mean:.1f}", f"{row.tokens.last:.1f}", f"{row.macs / unit:#.3g}"]
        if timed:
            line.append(f"{row.prefill.median:.1f} ± {row.prefill.iqr:.1f}" if row.prefill else "–")
        body.append(line)
    return [[*header, "prefill\nms"] if timed else header, *body]


def _title(task: str, score: ScoreRecord) -> str:
    unit = "" if score.maximum is None else " %" if score.maximum == 1 else f" /{score.maximum:g}"
    return f"{task}\n{score.title}{unit}"


def _quantity(quantity: Quantity | None, maximum: float | None = 100.0) -> str:
    """Mean ± sd: as percent if the maximum is 1, with four digits if it is not known."""
    if quantity is None or math.isnan(quantity.mean):
        return "–"
    scale, form = 100.0 if maximum == 1 else 1.0, ".4g" if maximum is None else ".1f"
    spread = f" ± {quantity.sd * scale:{form}}" if quantity.sd is not None else ""
    return f"{quantity.mean * scale:{form}}{spread}"


def _heading(table: Table, number: int, count: int) -> list[str]:
    if count == 1:
        return []
    differs = ", ".join(f"{key} = {value}" for key, value in table.differs.items()) or "limit"
    return [f"Table {number} of {count}, not to be compared with the others: {differs}"]


def _notes(table: Table) -> list[str]:
    """What a reader must know next to the numbers."""
    asked = ", ".join(f"{task} {q.asked} of {q.of} ({q.origin})" for task, q in table.questions.items())
    notes = [f"Questions: {asked}.{' SUBSET: these are no full-set scores.' if table.is_subset else ''}"]
    notes += [f"{task}: {q.note}." for task, q in table.questions.items() if q.note]
    counts = sorted({len(row.seeds) for row in table.rows} - {1})
    if counts:
        notes.append(f"± after a score: standard deviation over {' or '.join(map(str, counts))} seeds.")
    notes.append(
        "Retained: mean over tasks of score / dense score. Visual tokens: T = mean over decoder-layer inputs, and at "
        f"the last layer's, of {table.rows[0].tokens.prompt:g} in the prompt. FLOPs: one multiply-add = 1, all that a "
        "prefill executed, mean over questions."
    )
    missed = sorted(
        task for row in table.rows if row.method == DENSE for task in row.scores if not _headline(table, row, task)
    )
    if missed:
        notes.append(f"Retained leaves out {', '.join(missed)}: the dense score is 0.")
    timing, timed = table.facts["timing"], [row.prefill.n for row in table.rows if row.prefill]
    if timing and timed:
        repeats = f"{timing['repeats']} runs a task and seed after {timing['warmup']} to warm up"
        notes.append(f"Prefill: batch {timing['batch_size']}, median ± interquartile range, {repeats}.")
    return [*notes, _origin(table)]


def _headline(table: Table, row: Row, task: str) -> float:
    return row.scores[task][table.columns[task][0].key].mean


def _origin(table: Table) -> str:
    """Model, machine and versions in one line."""
    model, versions = table.facts["environment"]["model"], table.facts["environment"]["versions"]
    named = ("visibench", "lmms-eval", "transformers", "torch")
    packages = ", ".join(f"{name} {versions[name]}" for name in named if name in versions)
    return (
        f"Model {table.facts['model']}: {model.get('dtype')}, {model.get('attention')} attention, "
        f"{model.get('image_processor')}, {model.get('device')} ({model.get('hardware')}, "
        f"{model.get('threads')} threads); {packages}."
    )
