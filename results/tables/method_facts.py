"""What methods say of themselves, read from the sources of this package: nothing that runs a model is imported."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib.metadata import entry_points
from typing import Any

from ...utils.machine import ROOT

PLUGINS = "visibench.methods"


@dataclass(frozen=True)
class MethodFacts:
    """``about``: in a line. ``algorithm``: as its file tells it, behind the files of methods that it extends."""

    title: str
    about: str
    algorithm: str
    paper: str = ""
    source: str = ""
    hook_points: tuple[str, ...] = ()


_SAID = {"name", *(field.name for field in fields(MethodFacts))}
_Sources = Mapping[str, tuple[ast.ClassDef, str]]
"""Classes by name, each with the docstring of its file."""


@lru_cache(maxsize=1)
def built_in() -> dict[str, MethodFacts]:
    """The methods of this package by name, as they are registered."""
    sources: dict[str, tuple[ast.ClassDef, str]] = {}
    for file in sorted((ROOT / "methods").glob("*.py")):
        module = ast.parse(file.read_bytes())
        told = ast.get_docstring(module) or ""
        sources |= {node.name: (node, told) for node in module.body if isinstance(node, ast.ClassDef)}
    registered = [name for name, (node, _) in sources.items() if any(map(_registers, node.decorator_list))]
    found = [_facts(name, sources) for name in registered]
    return {facts.pop("name"): MethodFacts(**facts) for facts in found}


@lru_cache(maxsize=1)
def known() -> dict[str, MethodFacts]:
    """The same with those of plug-ins, for which methods are imported."""
    if not entry_points(group=PLUGINS):
        return built_in()
    from ...methods.explained import about, how
    from ...methods.registry import list_methods

    return built_in() | {
        name: MethodFacts(cls.title, about(cls), how(cls), cls.paper, cls.source, cls.hook_points)
        for name, cls in list_methods().items()
        if name not in built_in()
    }


def _registers(decorator: ast.expr) -> bool:
    return ast.unparse(decorator.func if isinstance(decorator, ast.Call) else decorator) == "register"


def _facts(name: str, sources: _Sources) -> dict[str, Any]:
    """What a class says, and where it says nothing, those that it extends."""
    if name not in sources:
        return {}
    node, told = sources[name]
    bases = [_facts(ast.unparse(base), sources) for base in reversed(node.bases)]
    facts = {key: value for base in bases for key, value in base.items()} | _own(node)
    if "title" in facts:
        files = [base["algorithm"] for base in bases if "title" in base]
        facts["about"] = (ast.get_docstring(node) or "").partition("\n")[0].replace("``", "")
        facts["algorithm"] = "\n\n".join(dict.fromkeys([*files, told]))
    return facts


def _own(node: ast.ClassDef) -> dict[str, Any]:
    """Plain attributes of a class, and what its decorator gives it."""
    said: dict[str, Any] = {}
    for line in node.body:
        if isinstance(line, ast.Assign) and (target := ast.unparse(line.targets[0])) in _SAID:
            said[target] = ast.literal_eval(line.value)
    for call in node.decorator_list:
        if isinstance(call, ast.Call) and _registers(call):
            said |= dict(zip(("name", "title"), map(ast.literal_eval, call.args), strict=True))
            said |= {str(one.arg): ast.literal_eval(one.value) for one in call.keywords}
    return said
