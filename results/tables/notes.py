"""What a reader must know next to the numbers of a table: of the table itself, and of each column that is shown."""

from __future__ import annotations

from collections.abc import Sequence

from ..statistics.inference import BASELINES, DENSE, DOWNSAMPLE, POOLING, RANDOM
from .columns import Column, TableLook
from .tables import MethodRow, ResultTable


def heading(table: ResultTable, place: int, tables: int) -> list[str]:
    """Which of so many ``tables`` this is and in what it differs; nothing for the only one."""
    if tables == 1:
        return []
    differs = ", ".join(f"{key} = {value}" for key, value in table.differs.items()) or "code as it is now"
    return [f"Table {place} of {tables}, not to be compared with the others: {differs}"]


def notes(table: ResultTable, chosen: Sequence[Column], shown: TableLook) -> list[str]:
    """Questions, what the ``chosen`` columns need, what was not run, and origin; nothing stands there twice."""
    if not shown.notes:
        return []
    lines = [questions(table), *(f"{task}: {q.note}." for task, q in table.questions.items() if q.note)]
    lines += [note for column in chosen for note in column.notes(shown)]
    lines += _other_code(table)
    lines += [f"Remarks: {'; '.join(table.remarks)}."] if table.remarks else []
    return [*dict.fromkeys(lines), *_sharing(table), *_baselines(table), *_protocol(table), origin(table)]


def questions(table: ResultTable) -> str:
    """How many questions of each task were asked, in one line."""
    counts = ", ".join(f"{task} {q.asked} of {q.of} ({q.origin})" for task, q in table.questions.items())
    return f"Questions: {counts}.{' SUBSET: these are no full-set scores.' if table.is_subset else ''}"


def _protocol(table: ResultTable) -> list[str]:
    """How the model was asked."""
    asked = [cell.config.protocol for row in table.rows for cell in row.cells][:1]
    template = table.facts["environment"]["model"].get("template")
    if not template:
        return []
    told = {"checkpoint": "prompts by the checkpoint's chat template"}.get(template, f"template: {template}")
    values = {key: value for key, value in (asked[0] if asked else {}).items() if key not in ("name", "template")}
    more = "".join(f"; {key}: {value!r}" for key, value in values.items())
    lenient = " LENIENT: an answer counts where a reference stands in it." * (values.get("scoring") == "lenient")
    return [f"Protocol {table.facts['protocol']}: {told}{more}.{lenient}"]


def _other_code(table: ResultTable) -> list[str]:
    """Which cells were made by code that has changed since, and which part of it."""
    parts = {"engine": "visibench itself", "task": "the task's definition", "data": "the data", "method": "the method"}
    told = []
    for part, called in parts.items():
        rows = [_named(row, part) for row in table.rows]
        which = "all rows" if part == "engine" and all(rows) else "; ".join(filter(None, rows))
        told += [f"{which} ({called} has changed since)"] if which else []
    if not told:
        return []
    return [f"OF OTHER CODE than is here now: {', '.join(told)}. Run the sweep again for numbers of this code."]


def _named(row: MethodRow, part: str) -> str:
    return row.named(lambda cell: part in cell.other_code)


def _sharing(table: ResultTable) -> list[str]:
    """In which cells latency and seconds leave out some of the tower: these, or all but those, whichever is shorter."""
    shared = [cell.metrics.reused_images > 0 for row in table.rows for cell in row.cells]
    if not any(shared):
        return []
    did = "; ".join(filter(None, (row.named(lambda cell: cell.metrics.reused_images > 0) for row in table.rows)))
    did_not = "; ".join(filter(None, (row.named(lambda cell: not cell.metrics.reused_images) for row in table.rows)))
    which = did if len(did) <= len(did_not) else f"all but {did_not}"
    where = (
        f"{sum(shared)} of {len(shared)} cells ({which})"
        if did_not
        else f"all {len(shared)} cells"
        if len(shared) > 1
        else "the only cell"
    )
    return [f"Vision features of an image were reused in {where}. FLOPs and prefill times count the tower in full."]


def _baselines(table: ResultTable) -> list[str]:
    """Which rows a reader would expect and misses, and what adds them to a sweep."""
    have = {row.method for row in table.rows}
    missing = [method for method in BASELINES if method not in have]
    means = {
        row.evidence.budget_group: row.tokens.mean
        for row in reversed(table.rows)
        if row.evidence.budget_group is not None
    }
    budgets = ", ".join(f"{{tokens: {mean:.4g}}}" for _, mean in sorted(means.items()))
    entries = {
        DENSE: "none",
        RANDOM: f"{{name: random, budget: [{budgets}], seeds: [0, 1, 2]}}",
        POOLING: f"{{name: pooling, budget: [{budgets}]}}",
        DOWNSAMPLE: f"{{name: downsample, budget: [{budgets}]}}",
    }
    if not missing or not budgets:
        return []
    lines = ", ".join(entries[method] for method in missing)
    itself = "references: true, or " if set(missing) - {DENSE} else ""
    return [f"Not run: {', '.join(missing)}. A sweep adds what the model can carry with {itself}methods: [{lines}]."]


def origin(table: ResultTable) -> str:
    """Model, machine and versions in one line."""
    model, versions = table.facts["environment"]["model"], table.facts["environment"]["versions"]
    named = ("visibench", "lmms-eval", "transformers", "torch")
    commits = {"visibench": f" (commit {' and '.join(table.commits)})" if table.commits else ""}
    packages = ", ".join(f"{name} {versions[name]}{commits.get(name, '')}" for name in named if name in versions)
    threads = f"{model.get('threads')} thread{'' if model.get('threads') == 1 else 's'}"
    return (
        f"Model {table.facts['model']}: {model.get('dtype')}, {model.get('attention')} attention, "
        f"{model.get('image_processor')}, {model.get('device')} ({model.get('hardware')}, "
        f"{threads}); {packages}."
    )
