"""What tasks and methods are called in print."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from ..store.records import CONTROL
from . import method_facts

TASKS = {"gqa": "GQA", "mme": "MME", "textvqa_val": "TextVQA", "pope": "POPE"}
_CONTROL = f"{CONTROL} of "


def task_title(task: str) -> str:
    """A task's display name; its own where none is known."""
    return TASKS.get(task, task)


def method_title(name: str, told: str = "") -> str:
    """A method's display name, with its preset if it has one; its own name where none is known.

    ``told``: what its run says.
    """
    base, at, preset = name.partition("@")
    facts = None if told else method_facts.known().get(base)
    title = facts.title if facts else told or base
    return "Dense" if name == "none" else f"{title}{at}{preset}"


def row_titles(told: Mapping[str, str]) -> dict[str, str]:
    """What rows are called in print, by label: their display names, or the labels where two would share a name.

    ``told``: by label, what the run calls the method.
    """
    titles = {label: _titled(label, title) for label, title in told.items()}
    shared = Counter(titles.values())
    return {label: title if shared[title] == 1 else label for label, title in titles.items()}


def _titled(label: str, told: str) -> str:
    """The method's display name, with the options of its label."""
    if label.startswith(_CONTROL):
        return _CONTROL + _titled(label.removeprefix(_CONTROL), told)
    name, _, options = label.partition(":")
    title = method_title(name, told)
    return f"{title} ({', '.join(options.split(','))})" if options else title
