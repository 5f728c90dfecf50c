"""A run folder as one page of HTML that needs nothing else: no network, no file beside it, and to be read no script.

All that comes from a run (labels, questions, answers, names) goes through the template's escaping. The page's own
Content-Security-Policy admits one style sheet and one script, by their hashes, and images inside the page.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ...errors import DataError
from ...results.figures import plots
from ...results.store.records import CellConfig
from ...results.store.token_grids import Places, View, views
from ...results.tables import summary
from ...results.tables.columns import Column, columns
from ...results.tables.formats import grouped
from ...results.tables.notes import heading, notes
from ...results.tables.tables import Row, Table
from .inline import inline, veil
from .questions import KINDS, RULE, Answer, Question, choose, drawable, placed

_TEXT = 2000  # characters shown of a question, a target or an answer
_SIZE = "@@size@@"
_FIGURES = {
    "pareto": "Scores against compute",
    "latency": "Scores against prefill time",
    "tokens": "Visual tokens by decoder layer",
    "stages": "Compute and prefill time by component",
}
_MARKS = {"↑": "shown higher than", "↓": "shown lower than", "=": "no difference shown from"}
_REFERENCES = {"d": "dense", "r": "random tokens"}


@dataclass(frozen=True)
class Picture:
    """An image to show. ``uri``: a data URI. ``grid``: patches a side, 0 where they are no square.

    ``whole``: whether it shows what the model saw, all of it and nothing else.
    """

    uri: str
    width: int
    height: int
    grid: int
    about: str
    whole: bool = True


Pictures = Callable[[CellConfig, Mapping[int, str]], Mapping[int, Sequence[Picture] | str]]
"""The images of some questions (prompt by doc_id) that a cell asked, or for each the reason why there is none."""


def no_pictures(config: CellConfig, prompts: Mapping[int, str]) -> dict[int, Sequence[Picture] | str]:
    """Pictures for reports without any."""
    return dict.fromkeys(prompts, "left out")


def report(
    tables: Sequence[Table],
    name: str,
    *,
    questions: int = 24,
    pictures: Pictures = no_pictures,
    about: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """The page. ``name``: of the run. ``questions``: how many to show, shared out among the tables.

    ``about``: facts about methods by name, as :func:`visibench.evals.settings.method_spec.describe_methods` gives them.
    """
    share, more = divmod(questions, len(tables))
    sections = [
        _section(table, number, len(tables), share + (number <= more), pictures, about or {})
        for number, table in enumerate(tables, start=1)
    ]
    style, script = _read("report.css"), _read("report.js")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(_read("report.html.j2")).render(
        name=name,
        sections=sections,
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
    table: Table, number: int, count: int, questions: int, pictures: Pictures, about: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """What the template shows of one table."""
    prefix = f"t{number}-"
    chosen = choose(table, questions)
    return {
        "prefix": prefix,
        "heading": heading(table, number, count),
        "lead": summary.lead(table),
        "verdicts": summary.verdicts(table),
        "budgets": summary.by_budget(table),
        "table": _grid(table),
        "notes": notes(table, columns(table), "Bold"),
        "figures": _figures(table, prefix),
        "methods": _methods(table, about),
        "questions": _questions(chosen, table, pictures),
        "rows": [row.label for row in table.rows],
        "tasks": list(table.questions),
        "facts": _facts(table),
        "cells": _cells(table),
    }


# ---- the table and the figures ------------------------------------------------------------------------------------


def _grid(table: Table) -> dict[str, Any]:
    chosen = columns(table)
    return {
        "caption": f"Scores, visual tokens and compute on {table.facts['model']}",
        "columns": [
            {"name": " ".join(column.title.split("\n")), "lines": column.title.split("\n"), "numeric": number > 0}
            for number, column in enumerate(chosen)
        ],
        "groups": [
            {"title": title, "rows": [[_entry(column, row) for column in chosen] for row in rows]}
            for title, rows in grouped(table)
        ],
    }


def _entry(column: Column, row: Row) -> dict[str, Any]:
    """``sort``: the first of the column's figures, with full precision; empty where there is none."""
    shown, value = column.show(row), next(iter(column.figures(row).values()))
    missing = value is None or value != value
    return {
        "value": shown.value,
        "behind": " ".join(shown.behind),
        "marks": [(mark, f"{_MARKS[mark[0]]} {_REFERENCES[mark[1:]]}") for mark in shown.marks],
        "best": shown.best,
        "sort": "" if missing else value if isinstance(value, str) else repr(float(value)),
    }


def _figures(table: Table, prefix: str) -> list[dict[str, Any]]:
    figures = []
    for kind, title in _FIGURES.items():
        try:
            svg = inline(plots.draw(table, kind), f"{prefix}{kind}-", title)
        except DataError as error:
            figures.append({"kind": kind, "title": title, "svg": "", "reason": str(error)})
        else:
            figures.append({"kind": kind, "title": title, "svg": Markup(svg), "reason": ""})
    return figures


# ---- methods ------------------------------------------------------------------------------------------------------


def _methods(table: Table, about: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A card a method. One that is not installed here shows what the run itself says of it."""
    cards = []
    for name in dict.fromkeys(row.method for row in table.rows):
        rows = [row for row in table.rows if row.method == name]
        facts, common = about.get(name, {}), _common([row.options for row in rows])
        cards.append(
            {
                "name": name,
                "title": facts.get("title", name),
                "about": facts.get("about", "This method is not installed where the report was made."),
                "algorithm": facts.get("algorithm", ""),
                "paper": facts.get("paper", ""),
                "source": facts.get("source", ""),
                "source_url": _source_url(facts.get("source", "")),
                "hook_points": ", ".join(facts.get("hook_points", [])),
                "positions": ", ".join(sorted({str(row.options.get("positions", "–")) for row in rows})),
                "options": _spelled(common),
                "runs": [(row.label, _spelled(row.options, common), row.seeds) for row in rows],
            }
        )
    return cards


def _source_url(source: str) -> str:
    """Where a source ``owner/name@commit`` lies; empty for anything else."""
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)@([0-9a-f]{7,40})", source)
    return f"https://github.com/{found[1]}/tree/{found[2]}" if found else ""


def _common(options: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all runs of a method share."""
    return {key: value for key, value in options[0].items() if all(other.get(key) == value for other in options)}


def _spelled(options: Mapping[str, Any], without: Mapping[str, Any] | None = None) -> str:
    """Options as text; those that are None say nothing, positions and seeds stand elsewhere."""
    elsewhere = {"seed", "positions", *(without or {})}
    named = {key: value for key, value in options.items() if value is not None and key not in elsewhere}
    return ", ".join(f"{key}={'+'.join(map(str, v)) if isinstance(v, list) else v}" for key, v in named.items())


# ---- questions ----------------------------------------------------------------------------------------------------


def _questions(chosen: Sequence[Question], table: Table, pictures: Pictures) -> list[dict[str, Any]]:
    by_cell: dict[str, dict[int, str]] = {}
    configs = {question.config.task: question.config for question in chosen}
    for question in chosen:
        by_cell.setdefault(question.config.task, {})[question.doc_id] = question.prompt
    found = {task: pictures(configs[task], prompts) for task, prompts in by_cell.items()}
    order = {id(row): place for place, row in enumerate(table.rows)}
    cards = []
    for number, question in enumerate(chosen, start=1):
        shown = found[question.config.task][question.doc_id]
        images = [] if isinstance(shown, str) else shown
        grids, whole = [picture.grid for picture in images], all(picture.whole for picture in images)
        places = placed(question.places, question.visual_tokens, grids, whole)
        parting = sum(answer.parts for answer in question.answers)
        cards.append(
            {
                "number": number,
                "task": question.config.task,
                "kind": question.kind,
                "parting": parting,
                "of": sum(answer.row.method != "none" for answer in question.answers),
                "id": question.question_id,
                "doc_id": question.doc_id,
                "category": question.category,
                "prompt": _short(question.prompt),
                "target": _short(_target(question.target)),
                "pictures": images,
                "reason": shown if isinstance(shown, str) else "",
                "overlay": _overlay(question, places),
                "tokens": question.visual_tokens,
                "answers": [_answer(answer, places, order[id(answer.row)], images) for answer in question.answers],
                "methods": " ".join(str(order[id(answer.row)]) for answer in question.answers if answer.parts),
            }
        )
    return cards


def _overlay(question: Question, places: Places) -> str:
    """Why there is no picture of the tokens that stayed; empty where there is one."""
    if all(answer.kept is None for answer in question.answers):
        return "this run did not record which tokens stayed"
    return "" if places else "the place of each token in the image is not known here"


def _answer(answer: Answer, places: Places, place: int, pictures: Sequence[Picture]) -> dict[str, Any]:
    kept = sum(answer.kept) if answer.kept is not None else None
    shows = drawable(answer.kept, answer.left, places)
    return {
        "place": place,
        "label": answer.row.label,
        "texts": [_short(text) for text in dict.fromkeys(answer.answers)],
        "seeds": len(answer.answers),
        "score": f"{answer.score:.3g}",
        "verdict": {True: "right", False: "wrong", None: "mixed"}[answer.right],
        "parts": answer.parts,
        "left": answer.left,
        "kept": kept,
        "latency": "–" if answer.latency_ms is None else f"{answer.latency_ms:.3g} ms",
        "batch": answer.batch,
        "reused": answer.reused,
        "made": answer.left - kept if kept is not None else 0,
        "views": [_view(view, pictures[view.image]) for view in views(answer.kept or (), places)] if shows else [],
    }


def _view(view: View, picture: Picture) -> dict[str, Any]:
    """A small copy of an image of the question, the patches dark whose tokens did not stay."""
    rows, columns = view.cells.shape
    return {
        "image": view.image + 1,
        "about": view.about,
        "loose": view.loose,
        "width": picture.width,
        "height": picture.height,
        "scale": f"{picture.width / columns} {picture.height / rows}",
        "veil": veil(view.cells.ravel().tolist(), columns),
    }


def _target(target: str) -> str:
    """Several reference answers as each of them with its count."""
    counts = Counter(target.split("\n"))
    if len(target.split("\n")) == 1:
        return target
    return ", ".join(f"{text} ×{count}" if count > 1 else text for text, count in counts.most_common())


def _short(text: str) -> str:
    return text if len(text) <= _TEXT else f"{text[:_TEXT]} … ({len(text)} characters)"


# ---- environment --------------------------------------------------------------------------------------------------


def _facts(table: Table) -> list[tuple[str, list[tuple[str, str]]]]:
    """Groups of names and values: what all cells of the table have in common."""
    environment = table.facts["environment"]
    settings = {key: value for key, value in table.facts.items() if key not in ("environment", "schema_version")}
    hosts = [cell.metrics.environment for row in table.rows for cell in row.cells]
    found = {"settings": settings, **{name: environment[name] for name in ("model", "versions", "machine")}}
    found["hosts"] = _union([environment.host for environment in hosts])
    found["code"] = {"commit": ", ".join(table.commits)} if table.commits else {}
    return [
        (name, [(key, _value(value)) for key, value in facts.items() if value not in (None, "", {}, [])])
        for name, facts in found.items()
        if facts
    ]


def _union(facts: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Each name with all its values."""
    keys = dict.fromkeys(key for one in facts for key in one)
    return {key: ", ".join(dict.fromkeys(_value(one[key]) for one in facts if one.get(key))) for key in keys}


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _cells(table: Table) -> list[dict[str, Any]]:
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
