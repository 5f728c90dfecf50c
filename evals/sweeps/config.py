"""Configurations: YAML in, checked values out. That of sweeps, and what every one of them needs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from ...errors import OptionError, UnsupportedModelError, suggest
from ...methods import Method
from ...methods.registry import get
from ...results.store.records import TimingConfig
from ..compute import budget
from ..settings import method_spec
from ..settings.include import chosen, override, read


def _no_boolean(value: Any) -> Any:
    if method_spec.holds_boolean(value):
        raise PydanticCustomError("boolean", "Expected a number, not true or false")
    return value


Numeric = BeforeValidator(_no_boolean)
Count = Annotated[int, Field(ge=1, strict=True)]
Price = Annotated[float, Field(ge=0), Numeric]
Budget = Annotated[dict[Literal["tokens", "tflops"], Price], Field(min_length=1, max_length=1)]
Seeds = Annotated[list[Annotated[int, Numeric]], Field(min_length=1)]
Solve = Callable[[str, Mapping[str, Any], budget.Target], Method]
DENSE = budget.DENSE.name
C = TypeVar("C", bound="Config")
# How pydantic names the branches of our unions.
_BRANCHES = ("str", "MethodEntry", "constrained-int", "dict[", "list[", "[key]")


class MethodEntry(BaseModel):
    """A method of a sweep. All other keys are options of the method; those under ``grid`` are lists that expand.

    ``budget``: targets for which an option of the method is solved, see :class:`Config`; none instead of the sweep's.
    """

    model_config = ConfigDict(extra="allow")

    name: str
    label: str | None = None
    seeds: Seeds | None = None
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    budget: Budget | list[Budget] | None = None


class Config(BaseModel):
    """What every configuration says: methods on a model. Unknown keys are refused.

    ``methods``: as on the command line (``fastv:layer=2,keep=0.5``) or as a mapping, see :class:`MethodEntry`.
    ``seeds``: for methods that draw. ``parts``: the models of keys that hold mappings. ``budget``: ``tokens`` (T, the
    mean over decoder-layer inputs) or ``tflops`` (executed), or a list of such, for every method that neither has its
    own nor is given an option that decides how much it keeps; each is solved before the run, see :mod:`.budget`.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    parts: ClassVar[dict[str, type[BaseModel]]] = {}

    model: str
    methods: list[str | MethodEntry] = Field(min_length=1)
    device: str = "auto"
    dtype: str = "auto"
    attention: str = "sdpa"
    seeds: Seeds = [0]
    budget: Budget | list[Budget] | None = None


class SweepConfig(Config):
    """A sweep: methods × tasks × seeds on each model. The dense model always comes along, first.

    ``model``, or ``models`` for several, which run one after the other. ``limit``: the first so many questions of every
    task, or a number by task. ``timing``: how prefill is timed; null: not at all. ``out``: the run folder,
    ``runs/<name of the file>`` by default. ``feature_cache_gb``: memory for vision features that cells share, in GiB,
    and four times as much on disk; 0: none is kept. ``keep_features``: leave them on disk for the next sweep.
    ``references``: add random, pooling and downsample at the budgets of the other methods, once those have run.
    """

    parts = {"timing": TimingConfig}

    model: str = ""
    models: list[Annotated[str, Field(min_length=1)]] = []
    tasks: list[str] = Field(min_length=1)
    data: str = "embedded"
    limit: Count | Annotated[dict[str, Count], Field(min_length=1)] | None = None
    batch_size: Count = 8
    timing: Annotated[TimingConfig | None, Numeric] = TimingConfig()
    feature_cache_gb: Annotated[float, Numeric] = Field(default=1.0, ge=0, allow_inf_nan=False)
    keep_features: bool = False
    references: bool = False
    out: str | None = None

    @model_validator(mode="after")
    def _some_model(self) -> SweepConfig:
        if bool(self.model) == bool(self.models):
            raise ValueError("give model, or models for several")
        for name in self.models:
            if self.models.count(name) > 1:
                raise ValueError(f"models names {name!r} twice: remove one")
        return self

    @model_validator(mode="after")
    def _limited_tasks(self) -> SweepConfig:
        stray = sorted(set(self.limit) - set(self.tasks)) if isinstance(self.limit, dict) else []
        if stray:
            raise ValueError(
                f"limit names task {stray[0]!r}, which is not in the sweep; {suggest(stray[0], self.tasks)}"
            )
        return self

    def by_model(self) -> list[SweepConfig]:
        """The sweep of each model."""
        return [self.model_copy(update={"model": name, "models": []}) for name in self.models or [self.model]]

    def limit_of(self, task: str) -> int | None:
        """The limit for a task, None for all questions."""
        return self.limit.get(task) if isinstance(self.limit, dict) else self.limit


@dataclass(frozen=True)
class Variant:
    """A method with all options set, how tables call it, and the seed of the run."""

    method: Method
    label: str
    seed: int


def load_config(name: str, settings: Sequence[str] = ()) -> tuple[SweepConfig, str]:
    """Read a sweep configuration by path, or by name from those in the package; return it and its name.

    ``settings``: ``KEY=VALUE``, see :func:`~visibench.evals.settings.include.override`. Raises :class:`DataError` if
    there is none or it is not YAML, :class:`OptionError` for unknown keys and bad values.
    """
    content, path = read(name)
    content = override(content, settings, SweepConfig.model_fields)
    return parse_config(content, str(path)), path.stem


def parse_config(content: dict[str, Any], source: str) -> SweepConfig:
    """Check the values of a sweep configuration; ``source`` is named in errors."""
    return parse(SweepConfig, content, source)


def parse(kind: type[C], content: dict[str, Any], source: str) -> C:
    """Check the values of a configuration of a ``kind``."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise OptionError(f"{source}: {_first(error, kind)}") from error


@dataclass(frozen=True)
class Point:
    """A method of a sweep. With a ``target`` its ``options`` are not all: those missing are to be solved for it."""

    name: str
    options: dict[str, Any]
    target: budget.Target | None
    label: str
    seeds: list[int]

    def method(self, solve: Solve) -> Method:
        """The method with all its options."""
        return (
            solve(self.name, self.options, self.target) if self.target else method_spec.build(self.name, self.options)
        )


def nowhere(name: str, options: Mapping[str, Any], target: budget.Target) -> Method:
    """The answer to budgets where there are no questions to solve them on."""
    found = f"`visibench budget --target {target.kind}={target.value:g}` finds"
    raise OptionError(
        f"{name}: only sweeps solve budgets, on the questions of their tasks: give the options that {found}"
    )


def variants(config: Config, *, dense: bool = True, solve: Solve = nowhere) -> list[Variant]:
    """All methods of a sweep with their options and seeds, the dense model first (added if ``dense``).

    ``solve``: finds the method that meets a target; it is not asked before all else is checked.
    """
    points = [point for entry in config.methods for point in _expand(entry, config)]
    points.sort(key=lambda point: point.name != DENSE)
    if dense and points[0].name != DENSE:
        points.insert(0, Point(DENSE, {}, None, DENSE, config.seeds[:1]))
    for a, b in itertools.combinations([(point.label, seed) for point in points for seed in point.seeds], 2):
        if a == b:
            raise OptionError(f"method {a[0]!r} stands twice in the sweep: remove one, or give it another label")
    methods = _solved(points, solve)
    return [
        Variant(method_spec.seeded(method, seed), point.label, seed)
        for point, method in zip(points, methods, strict=True)
        for seed in point.seeds
    ]


def settled(config: Config) -> list[Method]:
    """The methods of all entries that wait for no budget."""
    points = (point for entry in config.methods for point in _expand(entry, config))
    return [point.method(nowhere) for point in points if point.target is None]


def _solved(points: list[Point], solve: Solve) -> list[Method]:
    """The methods of all points. Raises :class:`OptionError` with every budget that cannot be met, or is met twice."""
    methods, refused = [], []
    for point in points:
        try:
            methods.append(point.method(solve))
        except (OptionError, UnsupportedModelError) as error:
            refused.append(str(error))
    if refused:
        raise OptionError("; ".join(refused))
    for (one, method), (other, same) in itertools.combinations(zip(points, methods, strict=True), 2):
        if method == same and (one.target or other.target):
            raise OptionError(f"{one.label!r} and {other.label!r} both come to {method}: leave one of them out")
    return methods


def _expand(entry: str | MethodEntry, config: Config) -> list[Point]:
    options: dict[str, Any]
    if isinstance(entry, str):
        name, text = method_spec.split(entry)
        entry, options = MethodEntry(name=name), dict(text)
    else:
        options = entry.model_extra or {}
    both = sorted(set(options) & set(entry.grid))
    if both:
        raise OptionError(f"{entry.name}: {both[0]} stands both among the options and in the grid")
    result = []
    for values in itertools.product(*entry.grid.values()):
        point = dict(zip(entry.grid, values, strict=True))
        every = options | point
        for target in _targets(entry, every, config):
            own = _label(entry.name, every, target)
            label = entry.label or own
            if entry.label and point:
                label += " " + ",".join(f"{key}={value}" for key, value in point.items())
            seeds = _seeds(entry.name, every, entry.seeds, config.seeds)
            result.append(Point(entry.name, every, target, f"{label} {target}" if target else label, seeds))
    return result


def select(config: SweepConfig, methods: Sequence[str] = (), tasks: Sequence[str] = ()) -> SweepConfig:
    """The part of a sweep with these methods, by name or label, and these tasks; of what is empty, all.

    Each text may hold several names, separated by commas. Raises :class:`OptionError` for names that are not in it, and
    where texts hold none.
    """
    changes: dict[str, Any] = {}
    if methods:
        changes["methods"] = _only(config, methods)
    if tasks:
        wanted = chosen(tasks, config.tasks)
        _known(wanted, config.tasks, "--only-tasks", "task")
        changes["tasks"] = [task for task in config.tasks if task in wanted]
        if isinstance(config.limit, dict):
            # An empty one: no limit on what is left.
            changes["limit"] = {task: limit for task, limit in config.limit.items() if task in wanted} or None
    return config.model_copy(update=changes)


def _only(config: SweepConfig, texts: Sequence[str]) -> list[str | MethodEntry]:
    expanded = [(entry, _expand(entry, config)) for entry in config.methods]
    names = [{points[0].name, getattr(entry, "label", None) or points[0].name} for entry, points in expanded]
    known = {DENSE}.union(*names, (point.label for _, points in expanded for point in points))
    wanted = chosen(texts, known)
    _known(wanted, known, "--only", "method")
    found: list[str | MethodEntry] = []
    for (entry, points), own in zip(expanded, names, strict=True):
        found += [entry] if own.intersection(wanted) else [_alone(p) for p in points if p.label in wanted]
    return found or [DENSE]


def _alone(point: Point) -> MethodEntry:
    """The entry of one point of a grid, or of one of several budgets."""
    target = point.target
    facts: dict[str, Any] = {"name": point.name, "label": point.label, "budget": None}
    if target:
        facts |= {"label": point.label.removesuffix(f" {target}"), "budget": {target.kind: target.value}}
    if method_spec.is_seeded(get(point.name)) and "seed" not in point.options:
        facts["seeds"] = point.seeds
    return MethodEntry(**facts, **point.options)


def _known(names: Sequence[str], known: Collection[str], option: str, kind: str) -> None:
    if not names:
        raise OptionError(f"{option} names no {kind}: give at least one, or leave it out; {suggest('', known)}")
    for name in names:
        if name not in known:
            raise OptionError(f"{option} {name}: no such {kind} in the configuration; {suggest(name, known)}")


def _label(name: str, options: dict[str, Any], target: budget.Target | None) -> str:
    """How a method without a label is called: by its options, of which a target leaves some open."""
    if target is None:
        return str(method_spec.seeded(method_spec.build(name, options), 0))
    return method_spec.written(name, {key: value for key, value in options.items() if key != "seed"})


def _targets(entry: MethodEntry, options: dict[str, Any], config: Config) -> list[budget.Target | None]:
    """The budgets of a point; [None] if it has none. Raises :class:`OptionError` for one that nothing can turn."""
    own = "budget" in entry.model_fields_set
    wanted = entry.budget if own else config.budget
    if not wanted or (not own and (entry.name == DENSE or budget.fixed(entry.name, options))):
        return [None]
    budget.knobs(entry.name, options)
    wanted = wanted if isinstance(wanted, list) else [wanted]
    return [budget.Target(kind, value) for one in wanted for kind, value in one.items()]


def _seeds(name: str, options: dict[str, Any], own: list[int] | None, shared: list[int]) -> list[int]:
    if not method_spec.is_seeded(get(name)):
        if own is not None:
            raise OptionError(f"{name} draws nothing: remove its seeds")
        return shared[:1]
    if "seed" in options:
        if own is not None:
            raise OptionError(f"{name}: give seed or seeds, not both")
        return [int(options["seed"])]
    return own if own is not None else shared


def _first(error: ValidationError, kind: type[Config]) -> str:
    """The most telling complaint of pydantic in one line: of a union's branches, that of the one that went furthest."""
    complaint = max(error.errors(), key=lambda e: (e["type"] == "extra_forbidden", len(e["loc"])))
    keys = [str(part) for part in complaint["loc"] if not str(part).startswith(_BRANCHES)]
    where = ".".join(keys)
    if complaint["type"] == "value_error":
        return str(complaint["ctx"]["error"])
    if complaint["type"] == "extra_forbidden":
        known = kind.parts.get(keys[0], kind).model_fields
        return f"unknown key {where!r}; {suggest(keys[-1], known)}"
    return f"{where}: {complaint['msg'][0].lower()}{complaint['msg'][1:]}"
