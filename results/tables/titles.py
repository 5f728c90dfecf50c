"""What tasks and methods are called in print."""

from __future__ import annotations

from ...methods.registry import list_methods
from .tables import MethodRow

TASKS = {"gqa": "GQA", "mme": "MME", "textvqa_val": "TextVQA", "pope": "POPE"}


def task_title(task: str) -> str:
    """A task's display name; its own where none is known."""
    return TASKS.get(task, task)


def method_title(name: str) -> str:
    """A method's display name, with its preset if it has one; its own name where none is known."""
    base, at, preset = name.partition("@")
    method = list_methods().get(base)
    return "Dense" if name == "none" else f"{method.title}{at}{preset}" if method else name


def row_title(row: MethodRow) -> str:
    """The method's display name, with the options of its label."""
    name, _, options = row.label.partition(":")
    title = method_title(name)
    return f"{title} ({', '.join(options.split(','))})" if options else title
