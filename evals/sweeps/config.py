"""Configurations of sweeps: YAML in, checked values out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from ...errors import OptionError, suggest
from ...models.protocols import Protocol, find
from ...results.store.records import TimingConfig
from ...utils.bounded_cache import GIB
from ..settings.config import DENSE, Config, Count, MethodEntry, Numeric, expand, parse
from ..settings.include import chosen, override, read
from ..settings.method_spec import MethodSpec
from ..tasks.definitions import called


class SweepConfig(Config):
    """A sweep: methods × tasks × seeds on each model. The dense model always comes along, first."""

    parts: ClassVar = {"timing": TimingConfig}

    model: str = ""
    """A name that `visibench models` lists, a local folder or a hub id."""
    models: list[Annotated[str, Field(min_length=1)]] = Field(default=[])
    """Several instead of `model`; they run one after the other."""
    weights: Literal["pretrained", "meta"] = "pretrained"
    """`meta`: sizes alone, for `--dry-run`; then `model` may be a name that `visibench models` knows by its sizes."""
    tasks: list[str] = Field(min_length=1)
    """Names that `visibench tasks` lists, any `generate_until` task of lmms-eval, or files of your own questions."""
    data: str = "embedded"
    """Where the questions come from: `embedded`, `hub`, or a folder laid out as the hub's data sets."""
    include_path: str = ""
    """A folder of task YAMLs as lmms-eval reads them, whose tasks have names too."""
    protocol: str | dict[str, Any] = "hf"
    """How the model is asked: `hf` (as the checkpoint says), `llava-1.5`, `free-form`, FILE.yaml:NAME, or its keys."""
    min_pixels: Count | None = None
    """Fewest pixels of an image, for processors that keep its size (Qwen-VL); a protocol may say it as well."""
    max_pixels: Count | None = None
    """Most pixels of an image, for the same."""
    limit: Count | Annotated[dict[str, Count], Field(min_length=1)] | None = None
    """The first so many questions of every task, or a number by task."""
    batch_size: Count = 8
    """Questions in a batch."""
    timing: Annotated[TimingConfig | None, Numeric] = TimingConfig()
    """How prefill is timed, with the keys below; null: not at all."""
    feature_cache_gb: Annotated[float, Numeric] = Field(default=1.0, ge=0, allow_inf_nan=False)
    """GiB of memory for vision features that cells share, as much for images, as much for inputs; 0: none is kept."""
    keep_features: bool = False
    """Leave vision features on disk for the next sweep."""
    references: bool = False
    """Add random, pooling and downsample at the budgets of the other methods, once those have run."""
    out: str | None = None
    """The run folder, `runs/<name of the file>` by default."""

    @property
    def kept(self) -> int:
        """Bytes that stay in memory at most: of vision features, of a task's decoded images, of processed inputs."""
        return int(self.feature_cache_gb * GIB)

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
        names = [called(task) for task in self.tasks]
        stray = sorted(set(self.limit) - set(names)) if isinstance(self.limit, dict) else []
        if stray:
            raise ValueError(f"limit names task {stray[0]!r}, which is not in the sweep; {suggest(stray[0], names)}")
        return self

    @property
    def asked(self) -> Protocol:
        """How the model is asked."""
        limits = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        return find(self.protocol).model_copy(update={key: pixels for key, pixels in limits.items() if pixels})

    def by_model(self) -> list[SweepConfig]:
        """The sweep of each model."""
        return [self.model_copy(update={"model": name, "models": []}) for name in self.models or [self.model]]

    def limit_of(self, task: str) -> int | None:
        """The limit for a task, None for all questions."""
        return self.limit.get(task) if isinstance(self.limit, dict) else self.limit


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


def select(config: SweepConfig, methods: Sequence[str] = (), tasks: Sequence[str] = ()) -> SweepConfig:
    """The part of a sweep with these methods, by name or label, and these tasks; of what is empty, all.

    Each text may hold several names, separated by commas. Raises :class:`OptionError` for names that are not in it, and
    where texts hold none.
    """
    changes: dict[str, Any] = {}
    if methods:
        changes["methods"] = _only(config, methods)
    if tasks:
        names = [called(task) for task in config.tasks]
        wanted = chosen(tasks, names)
        _known(wanted, names, "--only-tasks", "task")
        changes["tasks"] = [task for task in config.tasks if called(task) in wanted]
        if isinstance(config.limit, dict):
            # An empty one: no limit on what is left.
            changes["limit"] = {task: limit for task, limit in config.limit.items() if task in wanted} or None
    return config.model_copy(update=changes)


def _only(config: SweepConfig, texts: Sequence[str]) -> list[str | MethodEntry]:
    expanded = [(entry, list(expand(entry, config))) for entry in config.methods]
    names = [{specs[0].name, _written(entry) or specs[0].name} for entry, specs in expanded]
    known = {DENSE}.union(*names, (spec.label for _, specs in expanded for spec in specs))
    wanted = chosen(texts, known)
    _known(wanted, known, "--only", "method")
    kept: list[str | MethodEntry] = []
    for (entry, specs), known_as in zip(expanded, names, strict=True):
        kept += [entry] if known_as.intersection(wanted) else [_alone(spec) for spec in specs if spec.label in wanted]
    return kept or [DENSE]


def _written(entry: str | MethodEntry) -> str | None:
    """What the configuration calls an entry: all of its text, or its label."""
    return entry if isinstance(entry, str) else entry.label


def _alone(spec: MethodSpec) -> MethodEntry:
    """The entry of one point of a grid, or of one of several budgets."""
    target = spec.target
    facts: dict[str, Any] = {"name": spec.reference, "label": spec.label, "budget": None}
    if target:
        facts |= {"label": spec.label.removesuffix(f" {target}"), "budget": {target.kind: target.value}}
    if spec.control:
        facts["control"] = True
    if spec.seeded() and "seed" not in spec.options:
        facts["seeds"] = list(spec.seeds)
    return MethodEntry(**facts, **spec.given)


def _known(names: Sequence[str], known: Collection[str], option: str, kind: str) -> None:
    if not names:
        raise OptionError(f"{option} names no {kind}: give at least one, or leave it out; {suggest('', known)}")
    for name in names:
        if name not in known:
            raise OptionError(f"{option} {name}: no such {kind} in the configuration; {suggest(name, known)}")
