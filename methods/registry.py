"""Methods by name: built-in ones, and those of other packages through the entry-point group ``visibench.methods``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar, dataclass_transform, get_args, overload

from ..engine.contract import HookPoint, Method
from ..errors import FOREIGN, UnknownNameError, VisibenchError, said, suggest

GROUP = "visibench.methods"
MethodClass = TypeVar("MethodClass", bound=type[Method])
# What a method answers with at its hook points; at all others with what `begin` returns.
_ANSWERS = {"image": "image", "tower": "block", "vision": "vision"}
_methods: dict[str, type[Method]] = {}
_plugins_loaded = False
_collected: dict[str, type[Method]] | None = None


@overload
@dataclass_transform(frozen_default=True)
def register(cls: MethodClass) -> MethodClass: ...
@overload
def register(cls: str, title: str, *, paper: str = "", source: str = "") -> Callable[[MethodClass], MethodClass]: ...
def register(cls: Any, title: str = "", **facts: str) -> Any:
    """Class decorator, ``@register("fastv", "FastV", paper="2403.06764", source="owner/repository@commit")``.

    It makes a method known under its name, with its title, the arXiv number of its paper and its authors' code, and a
    frozen dataclass of it, whose fields are its options. Without arguments, these facts are class attributes.
    Raises :class:`VisibenchError` for a second class of the same name, and for what is no method or has no name.
    """
    if isinstance(cls, str):
        return lambda named: _register(_with_facts(named, {"name": cls, "title": title, **facts}))
    return _register(cls)


def _with_facts(cls: MethodClass, facts: dict[str, str]) -> MethodClass:
    for fact, value in facts.items():
        setattr(cls, fact, value)
    return cls


def _register(cls: MethodClass) -> MethodClass:
    cls = checked(cls)
    table = _methods if _collected is None else _collected
    other = _methods.get(cls.name) or table.get(cls.name)
    if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise VisibenchError(
            f"method {cls.name!r} is registered twice, by {other.__module__} and {cls.__module__}: rename one of them"
        )
    check_hooks(cls)
    table[cls.name] = cls
    return cls


@contextmanager
def collecting() -> Iterator[dict[str, type[Method]]]:
    """What is registered inside goes into the yielded table, and nowhere else."""
    global _collected
    before, _collected = _collected, {}
    try:
        yield _collected
    finally:
        _collected = before


def checked(cls: MethodClass) -> MethodClass:
    """The method class, a frozen dataclass in any case. Raises :class:`VisibenchError` for what cannot be a method."""
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise VisibenchError(f"{cls!r} is not a class derived from visibench.methods.Method")
    if not getattr(cls, "name", "").isidentifier() or not getattr(cls, "title", ""):
        raise VisibenchError(f"{cls.__module__}.{cls.__qualname__} needs a title, and an identifier as its name")
    if "__dataclass_params__" not in vars(cls):
        dataclass(frozen=True, repr=False)(cls)  # in place
    return cls


def check_hooks(cls: type[Method]) -> None:
    """Raise :class:`VisibenchError` for a method that would do nothing where it says it acts, or does not say where."""
    answers = {
        member for member in (*_ANSWERS.values(), "begin") if getattr(cls, member) is not getattr(Method, member)
    }
    if answers and not cls.hook_points:
        raise VisibenchError(f"{cls.name} has no hook_points: say where it acts, of {', '.join(get_args(HookPoint))}")
    for point in cls.hook_points:
        if point not in get_args(HookPoint):
            raise VisibenchError(f"{cls.name}: unknown hook point {point!r}; {suggest(point, get_args(HookPoint))}")
        member = _ANSWERS.get(point, "begin")
        if member not in answers:
            raise VisibenchError(f"{cls.name} acts at {point!r} and needs {member}(), which answers there")


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
    """All methods by name, built-in ones first.

    Raises :class:`VisibenchError` naming the package of a plug-in that cannot be used.
    """
    global _plugins_loaded
    if not _plugins_loaded:
        for entry in entry_points(group=GROUP):
            _register_plugin(entry)
        _plugins_loaded = True  # only now: a broken plug-in must not hide itself or others at the second call
    return dict(_methods)


def _register_plugin(entry: EntryPoint) -> None:
    try:
        register(entry.load())
    except FOREIGN as error:  # importing another package can fail in any way
        package = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "unknown"
        raise VisibenchError(
            f"the plug-in {entry.name!r} ({entry.value}) of package {package} cannot be used: {said(error)}. Fix, "
            "update or uninstall that package",
            foreign=True,
        ) from error
