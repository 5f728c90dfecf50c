"""Which methods run on which family: asked of the code that refuses, on models without weights.

``python -m visibench.evals.invariants.families`` prints the tables of docs/families.md and of README.md.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig

from ...engine import prune
from ...engine.contract import VISION_SIDE
from ...errors import VisibenchError
from ...methods import Method
from ...methods.registry import list_methods
from ...models.adapters import FAMILIES
from ...models.geometry import build
from ..settings.method_spec import parse, spell

DEPTH = 32
"""Decoder layers, so that layers that methods name by default exist."""
NAMED = {"attention": "received"}
"""Options that let a method run where its defaults do not, and that nobody takes for them in silence."""


class FamilyVerdict(NamedTuple):
    """Whether a method runs on a family: ``reason`` is why not, ``given`` the option that it runs with, if any."""

    reason: str = ""
    given: str = ""


def families() -> list[str]:
    """Families of models that see, by ``model_type``."""
    return [kind for kind, family in FAMILIES.items() if family.projector is not None]


def example(kind: str) -> Any:
    """A model of a family without weights: transformers' default sizes, and what the family says besides."""
    given = FAMILIES[kind].example
    sizes: Any = type(AutoConfig.for_model(kind, **given).get_text_config())
    text = sizes(**given.get("text_config", {}), num_hidden_layers=DEPTH)
    config = AutoConfig.for_model(kind, **{**given, "text_config": text})
    return build(config, "meta", None, torch.device("cpu"), "auto", "sdpa")


def verdicts(kind: str) -> dict[str, FamilyVerdict]:
    """Of each method on a family, with its defaults or else with one of the options that are :data:`NAMED`."""
    model, found = example(kind), {}
    for name, cls in list_methods().items():
        options = cls.examples[0]
        reason = _refusal(model, spell(cls, options))
        found[name] = FamilyVerdict(reason)
        for option in NAMED.keys() & {field.name for field in fields(cls)} if reason else ():
            given = f"{option}={NAMED[option]}"
            if not _refusal(model, spell(cls, ",".join(filter(None, (options, given))))):
                found[name] = FamilyVerdict(given=given)
    return found


def _refusal(model: Any, text: str) -> str:
    try:
        prune(model, parse(text))
    except VisibenchError as error:
        return str(error).removeprefix(text.partition(":")[0]).lstrip(": ")
    return ""


Matrix = dict[str, dict[str, FamilyVerdict]]


def matrix() -> Matrix:
    """The verdicts of all families."""
    return {kind: verdicts(kind) for kind in families()}


def markdown(of: Matrix) -> str:
    """The table of docs/families.md: what does not run on each family as it is. All else does."""
    lines = ["| `model_type` | with an option | refused |", "|---|---|---|"]
    for kind, found in of.items():
        given = sorted({verdict.given for verdict in found.values() if verdict.given})
        some = [f"`{one}`: {_named(found, lambda verdict, one=one: verdict.given == one)}" for one in given]
        refused = _named(found, lambda verdict: verdict.reason)
        lines.append(f"| `{kind}` | {'; '.join(some) or '–'} | {refused or '–'} |")
    return "\n".join(lines)


STAGES = "in the decoder", "behind the projector", "on the vision side"
"""Where methods act, as README counts them."""


def overview(of: Matrix) -> str:
    """README's table: how many methods of each stage run on a family, some with an option that has to be named."""
    stage = {name: _stage(cls) for name, cls in list_methods().items() if cls.hook_points}
    every, alike = Counter(stage.values()), defaultdict(list)
    for kind, found in of.items():
        runs = Counter(one for name, one in stage.items() if not found[name].reason)
        alike[" | ".join(str(runs[one] or "–") for one in STAGES)].append(f"`{kind}`")
    lines = ["| families | " + " | ".join(f"{one}, of {every[one]}" for one in STAGES) + " |", "|---|---:|---:|---:|"]
    return "\n".join([*lines, *(f"| {', '.join(kinds)} | {numbers} |" for numbers, kinds in alike.items())])


def _stage(cls: type[Method]) -> str:
    points = {*cls.hook_points}
    if not points & VISION_SIDE:
        return STAGES[0]
    return STAGES[1] if points == {"projector"} and not cls.vision_blocks else STAGES[2]


def _named(found: dict[str, FamilyVerdict], which: Any) -> str:
    return ", ".join(name for name, verdict in found.items() if which(verdict))


if __name__ == "__main__":
    found = matrix()
    print(f"{markdown(found)}\n\n{overview(found)}")
