"""The parts of a page that stand in cards: methods, and questions with all answers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ...results.tables.method_facts import MethodFacts
from ...results.tables.tables import ResultTable
from ...results.tables.titles import task_title
from ...utils.token_grids import Places, View, drawable, placed, views
from ..question_image import ImageSource, QuestionImage
from .inline import veil
from .questions import MethodAnswer, ShownQuestion

_TEXT = 2000  # characters shown of a question, a target or an answer


# ---- methods ------------------------------------------------------------------------------------------------------


_ELSEWHERE = "This method is not installed where the report was made."


def method_cards(table: ResultTable, about: Mapping[str, MethodFacts]) -> list[dict[str, Any]]:
    """A card a method. One that is not installed here shows what the run itself says of it."""
    cards = []
    for name in dict.fromkeys(row.method for row in table.rows):
        rows = [row for row in table.rows if row.method == name]
        facts = about.get(name, MethodFacts(rows[0].title or name, _ELSEWHERE, ""))
        common = _common([row.options for row in rows])
        cards.append(
            {
                "name": name,
                "title": facts.title,
                "about": facts.about,
                "algorithm": facts.algorithm,
                "paper": facts.paper,
                "source": facts.source,
                "source_url": _source_url(facts.source),
                "hook_points": ", ".join(facts.hook_points),
                "positions": ", ".join(sorted({str(row.options.get("positions", "–")) for row in rows})),
                "options": _spelled(common),
                "runs": [(row.label, _spelled(row.options, common), row.seeds) for row in rows],
            }
        )
    return cards


def _source_url(source: str) -> str:
    """Where a source ``owner/name@commit`` lies; empty for anything else."""
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)@([0-9a-f]{7,40})", source)
    return f"https://github.com/{match[1]}/tree/{match[2]}" if match else ""


def _common(options: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all runs of a method share."""
    return {key: value for key, value in options[0].items() if all(other.get(key) == value for other in options)}


def _spelled(options: Mapping[str, Any], without: Mapping[str, Any] | None = None) -> str:
    """Options as text; those that are None say nothing, positions and seeds stand elsewhere."""
    elsewhere = {"seed", "positions", *(without or {})}
    named = {key: value for key, value in options.items() if value is not None and key not in elsewhere}
    return ", ".join(f"{key}={'+'.join(map(str, v)) if isinstance(v, list) else v}" for key, v in named.items())


# ---- questions ----------------------------------------------------------------------------------------------------


def question_cards(chosen: Sequence[ShownQuestion], table: ResultTable, source: ImageSource) -> list[dict[str, Any]]:
    """What the page shows of each chosen question: its image, every method's answer, and the tokens that were left."""
    by_cell: dict[str, dict[int, str]] = {}
    configs = {question.config.task: question.config for question in chosen}
    for question in chosen:
        by_cell.setdefault(question.config.task, {})[question.doc_id] = question.prompt
    loaded = {task: source(configs[task], prompts) for task, prompts in by_cell.items()}
    order, titles = {id(row): place for place, row in enumerate(table.rows)}, table.titles
    cards = []
    for number, question in enumerate(chosen, start=1):
        shown = loaded[question.config.task][question.doc_id]
        images = [] if isinstance(shown, str) else shown
        grids, whole = [picture.grid for picture in images], all(picture.whole for picture in images)
        places = placed(question.places, question.visual_tokens, grids, whole)
        parting = sum(answer.parts for answer in question.answers)
        cards.append(
            {
                "number": number,
                "task": question.config.task,
                "title": task_title(question.config.task),
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
                "answers": [
                    _answer(answer, places, images)
                    | {"place": order[id(answer.row)], "title": titles[answer.row.label]}
                    for answer in question.answers
                ],
                "methods": " ".join(str(order[id(answer.row)]) for answer in question.answers if answer.parts),
            }
        )
    return cards


def _overlay(question: ShownQuestion, places: Places) -> str:
    """Why there is no picture of the tokens that stayed; empty where there is one."""
    if all(answer.kept is None for answer in question.answers):
        return "this run did not record which tokens stayed"
    return "" if places else "the place of each token in the image is not known here"


def _answer(answer: MethodAnswer, places: Places, pictures: Sequence[QuestionImage]) -> dict[str, Any]:
    kept = sum(answer.kept) if answer.kept is not None else None
    shows = drawable(answer.kept, answer.left, places)
    return {
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


def _view(view: View, picture: QuestionImage) -> dict[str, Any]:
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
