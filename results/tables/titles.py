"""What tasks and methods are called in print. Without plug-ins, nothing that runs a model is imported."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from importlib.metadata import entry_points

from ...utils.machine import ROOT
from ..store.records import CONTROL

TASKS = {"gqa": "GQA", "mme": "MME", "textvqa_val": "TextVQA", "pope": "POPE"}
PLUGINS = "visibench.methods"
# Both ways in which a class gives its name and title: in the decorator, or as attributes.
_NAMED = re.compile(r'^(?:@register\(\s*|    name = )"(\w+)"(?:,\s*|.*\n    title = )"([^"\\]+)"', re.MULTILINE)
_CONTROL = f"{CONTROL} of "


def task_title(task: str) -> str:
    """A task's display name; its own where none is known."""
    return TASKS.get(task, task)


@lru_cache(maxsize=1)
def built_in() -> dict[str, str]:
    """Display names of the methods of this package, as they are registered."""
    sources = (file.read_text(encoding="utf-8") for file in sorted((ROOT / "methods").glob("*.py")))
    return dict(found for source in sources for found in _NAMED.findall(source))


@lru_cache(maxsize=1)
def _titles() -> dict[str, str]:
    if not entry_points(group=PLUGINS):
        return built_in()
    from ...methods.registry import list_methods

    return {name: method.title for name, method in list_methods().items()}


def method_title(name: str) -> str:
    """A method's display name, with its preset if it has one; its own name where none is known."""
    base, at, preset = name.partition("@")
    title = _titles().get(base)
    return "Dense" if name == "none" else f"{title}{at}{preset}" if title else name


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
