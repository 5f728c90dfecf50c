"""A run folder as one page of HTML that needs nothing else: no network, no file beside it, and to be read no script.

All that comes from a run (labels, questions, answers, names) goes through the template's escaping. The page's own
Content-Security-Policy admits one style sheet and one script, by their hashes, and images inside the page.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ...errors import DataError
from ...results.figures.plots import PLOTS
from ...results.figures.style import Look
from ...results.store.stage_records import StageRecord
from ...results.tables import summary
from ...results.tables.columns import Column, TableLook, columns
from ...results.tables.method_facts import MethodFacts
from ...results.tables.notes import heading, notes
from ...results.tables.tables import MethodRow, ResultTable
from ...results.tables.titles import task_title
from ..question_image import ImageSource, no_images
from .cards import method_cards, question_cards
from .inline import inline
from .questions import KINDS, RULE, choose
from .stages import stages_section

_SIZE = "@@size@@"


def report(
    tables: Sequence[ResultTable],
    name: str,
    *,
    questions: int = 24,
    images: ImageSource = no_images,
    about: Mapping[str, MethodFacts] | None = None,
    stages: StageRecord | None = None,
) -> str:
    """The page. ``name``: of the run. ``questions``: how many to show, shared out among the tables.

    ``about``: facts about methods by name.
    ``stages``: an analysis of how the model fuses images, for a section of its own.
    """
    share, more = divmod(questions, len(tables))
    sections = [
        _section(table, place, len(tables), share + (place <= more), images, about or {})
        for place, table in enumerate(tables, start=1)
    ]
    style, script = _read("report.css"), _read("report.js")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(_read("report.html.j2")).render(
        name=name,
        sections=sections,
        stages=None if stages is None else stages_section(stages),
        rule=RULE,
        kinds=KINDS,
        style=Markup(style),
        script=Markup(script),
        policy=f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'",
        size=_SIZE,
    )
    return page.replace(_SIZE, f"{len(page.encode()) / 1e6:.1f} MB")


def _read(name: str) -> str:
    return (files("visibench.reports.html") / "templates" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _section(
    table: ResultTable,
    place: int,
    tables: int,
    questions: int,
    images: ImageSource,
    about: Mapping[str, MethodFacts],
) -> dict[str, Any]:
    """What the template shows of one table."""
    prefix = f"t{place}-"
    chosen = choose(table, questions)
    return {
        "prefix": prefix,
        "heading": heading(table, place, tables),
        "lead": summary.lead(table),
        "verdicts": summary.verdicts(table),
        "budgets": summary.by_group(table),
        "table": _grid(table),
        "notes": notes(table, columns(table), TableLook("Bold")),
        "figures": _figures(table, prefix),
        "methods": method_cards(table, about),
        "questions": question_cards(chosen, table, images),
        "rows": list(table.titles.values()),
        "tasks": [(task, task_title(task)) for task in table.questions],
        "facts": _facts(table),
        "cells": _cells(table),
    }


# ---- the table and the figures ------------------------------------------------------------------------------------


def _grid(table: ResultTable) -> dict[str, Any]:
    chosen, titles = columns(table), table.titles
    return {
        "caption": f"Scores, visual tokens and compute on {table.facts['model']}",
        "columns": [
            {"name": " ".join(lines), "lines": lines, "numeric": not column.words}
            for column in chosen
            for lines in [[task_title(line) for line in column.title.split("\n")]]
        ],
        "groups": [
            {"title": title, "rows": [[_entry(column, row, titles[row.label]) for column in chosen] for row in rows]}
            for title, rows in table.grouped()
        ],
    }


def _entry(column: Column, row: MethodRow, title: str) -> dict[str, Any]:
    """``sort``: the first of the column's figures, with full precision; empty where there is none."""
    entry, value = column.show(row), next(iter(column.figures(row).values()))
    missing = value is None or value != value
    shown = title if column.name == "method" else entry.value
    return {
        "value": shown,
        "behind": " ".join(entry.behind),
        "marks": [(str(mark), mark.meaning) for mark in entry.marks],
        "best": entry.best,
        "sort": "" if missing else shown if isinstance(value, str) else repr(float(value)),
    }


def _figures(table: ResultTable, prefix: str) -> list[dict[str, Any]]:
    figures = []
    for plot in PLOTS:
        named: dict[str, Any] = {"kind": plot.name, "title": plot.title}
        try:
            figure = plot.draw(table, Look(notes=False, titled=True))
        except DataError as error:
            figures.append(named | {"svg": "", "reason": str(error), "notes": ""})
        else:
            svg = inline(figure, f"{prefix}{plot.name}-", plot.title)
            figures.append(named | {"svg": Markup(svg), "reason": "", "notes": str(figure.get_label())})
    return figures


# ---- environment --------------------------------------------------------------------------------------------------


def _facts(table: ResultTable) -> list[tuple[str, list[tuple[str, str]]]]:
    """Groups of names and values: what all cells of the table have in common."""
    environment = table.facts["environment"]
    settings = {key: value for key, value in table.facts.items() if key not in ("environment", "schema_version")}
    hosts = [cell.metrics.environment for row in table.rows for cell in row.cells]
    groups = {"settings": settings, **{name: environment[name] for name in ("model", "versions", "machine")}}
    groups["hosts"] = _union([environment.host for environment in hosts])
    groups["code"] = {"commit": ", ".join(table.commits)} if table.commits else {}
    return [
        (name, [(key, _value(value)) for key, value in facts.items() if value not in (None, "", {}, [])])
        for name, facts in groups.items()
        if facts
    ]


def _union(facts: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Each name with all its values."""
    keys = dict.fromkeys(key for one in facts for key in one)
    return {key: ", ".join(dict.fromkeys(_value(one[key]) for one in facts if one.get(key))) for key in keys}


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_value(inner)}" for key, inner in value.items())
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _cells(table: ResultTable) -> list[dict[str, Any]]:
    return [
        {
            "task": cell.config.task,
            "label": cell.config.label,
            "seed": cell.config.seed,
            "asked": cell.metrics.size,
            "total": cell.metrics.total,
            "origin": cell.config.origin,
            "max_new_tokens": cell.metrics.generation.get("max_new_tokens", ""),
            "seconds": f"{cell.metrics.seconds.get('total', float('nan')):.1f}",
            "data_hash": cell.metrics.data_hash,
            "hash": cell.metrics.config_hash,
        }
        for row in table.rows
        for cell in row.cells
    ]
