"""Methods from text: ``fastv:layer=2,keep=0.5``, ``vscan@published-64``, and from the options of a YAML file."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from ...engine.contract import Knob, spell_value
from ...errors import OptionError
from ...methods import Method, list_methods
from ...methods.explained import about, meaning
from ...methods.files import find
from . import presets
from .target import Target

# FILE.py[:NAME][:options]; what holds an equals sign is no name.
_LOCAL = re.compile(r"(?P<file>.+?\.py)(?::(?P<name>[^:=,]*))?(?:(?P<colon>:)(?P<options>.*))?$")
LARGEST = 2**53
"""No option is a larger integer: random generators take no larger seeds, and readers of JSON round larger numbers."""

Solve = Callable[[str, Mapping[str, Any], Target], Method]
"""Finds the method that meets a target, from its name and the other options."""


def nowhere(name: str, options: Mapping[str, Any], target: Target) -> Method:
    """The answer to budgets where there are no questions to solve them on."""
    command = f"`visibench budget --target {target.kind}={target.value:g}` finds"
    raise OptionError(
        f"{name}: only sweeps solve budgets, on the questions of their tasks: give the options that {command}"
    )


@dataclass(frozen=True)
class MethodSpec:
    """A method as it is asked for, from the command line or a configuration: parsed once, then asked for all else.

    ``reference``: a registered name, or FILE.py:NAME, and behind an @ a preset. ``given``: options as they were
    written; ``options``: these and those of the preset, each of its field's type. With a ``target`` they are not all: a
    knob is to be turned until it is met. ``label``: how tables call the method. ``seeds``: one run each.
    ``control``: random tokens in the place of its own are run as well.
    """

    reference: str
    cls: type[Method]
    given: Mapping[str, Any]
    options: Mapping[str, Any]
    target: Target | None = None
    label: str = ""
    seeds: tuple[int, ...] = ()
    control: bool = False

    @classmethod
    def of(cls, reference: str, given: Mapping[str, Any]) -> MethodSpec:
        """The method ``reference`` with options ``given`` as text or values.

        Raises :class:`~visibench.errors.UnknownNameError`, and :class:`OptionError` for a value of a wrong type.
        """
        own, preset = presets.divided(reference)
        method = find(own)
        settings = presets.load(method.name, preset).options if preset else {}
        return cls(reference, method, given, typed(method, {**settings, **given}))

    @classmethod
    def parse(cls, text: str) -> MethodSpec:
        """From ``NAME[@PRESET][:key=value,…]`` or ``FILE.py[:NAME][@PRESET][:key=value,…]``."""
        return cls.of(*split(text))

    @property
    def name(self) -> str:
        """The method's own name."""
        return self.cls.name

    def on(self, model: str) -> MethodSpec:
        """The same; one line on standard error if its preset was found on another model than ``model``."""
        _, preset = presets.divided(self.reference)
        if preset:
            presets.tell(self.name, preset, model)
        return self

    def build(self) -> Method:
        """The method with its options alone. Raises :class:`OptionError`."""
        return self.cls.from_options(**self.options)

    def method(self, solve: Solve = nowhere) -> Method:
        """The method with all its options; ``solve`` finds what a target leaves open."""
        return solve(self.reference, self.given, self.target) if self.target else self.build()

    def seeded(self) -> bool:
        """Whether the method draws random numbers."""
        return is_seeded(self.cls)

    def __str__(self) -> str:
        """How the method is called without a label: by its options, of which a target leaves some open."""
        if self.target is None:
            return str(seeded(self.build(), 0))
        return written(self.cls, {key: value for key, value in self.options.items() if key != "seed"})

    def fixed(self) -> bool:
        """Whether the options leave no knob of the method to be turned."""
        return all(decided(knob) & self.options.keys() for knob in self.cls.knobs)

    def knobs(self) -> list[Knob]:
        """The knobs that the options leave to be turned. Raises :class:`OptionError` if there is none."""
        self.cls.check_names(self.options)
        if not self.cls.knobs:
            raise OptionError(f"{self.name} has nothing to turn for a budget: leave its budget out")
        if self.fixed():
            both = " and ".join(sorted({key for knob in self.cls.knobs for key in decided(knob) & self.options.keys()}))
            raise OptionError(f"{self.name}: {both} given, which is for a budget to decide: leave it or the budget out")
        return [knob for knob in self.cls.knobs if not decided(knob) & self.options.keys()]


def decided(knob: Knob) -> set[str]:
    """The options that must not be given where this knob is turned."""
    return {knob.name, *knob.replaces}


def parse(text: str, model: str = "") -> Method:
    """The method that ``NAME[@PRESET][:key=value,…]`` describes; a list has plus signs, ``stages=shallow+middle``.

    ``model``: the name of the one it is for, if that is known, so that a preset of another one says so.
    Raises :class:`~visibench.errors.UnknownNameError` or :class:`OptionError`.
    """
    spec = MethodSpec.parse(text)
    return (spec.on(model) if model else spec).build()


def name_of(text: str) -> str:
    """How the method of a text is called, whether or not there is one: without its file, preset and options."""
    reference, _, _ = _divided(text)
    return presets.divided(reference)[0].rpartition(".py:")[2].strip()


def _divided(text: str) -> tuple[str, str | None, str]:
    """Reference, a colon if there is one, and what is written behind it."""
    local = _LOCAL.match(text.strip())
    if local is None:
        return text.strip().partition(":")
    return ":".join(filter(None, local.group("file", "name"))), local["colon"], local["options"] or ""


def of_class(cls: type[Method], options: str) -> Method:
    """The method of a class, registered or not, with ``options`` as on the command line."""
    _, given = split(spell(cls, options))
    return cls.from_options(**typed(cls, given))


def split(text: str) -> tuple[str, dict[str, str]]:
    """Name, or file and name, and options, still as text."""
    name, colon, rest = _divided(text)
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
    return MethodSpec.of(name, options).build()


def typed(cls: type[Method], options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` of a method, each converted to the type of its field; unknown ones as they are."""
    types = get_type_hints(cls)
    fields = {field.name for field in dataclasses.fields(cls)}
    return {
        key: _convert(cls.name, key, value, types[key]) if key in fields else value for key, value in options.items()
    }


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


def written(cls: type[Method], options: Mapping[str, Any]) -> str:
    """``NAME:key=value,…`` for options, by type, that need not be all that the method must be given."""
    return spell(cls, ",".join(f"{key}={spell_value(value)}" for key, value in options.items()))


def describe_methods() -> list[dict[str, Any]]:
    """Facts about every method, JSON-ready: metadata, and options with their types and defaults."""
    return [describe(cls) for cls in list_methods().values()]


def describe(cls: type[Method]) -> dict[str, Any]:
    """Facts about a method; options also with their meaning, empty where nobody says it."""
    fields, types = dataclasses.fields(cls), get_type_hints(cls)
    return {
        "name": cls.name,
        "title": cls.title,
        "about": about(cls),
        "paper": cls.paper,
        "source": cls.source,
        "hook_points": list(cls.hook_points),
        "adaptive": cls.adaptive,
        "positions": next(field.default for field in fields if field.name == "positions"),
        "examples": [spell(cls, options) for options in cls.examples],
        "presets": [f"{cls.name}@{name}" for name in presets.names(cls.name)],
        "options": {
            field.name: {
                "type": _named(types[field.name]),
                "default": field.default,
                "meaning": meaning(cls, field.name),
            }
            for field in fields
        },
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
        converted = TypeAdapter(wanted).validate_python(value)
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        raise OptionError(f"{name}: {key}={value!r}: {message[0].lower()}{message[1:]}") from error
    numbers = converted if isinstance(converted, tuple) else (converted,)
    if any(isinstance(number, int) and abs(number) > LARGEST for number in numbers):
        raise OptionError(f"{name}: {key}={value!r}: expected at most {LARGEST}")
    return converted
