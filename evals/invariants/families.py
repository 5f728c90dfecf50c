"""Which methods run on which family: asked of the code that refuses, on models without weights.

``python -m visibench.evals.invariants.families`` prints the tables of docs/families.md and of README.md.
"""

from __future__ import annotations

from collections import ChainMap, Counter, defaultdict
from dataclasses import fields
from itertools import combinations
from string import ascii_uppercase
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig

from ...engine.contract import VISION_SIDE
from ...engine.session import fitting
from ...errors import VisibenchError
from ...methods import Method
from ...methods.registry import list_methods
from ...models.adapters import FAMILIES, Adapter
from ...models.geometry import build
from ..settings.method_spec import parse, written

DEPTH = 32
"""Decoder layers, so that layers that methods name by default exist."""
NAMED = {
    "attention": {"attention": "received"},
    "middle": {"middle": "15", "layers": "given"},
    "read_block": {"read_block": "features"},
    "query": {"query": "mean"},
}
"""By option that lets a method run where its defaults do not, and that nobody takes for them in silence: all of these.

``middle=15``: the block of HiPrune's authors on Qwen2.5-VL, of whose blocks most attend in windows.
"""


class FamilyVerdict(NamedTuple):
    """Whether a method runs on a family: ``reason`` is why not, ``given`` the options that it runs with, if any."""

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


def ways(cls: type[Method]) -> dict[str, str]:
    """A method as text by what it is given besides its first example: nothing, or options that are :data:`NAMED`."""
    known = [name for name in NAMED if name in {field.name for field in fields(cls)}]
    example = dict(option.split("=") for option in cls.examples[0].split(",") if option)
    some = (names for count in range(len(known) + 1) for names in combinations(known, count))
    return {
        ",".join(f"{name}={NAMED[name][name]}" for name in names): written(
            cls, dict(ChainMap(*(NAMED[name] for name in names), example))
        )
        for names in some
    }


def verdicts(kind: str) -> dict[str, FamilyVerdict]:
    """Of each method on a family, with its defaults or else with one of the options that are :data:`NAMED`."""
    adapter, found = Adapter(example(kind)), {}
    for name, cls in list_methods().items():
        reasons = {given: _refusal(adapter, text) for given, text in ways(cls).items()}
        runs = next((given for given, reason in reasons.items() if not reason), None)
        found[name] = FamilyVerdict(reasons[""]) if runs is None else FamilyVerdict(given=runs)
    return found


def _refusal(adapter: Adapter, text: str) -> str:
    try:
        fitting(adapter, parse(text))
    except VisibenchError as error:
        return str(error).removeprefix(text.partition(":")[0]).lstrip(": ")
    return ""


Matrix = dict[str, dict[str, FamilyVerdict]]


def matrix() -> Matrix:
    """The verdicts of all families."""
    return {kind: verdicts(kind) for kind in families()}


class Alike(NamedTuple):
    """The matrix with what is alike together.

    ``groups``: families by a letter. ``rows``: methods, and for each group ``+`` where they run, ``o`` where with an
    option, ``-`` where not. ``reasons``: methods, letters of the groups, and why not, or with which option.
    """

    groups: dict[str, list[str]]
    rows: list[tuple[list[str], list[str]]]
    reasons: list[tuple[tuple[str, ...], list[str], str]]


def alike(of: Matrix | None = None) -> Alike:
    """What ``visibench models`` prints; families of which most methods run come first."""
    of = matrix() if of is None else of
    by_marks: dict[str, list[str]] = defaultdict(list)
    for kind, found in of.items():
        by_marks["".join(map(_mark, found.values()))].append(kind)
    order = sorted(by_marks, key=lambda marks: (marks.count("-"), marks.count("o")))
    groups = dict(zip(ascii_uppercase, (by_marks[marks] for marks in order), strict=False))
    methods: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, marks in zip(next(iter(of.values())), zip(*order, strict=True), strict=True):
        methods[marks].append(name)
    rows = [(names, [*marks]) for marks, names in sorted(methods.items(), key=lambda row: "".join(row[0]).count("-"))]
    reasons: dict[tuple[tuple[str, ...], str], list[str]] = defaultdict(list)
    for letter, kinds in groups.items():
        told: dict[str, dict[str, None]] = defaultdict(dict)
        for kind in kinds:
            for name, verdict in of[kind].items():
                if verdict != FamilyVerdict():
                    told[_why(kind, verdict)][name] = None
        for reason, names in told.items():
            reasons[tuple(names), reason].append(letter)
    return Alike(groups, rows, [(names, letters, reason) for (names, reason), letters in reasons.items()])


def _mark(verdict: FamilyVerdict) -> str:
    return "-" if verdict.reason else "o" if verdict.given else "+"


def _why(kind: str, verdict: FamilyVerdict) -> str:
    return verdict.reason.replace(repr(kind), "this family") or f"with {verdict.given}"


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
