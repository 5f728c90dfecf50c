"""What is known of a cell beside its method and task, and in what cells differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from .records import CODE, digest
from .store import Cell

_QUESTIONS = ("limit", "origin")


def facts_of(cell: Cell) -> dict[str, Any]:
    """All that two cells must have in common to be compared, whatever their tasks."""
    other = cell.other_code
    apart = {"method", "options", "label", "title", "seed", "task", "control", *CODE, *_QUESTIONS}
    config = cell.config.model_dump(mode="json", exclude=apart)
    kept = {"engine", *({"task", "data"} & {*other})}
    code = {part: hashed for part, hashed in cell.config.code.items() if part in kept}
    if other and "engine" not in other:  # methods of one changed package are still of one kind
        code["changed"] = " and ".join(other)
    asked = cell.config.protocol
    config["protocol"] = f"{asked['name']} ({digest(asked)[:8]})" if asked else "hf"
    if code:
        config["code"] = code
    return config | {"environment": cell.metrics.environment.model_dump(mode="json", exclude={"host", "code"})}


def questions_of(cell: Cell) -> dict[str, Any]:
    """Which questions of its task a cell asks."""
    return cell.config.model_dump(mode="json", include=set(_QUESTIONS))


def differences(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """For each cell, the facts beside its method and task that are not the same in all of ``cells``."""
    facts = [_flat(facts_of(cell) | questions_of(cell)) for cell in cells]
    return [
        {key: one.get(key) for key in one if len({json.dumps(other.get(key)) for other in facts}) > 1} for one in facts
    ]


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {prefix + key: item}
    return flat
