"""Methods by name: built-in ones, and those of other packages through the entry-point group ``visibench.methods``."""

from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from ..engine.contract import Method
from ..errors import UnknownNameError, VisibenchError, suggest

GROUP = "visibench.methods"
MethodClass = TypeVar("MethodClass", bound=type[Method])
_methods: dict[str, type[Method]] = {}
_plugins_loaded = False


def register(cls: MethodClass) -> MethodClass:
    """Class decorator: make a method known under ``cls.name``.

    Raises :class:`VisibenchError` for a second class of the same name, and for what is no method or has no name.
    """
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise VisibenchError(f"{cls!r} is not a class derived from visibench.methods.Method")
    if not getattr(cls, "name", "").isidentifier() or not getattr(cls, "title", ""):
        raise VisibenchError(f"{cls.__module__}.{cls.__qualname__} needs a title, and an identifier as its name")
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
    except Exception as error:  # importing another package can fail in any way
        package = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "unknown"
        reason = str(error) if isinstance(error, VisibenchError) else f"{type(error).__name__}: {error}"
        raise VisibenchError(
            f"the plug-in {entry.name!r} ({entry.value}) of package {package} cannot be used: "
            f"{' '.join(reason.split())}. Mend, update or uninstall that package"
        ) from error
