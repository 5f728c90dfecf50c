"""What there is: methods, models, tasks."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any

import typer

from ..utils.rows import laid_out
from .shared import AsJson, print_list, width, wrapped


def methods(
    name: Annotated[
        str | None, typer.Argument(help="One, or FILE.py:NAME: what each of its options means.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the pruning methods with their options; with a name, explain one."""
    from ..evals.settings.method_spec import describe_methods

    if name is not None:
        _explain(name, as_json=as_json)
        return
    described = describe_methods()
    rows = [[m["name"], m["about"], _defaults(m["options"]), m["examples"][0], m["paper"]] for m in described]
    print_list(
        described, ["method", "what it does", "options and defaults", "for example", "arXiv"], rows, as_json=as_json
    )


def _explain(name: str, *, as_json: bool) -> None:
    """All about one method."""
    from ..evals.settings.method_spec import describe
    from ..methods.explained import how
    from ..methods.files import find

    cls = find(name)
    told = describe(cls)
    if as_json:
        print(json.dumps(told | {"how": how(cls)}, indent=1))
        return
    acts = ", ".join(told["hook_points"]) or "nothing"
    lines = [f"{told['name']}: {told['title']}", told["about"], "", f"acts on    {acts}"]
    lines += [f"paper      https://arxiv.org/abs/{told['paper']}"] * bool(told["paper"])
    lines += [f"code       {told['source']}"] * bool(told["source"])
    lines += [f"examples   {told['examples'][0]}", *(f"           {example}" for example in told["examples"][1:])]
    lines += [f"presets    {', '.join(told['presets'])}"] * bool(told["presets"])
    for line in [*lines, ""]:
        wrapped(line)
    rows = [[key, _spelled(o["default"]), o["type"], o["meaning"] or "not said"] for key, o in told["options"].items()]
    print_list([], ["option", "default", "type", "meaning"], rows, f"\n{_filled(how(cls))}", as_json=False)


def models(
    matrix: Annotated[
        bool, typer.Option("--matrix", help="Only which methods run on which model family: each with all reasons.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List the models that need no download, and which methods run on which model family."""
    if matrix:
        _matrix(as_json=as_json)
        return
    from ..models import list_models
    from ..models.support import DECODERS

    described = [{"name": name, "about": about} for name, about in list_models().items()]
    also = (
        "Also: a local folder, or a hub name such as llava-hf/llava-1.5-7b-hf.\n"
        f"Tested text decoders: {', '.join(sorted(DECODERS))}."
    )
    print_list(described, ["model", "about"], [[m["name"], m["about"]] for m in described], also, as_json=as_json)
    if not as_json:
        _grouped()


def _grouped() -> None:
    """Methods by families, those alike together, and why a method does not run."""
    from ..evals.invariants.families import alike
    from ..models.adapters import UNFIT

    groups, rows, reasons = alike()
    print("\nWhich methods run on which model families (+ yes, o with an option, - no):\n")
    for letter, kinds in groups.items():
        wrapped(f"{letter}  {', '.join(kinds)}", hang="   ")
    print(laid_out(["methods", *groups], [[", ".join(names), *marks] for names, marks in rows], min(width(), 80)))
    print()
    for names, letters, reason in reasons:
        wrapped(f"{', '.join(names)} on {', '.join(letters)}: {reason}", hang="  ")
    wrapped(f"All methods on {', '.join(UNFIT)}: refused, see visibench models --matrix.", hang="  ")


def _matrix(*, as_json: bool) -> None:
    """Families by methods; holes with the reason that pruning gives."""
    from ..evals.invariants.families import matrix
    from ..models.adapters import UNFIT

    found = matrix()
    if as_json:
        told = {kind: {name: one._asdict() for name, one in methods.items()} for kind, methods in found.items()}
        print(json.dumps(told, indent=1))
        return
    for kind, methods in found.items():
        print(kind)
        for one in dict.fromkeys(sorted(methods.values())):
            names = ", ".join(name for name, verdict in methods.items() if verdict == one)
            given = f": with {one.given}" if one.given else ""
            wrapped(f"  refused {names}: {one.reason}" if one.reason else f"  runs    {names}{given}")
    for kind, why in UNFIT.items():
        print(kind)
        wrapped(f"  refused all methods: {why}")


def tasks(as_json: AsJson = False) -> None:
    """List the tasks with embedded data. Any other generate_until task of lmms-eval works by name, from the hub."""
    from ..evals.tasks.known import TASKS
    from ..evals.tasks.scorers import SCORERS

    described = [dataclasses.asdict(info) for info in TASKS.values()]
    rows = [[t["name"], t["about"], ", ".join(m["key"] for m in t["metrics"])] for t in described]
    scorers = "\n".join(f"  {name:<10}{scorer.about}" for name, scorer in SCORERS.items())
    also = (
        "Also: any other task of lmms-eval by its name, such as scienceqa_img, with data from the hub; and your own "
        "questions, FILE.jsonl, FILE.parquet or a folder of such (docs/your_data.md).\n"
        "Scorers for these, FILE:SCORER:\n"
        f"{scorers}"
    )
    print_list(described, ["task", "about", "metrics in tables"], rows, also, as_json=as_json)


def _filled(text: str) -> str:
    """A docstring with each of its paragraphs in one line; what is laid out stays as it is."""
    parts = text.split("\n\n")
    return "\n\n".join(part if "\n " in part or part.startswith(" ") else " ".join(part.split()) for part in parts)


def _defaults(options: dict[str, Any]) -> str:
    """Options with their defaults, as they are written on the command line."""
    return ", ".join(f"{key}={_spelled(option['default'])}" for key, option in options.items())


def _spelled(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)
