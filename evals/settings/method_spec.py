"""Methods from text: ``fastv:layer=2,keep=0.5``, and from the options of a YAML file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from ...errors import OptionError
from ...methods import Method, list_methods
from ...methods.registry import get


def parse(text: str) -> Method:
    """The method that ``NAME[:key=value,…]`` describes; a list is written with plus signs, ``stages=shallow+middle``.

    Raises :class:`~visibench.errors.UnknownNameError` or :class:`OptionError`.
    """
    return build(*split(text))


def split(text: str) -> tuple[str, dict[str, str]]:
    """Name and options, still as text."""
    name, colon, rest = text.strip().partition(":")
    options: dict[str, str] = {}
    for item in rest.split(",") if colon else []:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not key or not equals:
            raise OptionError(f"{text!r}: expected key=value, not {item!r}; write e.g. fastv:layer=2,keep=0.5")
        if key in options:
            raise OptionError(f"{text!r}: {key} is given twice")
        options[key] = value
    return name.strip(), options


def build(name: str, options: Mapping[str, Any]) -> Method:
    """The method ``name`` with ``options``, each converted to the type of its field."""
    return get(name).from_options(**typed(name, options))


def typed(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` of the method ``name``, each converted to the type of its field; unknown ones as they are."""
    cls = get(name)
    types = get_type_hints(cls)
    fields = {field.name for field in dataclasses.fields(cls)}
    return {key: _convert(name, key, value, types[key]) if key in fields else value for key, value in options.items()}


def seeded(method: Method, seed: int) -> Method:
    """The method drawing from ``seed``; a method that draws nothing as it is."""
    options: dict[str, Any] = {"seed": seed} if is_seeded(method) else {}
    return dataclasses.replace(method, **options)


def is_seeded(method: Method | type[Method]) -> bool:
    """Whether the method draws random numbers."""
    return any(field.name == "seed" for field in dataclasses.fields(method))


def spell(cls: type[Method], options: str) -> str:
    """The text of a method with ``options`` (may be empty), such as one of its ``examples``."""
    return f"{cls.name}:{options}" if options else cls.name


def written(name: str, options: Mapping[str, Any]) -> str:
    """``NAME:key=value,…`` for options that need not be all that the method must be given."""
    values = typed(name, options).items()
    spelled = (f"{key}={'+'.join(map(str, v)) if isinstance(v, tuple) else v}" for key, v in values)
    return spell(get(name), ",".join(spelled))


def describe_methods() -> list[dict[str, Any]]:
    """Facts about every method, JSON-ready: metadata, and options with their types and defaults."""
    return [_describe(cls) for cls in list_methods().values()]


def _describe(cls: type[Method]) -> dict[str, Any]:
    fields = dataclasses.fields(cls)
    return {
        "name": cls.name,
        "title": cls.title,
        "about": (cls.__doc__ or "").strip().splitlines()[0].replace("``", ""),
        "paper": cls.paper,
        "source": cls.source,
        "hook_points": list(cls.hook_points),
        "adaptive": cls.adaptive,
        "positions": next(field.default for field in fields if field.name == "positions"),
        "examples": [spell(cls, options) for options in cls.examples],
        "options": {field.name: {"type": str(field.type), "default": field.default} for field in fields},
    }


def _named(wanted: Any) -> str:
    return wanted.__name__ if isinstance(wanted, type) else str(wanted).replace("typing.", "")


def holds_boolean(value: Any) -> bool:
    """Whether true or false stands in a value, where pydantic would take it for a number."""
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return isinstance(value, bool) or any(map(holds_boolean, inner))


def _convert(name: str, key: str, value: Any, wanted: Any) -> Any:
    if holds_boolean(value) and bool not in (wanted, *get_args(wanted)):
        raise OptionError(f"{name}: {key}={value!r}: expected {_named(wanted)}, not true or false")
    if get_origin(wanted) is tuple and isinstance(value, str):
        value = tuple(part for part in value.split("+") if part)
    try:
        return TypeAdapter(wanted).validate_python(value)
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        raise OptionError(f"{name}: {key}={value!r}: {message[0].lower()}{message[1:]}") from error
