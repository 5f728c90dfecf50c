"""What tasks and methods are called in print."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ..store.records import CONTROL
from . import method_facts

TASKS = {"gqa": "GQA", "mme": "MME", "textvqa_val": "TextVQA", "pope": "POPE"}
_CONTROL = f"{CONTROL} of "


def task_title(task: str) -> str:
    """A task's display name; its own where none is known."""
    return TASKS.get(task, task)


def method_title(name: str) -> str:
    """A method's display name, with its preset if it has one; its own name where none is known."""
    base, at, preset = name.partition("@")
    facts = method_facts.known().get(base)
    return "Dense" if name == "none" else f"{facts.title}{at}{preset}" if facts else name


def row_titles(labels: Iterable[str]) -> dict[str, str]:
    """What rows are called in print, by label: their display names, or the labels where two would share a name."""
    titles = {label: _titled(label) for label in labels}
    shared = Counter(titles.values())
    return {label: title if shared[title] == 1 else label for label, title in titles.items()}


def _titled(label: str) -> str:
    """The method's display name, with the options of its label."""
    if label.startswith(_CONTROL):
        return _CONTROL + _titled(label.removeprefix(_CONTROL))
    name, _, options = label.partition(":")
    title = method_title(name)
    return f"{title} ({', '.join(options.split(','))})" if options else title
