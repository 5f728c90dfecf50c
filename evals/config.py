"""Configurations: YAML in, checked values out. That of sweeps, and what every one of them needs."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import DataError, OptionError, suggest
from ..methods import Method
from ..results.records import TimingConfig
from . import spec

PACKAGED = Path(__file__).parent.parent / "configs"
Count = Annotated[int, Field(ge=1, strict=True)]
C = TypeVar("C", bound="Config")
_BRANCHES = ("str", "MethodEntry", "constrained-int", "dict[")  # how pydantic names the branches of our unions


class MethodEntry(BaseModel):
    """A method of a sweep. All other keys are options of the method; those under ``grid`` are lists that expand."""

    model_config = ConfigDict(extra="allow")

    name: str
    label: str | None = None
    seeds: list[int] | None = None
    grid: dict[str, list[Any]] = {}


class Config(BaseModel):
    """What every configuration says: methods on a model. Unknown keys are refused.

    ``methods``: as on the command line (``fastv:layer=2,keep=0.5``) or as a mapping, see :class:`MethodEntry`.
    ``seeds``: for methods that draw. ``parts``: the models of keys that hold mappings.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    parts: ClassVar[dict[str, type[BaseModel]]] = {}

    model: str
    methods: list[str | MethodEntry] = Field(min_length=1)
    device: str = "auto"
    dtype: str = "auto"
    attention: str = "sdpa"
    seeds: list[int] = Field(default=[0], min_length=1)


class SweepConfig(Config):
    """A sweep: methods × tasks × seeds on one model. The dense model always comes along, first.

    ``limit``: the first so many questions of every task, or a number by task. ``timing``: how prefill is timed; null:
    not at all. ``out``: the run folder, ``runs/<name of the file>`` by default.
    """

    parts = {"timing": TimingConfig}

    tasks: list[str] = Field(min_length=1)
    data: str = "embedded"
    limit: Count | dict[str, Count] | None = None
    batch_size: Count = 8
    timing: TimingConfig | None = TimingConfig()
    out: str | None = None

    def limit_of(self, task: str) -> int | None:
        """The limit for a task, None for all questions."""
        return self.limit.get(task) if isinstance(self.limit, dict) else self.limit


@dataclass(frozen=True)
class Variant:
    """A method with all options set, how tables call it, and the seed of the run."""

    method: Method
    label: str
    seed: int


def load_config(name: str) -> tuple[SweepConfig, str]:
    """Read a sweep configuration by path, or by name from those in the package; return it and its name.

    Raises :class:`DataError` if there is none or it is not YAML, :class:`OptionError` for unknown keys and bad values.
    """
    content, path = read(name)
    return parse_config(content, str(path)), path.stem


def parse_config(content: dict[str, Any], source: str) -> SweepConfig:
    """Check the values of a sweep configuration; ``source`` is named in errors."""
    return parse(SweepConfig, content, source)


def read(name: str) -> tuple[dict[str, Any], Path]:
    """Content and path of a configuration of any kind, by path or by name from those in the package."""
    packaged = {file.stem: file for file in PACKAGED.glob("*.yaml")}
    path = Path(name)
    if not path.is_file():
        if name not in packaged:
            raise DataError(
                f"no configuration {name!r}: neither a file nor one of the package; {suggest(name, packaged)}"
            )
        path = packaged[name]
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise OptionError(f"{path}: expected a mapping with model, methods and so on")
    return content, path


def parse(kind: type[C], content: dict[str, Any], source: str) -> C:
    """Check the values of a configuration of a ``kind``."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise OptionError(f"{source}: {_first(error, kind)}") from error


def variants(config: Config, *, dense: bool = True) -> list[Variant]:
    """All methods of a sweep with their options and seeds, the dense model first (added if ``dense``)."""
    found = [variant for entry in config.methods for variant in _expand(entry, config.seeds)]
    found.sort(key=lambda variant: variant.method.name != "none")
    if dense and found[0].method.name != "none":
        found.insert(0, Variant(spec.build("none", {}), "none", config.seeds[0]))
    for a, b in itertools.combinations(found, 2):
        if (a.label, a.seed) == (b.label, b.seed):
            raise OptionError(f"method {a.label!r} stands twice in the sweep: remove one, or give it another label")
    return found


def _expand(entry: str | MethodEntry, seeds: list[int]) -> list[Variant]:
    options: dict[str, Any]
    if isinstance(entry, str):
        name, text = spec.split(entry)
        entry, options = MethodEntry(name=name), dict(text)
    else:
        options = entry.model_extra or {}
    both = sorted(set(options) & set(entry.grid))
    if both:
        raise OptionError(f"{entry.name}: {both[0]} stands both among the options and in the grid")
    result = []
    for values in itertools.product(*entry.grid.values()):
        point = dict(zip(entry.grid, values, strict=True))
        method = spec.build(entry.name, options | point)
        label = entry.label or str(spec.seeded(method, 0))
        if entry.label and point:
            label += " " + ",".join(f"{key}={value}" for key, value in point.items())
        result += [
            Variant(spec.seeded(method, s), label, s) for s in _seeds(method, options | point, entry.seeds, seeds)
        ]
    return result


def _seeds(method: Method, options: dict[str, Any], own: list[int] | None, shared: list[int]) -> list[int]:
    if not spec.is_seeded(method):
        if own is not None:
            raise OptionError(f"{method.name} draws nothing: remove its seeds")
        return shared[:1]
    if "seed" in options:
        if own is not None:
            raise OptionError(f"{method.name}: give seed or seeds, not both")
        return [int(options["seed"])]
    return own if own is not None else shared


def _first(error: ValidationError, kind: type[Config]) -> str:
    """The most telling complaint of pydantic in one line: of a union's branches, that of the one that went furthest."""
    complaint = max(error.errors(), key=lambda e: (e["type"] == "extra_forbidden", len(e["loc"])))
    keys = [str(part) for part in complaint["loc"] if not str(part).startswith(_BRANCHES)]
    where = ".".join(keys)
    if complaint["type"] == "extra_forbidden":
        known = kind.parts.get(keys[0], kind).model_fields
        return f"unknown key {where!r}; {suggest(keys[-1], known)}"
    return f"{where}: {complaint['msg'][0].lower()}{complaint['msg'][1:]}"
