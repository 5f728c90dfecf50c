"""What options mean, by method: from options.yaml, or of other packages' methods from the docstring below an option."""

from __future__ import annotations

import ast
import inspect
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path

import yaml

from ..engine.contract import Method


@cache
def _table() -> dict[str, str]:
    table: dict[str, str] = yaml.safe_load(Path(__file__).with_name("options.yaml").read_text(encoding="utf-8"))
    return table


def meaning(cls: type[Method], option: str) -> str:
    """What an option means; empty where nobody says it."""
    own = {name: text for base in reversed(cls.__mro__) for name, text in _documented(base).items()}
    built_in = cls.__module__.startswith("visibench.") or option in ("positions", "keep", "tokens", "layers")
    known = _table().get(f"{cls.name}.{option}") or _table().get(option, "")
    return own.get(option) or (known if built_in else "")


def about(cls: type[Method]) -> str:
    """The method in a line."""
    return (cls.__doc__ or "").strip().splitlines()[0].replace("``", "")


def how(cls: type[Method]) -> str:
    """The method as its file tells it: algorithm, authors' code, and where paper and code differ.

    The file of a method that it extends comes first.
    """
    named = [base for base in reversed(cls.__mro__) if hasattr(base, "title")]
    told = [getattr(sys.modules.get(base.__module__), "__doc__", None) or base.__doc__ or "" for base in named]
    return "\n\n".join(dict.fromkeys(map(inspect.cleandoc, told)))


@cache
def _documented(cls: type) -> dict[str, str]:
    """Options of a class by name, with the strings that stand below them."""
    try:
        body = ast.parse(inspect.cleandoc(f"\n{inspect.getsource(cls)}")).body[0].body  # type: ignore[attr-defined]
    except (OSError, TypeError, SyntaxError, IndexError, AttributeError):
        return {}
    pairs = pairwise(body)
    return {
        option.target.id: " ".join(below.value.value.split())
        for option, below in pairs
        if isinstance(option, ast.AnnAssign)
        and isinstance(option.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
        and isinstance(below.value.value, str)
    }
