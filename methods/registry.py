"""Methods by name: built-in ones, and those of other packages through the entry-point group ``visibench.methods``."""

from importlib.metadata import entry_points
from typing import Any, TypeVar

from ..errors import UnknownNameError, VisibenchError, suggest
from .base import Method

GROUP = "visibench.methods"
MethodClass = TypeVar("MethodClass", bound=type[Method])
_methods: dict[str, type[Method]] = {}
_plugins_loaded = False


def register(cls: MethodClass) -> MethodClass:
    """Class decorator: make a method known under ``cls.name``. A second class of the same name raises."""
    other = _methods.get(cls.name)
    if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise VisibenchError(
            f"method {cls.name!r} is registered twice, by {other.__module__} and {cls.__module__}: rename one of them"
        )
    _methods[cls.name] = cls
    return cls


def get(name: str) -> type[Method]:
    """The method class called ``name``; :class:`UnknownNameError` with the nearest known name otherwise."""
    methods = list_methods()
    if name not in methods:
        raise UnknownNameError(f"unknown method {name!r}; {suggest(name, methods)}")
    return methods[name]


def load_method(name: str, **hyperparameters: Any) -> Method:
    """Create the method called ``name``, e.g. ``load_method("fastv", layer=2, keep=0.5)``."""
    return get(name).from_options(**hyperparameters)


def list_methods() -> dict[str, type[Method]]:
    """All methods by name, built-in ones first."""
    global _plugins_loaded
    if not _plugins_loaded:
        _plugins_loaded = True
        for entry in entry_points(group=GROUP):
            register(entry.load())
    return dict(_methods)
