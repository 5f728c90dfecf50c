"""Tables as text, Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from pydantic_core import to_json
from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from ..errors import OptionError, suggest
from .inference import ALPHA, Verdict
from .records import ScoreRecord
from .stats import Estimate
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
    return to_json({"tables": [as_json(table) for table in tables]}, indent=1, inf_nan_mode="null").decode()


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
                "scores": {task: {key: _score_json(row, task, key) for key in by} for task, by in row.scores.items()},
                "loyalty": {task: asdict(share) for task, share in row.evidence.loyalty.items()},
                "loyalty_mean": asdict(row.evidence.loyalty_mean) if row.evidence.loyalty_mean else None,
                "difficulty": {
                    "smaller_image": row.evidence.groups_by,
                    "groups": {
                        task: {name: asdict(e) for name, e in by.items()} for task, by in row.evidence.groups.items()
                    },
                },
                "retained_percent": asdict(row.retained) if row.retained else None,
                "visual_tokens": row.tokens.model_dump() | {"mean": row.tokens.mean, "last": row.tokens.last},
                "executed_macs": row.macs,
                "executed_tflops": row.macs * 1e-12,
                "executed_macs_by_component": row.components,
                "prefill_ms": asdict(row.prefill) if row.prefill else None,
            }
            for row in table.rows
        ],
    }


def _score_json(row: Row, task: str, key: str) -> dict[str, Any]:
    """A score over seeds, its interval over questions (None: not known) and the comparisons with dense and random."""
    interval = row.evidence.scores.get(task, {}).get(key)
    against = {name: by.get(task, {}).get(key) for name, by in row.evidence.against.items()}
    return asdict(row.scores[task][key]) | {
        "interval": asdict(interval) if interval else None,
        "against": {
            name: {"reference": v.reference, **asdict(v.comparison), "p_holm": v.p_holm, "sign": v.sign} if v else None
            for name, v in against.items()
        },
    }


def _flat(table: Table, row: Row, number: int) -> dict[str, Any]:
    """A row for CSV: full precision, one column a figure."""
    flat: dict[str, Any] = {"table": number, "model": table.facts["model"], "method": row.label}
    for task, scores in table.columns.items():
        for score in scores:
            quantity = row.scores.get(task, {}).get(score.key)
            flat[f"{task}:{score.key}"] = quantity.mean if quantity else None
            flat[f"{task}:{score.key}:sd"] = quantity.sd if quantity else None
            interval = row.evidence.scores.get(task, {}).get(score.key)
            flat[f"{task}:{score.key}:low"] = interval.low if interval else None
            flat[f"{task}:{score.key}:high"] = interval.high if interval else None
            for name, by in row.evidence.against.items():
                verdict = by.get(task, {}).get(score.key)
                flat[f"{task}:{score.key}:p_{name}"] = verdict.p_holm if verdict else None
    loyalty = row.evidence.loyalty_mean
    return flat | {
        "seeds": len(row.seeds),
        "loyalty_percent": 100 * loyalty.value if loyalty else None,
        "loyalty_percent_low": 100 * loyalty.low if loyalty else None,
        "loyalty_percent_high": 100 * loyalty.high if loyalty else None,
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
    unit, name = compute_unit(table)
    timed = any(row.prefill for row in table.rows)
    header = [
        "method",
        *(_title(task, score) for task, score in metrics),
        "retained\n%",
        "loyalty\n%",
        "visual\ntokens T",
        "at the\nlast layer",
        f"compute\n{name}",
    ]
    body = []
    for row in table.rows:
        line = [row.label, *(_score(row, task, score) for task, score in metrics)]
        line += [_retained(row.retained), _estimate(row.evidence.loyalty_mean, 1.0)]
        line += [f"{row.tokens.mean:.1f}", f"{row.tokens.last:.1f}", f"{row.macs / unit:#.3g}"]
        if timed:
            line.append(f"{row.prefill.median:.1f} ± {row.prefill.iqr:.1f}" if row.prefill else "–")
        body.append(line)
    return [[*header, "prefill\nms"] if timed else header, *body]


def compute_unit(table: Table) -> tuple[float, str]:
    """The unit in which this table's compute reads well: its size in MACs, and its name."""
    most = max(row.macs for row in table.rows)
    return next(((unit, name) for unit, name in _UNITS if most >= unit / 10), _UNITS[-1])


def _title(task: str, score: ScoreRecord) -> str:
    unit = "" if score.maximum is None else " %" if score.maximum == 1 else f" /{score.maximum:g}"
    return f"{task}\n{score.title}{unit}"


def _score(row: Row, task: str, score: ScoreRecord) -> str:
    """Value ± half its interval, and how it compares with dense and random."""
    quantity = row.scores.get(task, {}).get(score.key)
    if quantity is None or math.isnan(quantity.mean):
        return "–"
    interval = row.evidence.scores.get(task, {}).get(score.key)
    shown = _estimate(interval, score.maximum) if interval else _number(quantity.mean, score.maximum)
    marks = [_mark(name, by.get(task, {}).get(score.key)) for name, by in row.evidence.against.items()]
    return " ".join([shown, *filter(None, marks)])


def _mark(name: str, verdict: Verdict | None) -> str:
    return {1: "↑", -1: "↓", 0: "="}[verdict.sign] + name[0] if verdict else ""


def _estimate(estimate: Estimate | None, maximum: float | None) -> str:
    if estimate is None:
        return "–"
    known = not math.isnan(estimate.half_width)
    return _number(estimate.value, maximum) + (f" ± {_number(estimate.half_width, maximum)}" if known else "")


def _number(value: float, maximum: float | None) -> str:
    """As percent if the maximum is 1, with four digits if it is not known."""
    return f"{value:.4g}" if maximum is None else f"{value * (100.0 if maximum == 1 else 1.0):.1f}"


def _retained(quantity: Quantity | None) -> str:
    if quantity is None:
        return "–"
    return f"{quantity.mean:.1f}" + (f" ± {quantity.sd:.1f}" if quantity.sd is not None else "")


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
    notes += _inference(table)
    notes.append(
        f"Retained: mean over tasks of score / dense score{_over_seeds(table)}. Visual tokens: T = mean over "
        f"decoder-layer inputs, and at the last layer's, of {table.rows[0].tokens.prompt:g} in the prompt. FLOPs: one "
        "multiply-add = 1, all that a prefill executed, mean over questions."
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
    return [*notes, origin(table)]


def _inference(table: Table) -> list[str]:
    """How intervals and marks came about, and what this many questions can show at all."""
    rows, notes = table.rows, []
    images = {task: e.images for row in rows for task, by in row.evidence.scores.items() for e in by.values()}
    if images:
        counts = ", ".join(f"{task} {count}" for task, count in sorted(images.items()))
        interval = f"half of its 95 % interval, clustered by image ({counts} images); limits in CSV and JSON"
        notes.append(f"± after a score or loyalty: {interval}.")
    verdicts = {
        name: [v for row in rows for by in row.evidence.against[name].values() for v in by.values()]
        for name in ("dense", "random")
    }
    count = sum(map(len, verdicts.values()))
    if count:
        tests = " or ".join(sorted({v.comparison.test for found in verdicts.values() for v in found}))
        references = " and ".join(f"{name[0]} = {name}" for name, found in verdicts.items() if found)
        notes.append(
            f"↑ higher, ↓ lower, = tied (no difference shown), {references}: same questions, {tests}, p < {ALPHA:g} "
            f"after Holm over the {count} comparisons of this table."
        )
    unmatched = [row for row in rows if row.evidence.nearest and not _matched(row)]
    if verdicts["random"]:
        apart = f"; rows more than 10 % away from it in T: {len(unmatched)}" if unmatched else ""
        notes.append(f"Random is the random row with the nearest T, mean over its seeds{apart}.")
    floors = [f"{task} {floor}" for task in table.columns if (floor := _detectable(table, task))]
    if floors:
        notes.append(
            f"Smallest difference from dense found with 80 % power (one test at α = {ALPHA:g}, before Holm; median "
            f"over rows): {', '.join(floors)}."
        )
    if any(row.evidence.loyalty for row in rows):
        notes.append("Loyalty: mean over tasks of the share of answers that equal the dense model's.")
    lacking = sorted(
        {
            f"{task} {score.title}"
            for task, scores in table.columns.items()
            for score in scores
            if _lacks(table, task, score)
        }
    )
    if lacking:
        notes.append(f"No interval, no marks: {', '.join(lacking)} cannot be recomputed from single questions.")
    return notes


def _matched(row: Row) -> bool:
    return abs(row.tokens.mean - (row.evidence.nearest or 0.0)) <= 0.1 * row.tokens.mean


def _detectable(table: Table, task: str) -> str:
    score = table.columns[task][0]
    verdicts = [row.evidence.against["dense"].get(task, {}).get(score.key) for row in table.rows]
    found = [v.comparison.detectable for v in verdicts if v and v.comparison.detectable is not None]
    return _number(statistics.median(found), score.maximum) if found else ""


def _lacks(table: Table, task: str, score: ScoreRecord) -> bool:
    return any(task in row.scores and score.key not in row.evidence.scores.get(task, {}) for row in table.rows)


def _over_seeds(table: Table) -> str:
    counts = sorted({row.retained.n for row in table.rows if row.retained} - {1})
    return f", ± standard deviation over {' or '.join(map(str, counts))} seeds" if counts else ""


def _headline(table: Table, row: Row, task: str) -> float:
    return row.scores[task][table.columns[task][0].key].mean


def origin(table: Table) -> str:
    """Model, machine and versions in one line."""
    model, versions = table.facts["environment"]["model"], table.facts["environment"]["versions"]
    named = ("visibench", "lmms-eval", "transformers", "torch")
    packages = ", ".join(f"{name} {versions[name]}" for name in named if name in versions)
    return (
        f"Model {table.facts['model']}: {model.get('dtype')}, {model.get('attention')} attention, "
        f"{model.get('image_processor')}, {model.get('device')} ({model.get('hardware')}, "
        f"{model.get('threads')} threads); {packages}."
    )
