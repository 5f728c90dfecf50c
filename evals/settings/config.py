"""What every configuration says: methods on a model. Checked values in, methods with labels and seeds out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from ...errors import OptionError, UnsupportedModelError, suggest
from ...methods import Method
from ...results.store.records import CONTROL, Label, as_shown
from .method_spec import LARGEST, MethodSpec, Solve, holds_boolean, nowhere, seeded, split
from .target import Target


def _no_boolean(value: Any) -> Any:
    if holds_boolean(value):
        raise PydanticCustomError("boolean", "Expected a number, not true or false")
    return value


Numeric = BeforeValidator(_no_boolean)
Count = Annotated[int, Field(ge=1, le=LARGEST, strict=True)]
Price = Annotated[float, Field(ge=0), Numeric]
Budget = Annotated[dict[Literal["tokens", "tflops"], Price], Field(min_length=1, max_length=1)]
Seeds = Annotated[list[Annotated[int, Field(ge=0, le=LARGEST), Numeric]], Field(min_length=1)]
DENSE = "none"
UNCONTROLLED = (DENSE, "random")
CONTROL_SEEDS = (0, 1, 2)
C = TypeVar("C", bound="Config")
# How pydantic names the branches of our unions.
_BRANCHES = ("str", "MethodEntry", "constrained-int", "dict[", "list[", "[key]")


class MethodEntry(BaseModel):
    """A method of a sweep. All other keys are options of the method."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    name: str
    """The method, as `visibench methods` lists it, or `NAME@PRESET`."""
    path: str | None = None
    """The Python file that holds the method, where it is not registered."""
    label: Label | None = None
    """How tables call it; its text with all options otherwise."""
    seeds: Seeds | None = None
    """Instead of the sweep's."""
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    """Options with lists of values: one entry for each combination."""
    budget: Budget | list[Budget] | None = None
    """Instead of the sweep's."""
    control: bool = False
    """Also run random tokens at this method's own layers and counts, question by question, for three seeds."""


class Config(BaseModel):
    """What every configuration says: methods on a model. Unknown keys are refused.

    ``parts``: the models of keys that hold mappings.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), use_attribute_docstrings=True)
    parts: ClassVar[dict[str, type[BaseModel]]] = {}

    model: str
    """A name that `visibench models` lists, a local folder or a hub id."""
    methods: list[str | MethodEntry] = Field(min_length=1)
    """Methods, as on the command line (`fastv:layer=2,keep=0.5`) or as mappings with the keys below."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    dtype: str = "auto"
    """`auto`, `float32`, `bfloat16` or `float16`; auto: the checkpoint's on a GPU, float32 on a CPU."""
    control: bool = False
    """Add to every method *random tokens at its own layers and counts*, question by question, for three seeds."""
    attention: str = "sdpa"
    """The attention implementation of transformers."""
    quantization: Literal["4bit", "8bit"] | None = None
    """`4bit` or `8bit`: weights are packed by bitsandbytes while they are read."""
    device_map: str | dict[str, str | int] | None = None
    """Where parts of the model lie, as transformers takes it, in place of `device`; the decoder on one device."""
    compile: bool = False
    """Norms and MLPs of the decoder by torch.compile."""
    seeds: Seeds = [0]
    """Seeds of methods that draw."""
    budget: Budget | list[Budget] | None = None
    """`tokens` (T, the mean over decoder-layer inputs) or `tflops` (executed), or a list of such, for every method
    that neither has its own nor is given an option that decides how much it keeps; solved before the run."""

    @property
    def placed(self) -> dict[str, Any]:
        """How weights are packed and lie, and whether parts are compiled, where that is said; as cells keep it."""
        said = {"quantization": self.quantization, "device_map": self.device_map, "compile": self.compile or None}
        return {key: value for key, value in said.items() if value is not None}

    @property
    def loading(self) -> dict[str, Any]:
        """Arguments of :func:`visibench.load_model` beside the name."""
        where = {"device": self.device, "dtype": self.dtype, "attn_implementation": self.attention}
        return where | self.placed


@dataclass(frozen=True)
class Variant:
    """A method with all options set, how tables call it, and the seed of the run; or the ``control`` of that method."""

    method: Method
    label: str
    seed: int
    control: bool = False


def parse(kind: type[C], content: dict[str, Any], source: str) -> C:
    """Check the values of a configuration of a ``kind``."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise OptionError(f"{source}: {_first(error, kind)}") from error


def variants(config: Config, *, dense: bool = True, solve: Solve = nowhere) -> list[Variant]:
    """All methods of a configuration with their options and seeds, the dense model first (added if ``dense``).

    ``solve``: finds the method that meets a target; it is not asked before all else is checked.
    """
    every = [spec.on(config.model) for entry in config.methods for spec in expand(entry, config)]
    every.sort(key=lambda spec: spec.name != DENSE)
    if dense and every[0].name != DENSE:
        every.insert(0, replace(MethodSpec.of(DENSE, {}), label=DENSE, seeds=(config.seeds[0],)))
    for a, b in itertools.combinations([(spec.label, seed) for spec in every for seed in spec.seeds], 2):
        if a == b:
            raise OptionError(f"method {a[0]!r} stands twice in the sweep: remove one, or give it another label")
    methods = _solved(every, solve)
    return [variant for spec, method in zip(every, methods, strict=True) for variant in _with_control(spec, method)]


def _with_control(spec: MethodSpec, method: Method) -> Iterator[Variant]:
    """The variants of a method, and those of its control if it is to have one."""
    for seed in spec.seeds:
        yield Variant(seeded(method, seed), spec.label, seed)
    if spec.control:
        check_controllable(method)
        for seed in CONTROL_SEEDS:
            yield Variant(seeded(method, spec.seeds[0]), f"{CONTROL} of {spec.label}", seed, control=True)


def check_controllable(method: Method) -> None:
    """Raise :class:`OptionError` for a method whose choice random tokens cannot stand in for."""
    if method.name in UNCONTROLLED:
        what = "drops nothing" if method.name == DENSE else "keeps random tokens already"
        raise OptionError(f"{method.name} {what}: leave its control out")
    if method.holds_aside:
        raise OptionError(f"{method.name} takes up again what it held aside, it chooses none: leave its control out")


def settled(config: Config) -> list[Method]:
    """The methods of all entries that wait for no budget."""
    every = (spec for entry in config.methods for spec in expand(entry, config))
    return [spec.build() for spec in every if spec.target is None]


def _solved(every: Sequence[MethodSpec], solve: Solve) -> list[Method]:
    """The methods of all specs. Raises :class:`OptionError` with every budget that cannot be met, or is met twice."""
    methods, refused = [], []
    for spec in every:
        try:
            methods.append(spec.method(solve))
        except (OptionError, UnsupportedModelError) as error:
            refused.append(str(error))
    if refused:
        raise OptionError("; ".join(refused))
    for (one, method), (other, same) in itertools.combinations(zip(every, methods, strict=True), 2):
        if method == same and (one.target or other.target):
            raise OptionError(f"{one.label!r} and {other.label!r} both come to {method}: leave one of them out")
    return methods


def expand(written: str | MethodEntry, config: Config) -> Iterator[MethodSpec]:
    """What an entry comes to: one method, or one for each point of its grid and each budget."""
    if isinstance(written, str):
        reference, text = split(written)
        entry, options = MethodEntry(name=reference), dict[str, Any](text)
    else:
        entry, options = written, dict(written.model_extra or {})
        reference = f"{entry.path}:{entry.name}" if entry.path else entry.name
    both = sorted(set(options) & set(entry.grid))
    if both:
        raise OptionError(f"{entry.name}: {both[0]} stands both among the options and in the grid")
    for values in itertools.product(*entry.grid.values()):
        point = dict(zip(entry.grid, values, strict=True))
        spec = MethodSpec.of(reference, options | point)
        for target in _targets(entry, spec, config):
            targeted = replace(spec, target=target)
            by_options = str(targeted)  # in any case: it raises for options that cannot be
            label = entry.label or by_options
            if entry.label and point:
                label += " " + ",".join(f"{key}={value}" for key, value in point.items())
            yield replace(
                targeted,
                label=_shown(f"{label} {target}" if target else label),
                control=entry.control or (config.control and spec.name not in UNCONTROLLED),
                seeds=tuple(_seeds(spec, entry.seeds, config.seeds)),
            )


def _shown(label: str) -> str:
    try:
        return as_shown(label)
    except PydanticCustomError as error:
        raise OptionError(f"label {label!r}: {error.message()}") from error


def _targets(entry: MethodEntry, spec: MethodSpec, config: Config) -> list[Target | None]:
    """The budgets of a point; [None] if it has none. Raises :class:`OptionError` for one that nothing can turn."""
    has_its_own = "budget" in entry.model_fields_set
    wanted = entry.budget if has_its_own else config.budget
    if not wanted or (not has_its_own and (spec.name == DENSE or spec.fixed())):
        return [None]
    spec.knobs()
    wanted = wanted if isinstance(wanted, list) else [wanted]
    return [Target(kind, value) for one in wanted for kind, value in one.items()]


def _seeds(spec: MethodSpec, given: list[int] | None, shared: list[int]) -> list[int]:
    if not spec.seeded():
        if given is not None:
            raise OptionError(f"{spec.name} draws nothing: remove its seeds")
        return shared[:1]
    if "seed" in spec.options:
        if given is not None:
            raise OptionError(f"{spec.name}: give seed or seeds, not both")
        return [int(spec.options["seed"])]
    return given if given is not None else shared


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
