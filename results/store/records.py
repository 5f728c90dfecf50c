"""What is stored of a cell: one method with one seed on one task.

The configuration holds all that decides the outcome and is written first; its hash names the cell. The metrics are
written last and carry that hash, the numbers with their units, and the environment they came from.
"""

from __future__ import annotations

import hashlib
import json
import platform
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer
from pydantic_core import PydanticCustomError

from ...utils import machine

CONFIG_SCHEMA: Literal[1] = 1
UNHASHED = ("label", "title", "method_file", "sources")
"""What of a cell's configuration does not count: how it is called, and where its code lay."""
CODE = ("method_file", "method_hash", "code", "sources")
"""What of a cell's configuration is about code."""
LATER_ON = (*CODE, "protocol", "control", "placed", "title")
"""What is left out where it is empty, as in cells of early versions, so that their hashes stay."""
LONGEST_NAME = 500
LONGEST_PART = 90
"""Bytes of a task's and of a method's name in the name of a cell's folder, which file systems cut at 255."""
METRICS_SCHEMA: Literal[2] = 2
PACKAGES = ("visibench", "torch", "torchvision", "transformers", "lmms-eval", "datasets", "pillow", "numpy")


class Record(BaseModel):
    """Base of all records: unknown keys are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), ser_json_inf_nan="strings")

    def hashed(self, *, without: str) -> str:
        """Hash of all but one key as they stand in the file, so that a file can be checked without knowing its keys."""
        return digest(json.loads(self.model_dump_json(exclude={without})))


def as_shown(text: str) -> str:
    """The name, if it can be shown; :class:`PydanticCustomError` otherwise."""
    if not text.strip() or not text.isprintable() or len(text) > LONGEST_NAME:
        raise PydanticCustomError(
            "name", f"Expected a name of 1 to {LONGEST_NAME} characters, none of which controls a terminal"
        )
    return text


Label = Annotated[str, AfterValidator(as_shown)]
"""A name that tables, pages and pictures show."""


MOST_PREFILLS = 100_000
"""That are timed; more is a slip of the pen, and would never end."""


class TimingConfig(Record):
    """How prefill is timed: on ``batch_size`` questions of a task, the first ones.

    With an adaptive method, where what it sees decides how many tokens stay, those in the middle by executed compute.
    """

    model_config = ConfigDict(use_attribute_docstrings=True)

    batch_size: int = Field(default=1, ge=1)
    """Questions in the batch that is timed."""
    warmup: int = Field(default=3, ge=0, le=MOST_PREFILLS)
    """Prefills before the first that counts."""
    repeats: int = Field(default=20, ge=1, le=MOST_PREFILLS)
    """Prefills that are timed."""


CONTROL = "control"
"""What the method of a control's row is called."""


class CellConfig(Record):
    """All that decides the outcome of a cell. ``label`` is how tables call the method, ``title`` how it
    is called in print; neither counts.

    ``checkpoint``: hash of a local checkpoint's files, empty for one from the hub. ``options``: every hyperparameter of
    the method. ``origin``: ``embedded``, ``hub``, or the folder of the data. ``timing`` None: prefill is not timed.
    ``method_file``, ``method_hash``: the file of a method that is not registered, and the hash of its content, which
    alone counts; for others both are empty. ``code``: versions and hashes of the code that decides the numbers, under
    ``method``, ``task`` (definition and prompts), ``engine``, and ``data`` where these lie in files of the user's;
    ``sources``: the module or file of method and task, and where the data lie.
    ``protocol``: what a protocol other than ``hf`` says (:meth:`visibench.models.protocols.Protocol.record`).
    ``placed``: ``quantization``, ``device_map`` and ``compile``, where they were given. ``control``: random tokens at
    the layers and counts of the method. All eight are left out of what is stored where they are empty.
    """

    schemas: ClassVar[tuple[int, ...]] = (CONFIG_SCHEMA,)

    schema_version: Literal[1] = CONFIG_SCHEMA
    model: str
    checkpoint: str = ""
    device: str = "auto"
    dtype: str = "auto"
    attention: str = "sdpa"
    method: str
    options: dict[str, Any]
    label: Label
    seed: int = 0
    task: str
    origin: str = "embedded"
    limit: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=8, ge=1)
    timing: TimingConfig | None = TimingConfig()
    protocol: dict[str, Any] = {}
    placed: dict[str, Any] = {}
    method_file: str = ""
    method_hash: str = ""
    code: dict[str, str] = {}
    sources: dict[str, str] = {}
    control: bool = False
    title: str = ""

    @model_serializer(mode="wrap")
    def _as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = handler(self)
        return {key: value for key, value in content.items() if value or key not in LATER_ON}

    @property
    def role(self) -> str:
        """The method, or that this is a control of it: what stands in one row of a table, and what apart."""
        return CONTROL if self.control else self.method

    @property
    def reference(self) -> str:
        """How the method is found again: by its name, or in its file."""
        return f"{self.method_file}:{self.method}" if self.method_file else self.method

    def digest(self) -> str:
        """Hash of everything but :data:`UNHASHED`, 16 hex digits."""
        return digest(json.loads(self.model_dump_json(exclude=set(UNHASHED))))

    def asked(self) -> str:
        """Hash of the same without the code, which cells have in common that differ in nothing else."""
        return self.model_copy(update={"code": {}, "method_hash": ""}).digest()

    @property
    def folder(self) -> str:
        """Name of the cell's folder: readable, and unique through the hash."""
        task, method = (text.encode()[:LONGEST_PART].decode(errors="ignore") for text in (self.task, self.method))
        return f"{task}-{method}-s{self.seed}-{self.digest()[:8]}"


class ScoreRecord(Record):
    """A headline metric in lmms-eval's units; ``maximum`` None where it is not known."""

    key: str
    title: str
    value: float
    maximum: float | None


class VisualTokens(Record):
    """Visual tokens really there, mean over questions: in the prompt, and at the input of each decoder layer."""

    prompt: float
    per_layer: list[float]

    @property
    def mean(self) -> float:
        """T: mean over decoder-layer inputs."""
        return sum(self.per_layer) / len(self.per_layer)

    @property
    def last(self) -> float:
        """At the input of the last layer: after the last cut."""
        return self.per_layer[-1]


class Compute(Record):
    """Executed multiply-adds (MACs, the papers' FLOPs) of one prefill.

    ``macs``, ``macs_sd``, ``components``: of each question alone, mean (and standard deviation) over questions.
    ``batch_macs``: mean over questions of the column ``batch_macs`` (:class:`~visibench.results.store.samples.Answer`):
    all that the batches executed, rows padded to the longest of their batch, divided by the questions. It is at least
    ``macs``, and depends on the batch size and on which questions came together. None in files of early versions, and
    where some answers came from one.
    """

    macs: float
    macs_sd: float
    components: dict[str, float]
    batch_macs: float | None = None


class PrefillTime(Record):
    """Measured prefill times in milliseconds, after warm-up, synchronised.

    ``doc_ids``: the questions of the batch that was timed; None in files of early versions, which timed the first ones.
    """

    times_ms: list[float]
    warmup: int
    batch_size: int
    device: str
    doc_ids: list[int] | None = None


class Failure(Record):
    """What went wrong with a question; ``doc_id`` None: with the cell as a whole.

    ``error`` in one line, ``traceback`` as Python prints it; empty where no exception was raised. ``attempt`` is the
    same in all failures of one attempt at a cell, and in no other; empty in files of early versions.
    """

    doc_id: int | None
    error: str
    traceback: str
    attempt: str = ""


class Environment(Record):
    """Where the numbers were made: facts about the loaded model, package versions, the machine.

    ``host`` and ``code`` (:mod:`visibench.utils.machine`) tell where and by which commit, and keep no results apart:
    what of a machine can change a number is in ``model`` and ``machine``.
    """

    model: dict[str, Any]
    versions: dict[str, str]
    machine: dict[str, Any]
    host: dict[str, Any] = {}
    code: dict[str, Any] = {}


class Outcome(Record):
    """What one method did on one task: all of :class:`CellMetrics` that its answers give.

    ``size`` questions of ``total`` were asked; ``note`` says if that differs from the limit. ``scores``: the task's
    headline metrics. ``metrics`` are lmms-eval's by its own keys; ``categories`` the mean per-question score by
    category, for tasks that have categories. ``generation``: how answers were generated. ``seconds``: wall times,
    ``answer`` for preparing inputs and generating, ``generate`` for generating alone, ``total`` with lmms-eval's
    scoring. ``remarks``: what a reader must know of this cell beside the numbers. ``nonfinite``: questions for which
    some step gave logits that are NaN or infinite. ``reused_images``: images whose vision features were kept from an
    earlier batch, attempt or cell: ``seconds`` and latency leave out that work, ``compute`` and prefill times do not.
    It is history of the run, as times are: it depends on what the process ran before, and differs after a restart.
    ``data_hash`` covers the questions, targets and pixels used.
    """

    size: int
    total: int
    note: str = ""
    remarks: list[str] = []
    nonfinite: int = 0
    reused_images: int = 0
    scores: list[ScoreRecord]
    metrics: dict[str, float]
    categories: dict[str, float] = {}
    visual_tokens: VisualTokens
    compute: Compute
    generation: dict[str, Any]
    seconds: dict[str, float]
    data_hash: str


class CellMetrics(Outcome):
    """The outcome of a cell as it is stored.

    ``config_hash`` ties it to its configuration. ``samples_hash`` covers the file of samples, ``checksum`` all the rest
    of this record; both are empty in files of early versions. Schema 1 is read too: its samples lack latency and dense
    agreement, which are null then.
    """

    schemas: ClassVar[tuple[int, ...]] = (1, METRICS_SCHEMA)

    schema_version: Literal[1, 2] = METRICS_SCHEMA
    config_hash: str
    prefill: PrefillTime | None = None
    environment: Environment
    samples_hash: str = ""
    checksum: str = ""

    def sealed(self, samples_hash: str) -> CellMetrics:
        """This record with the hash of its samples and its own."""
        record = self.model_copy(update={"samples_hash": samples_hash})
        return record.model_copy(update={"checksum": record.hashed(without="checksum")})


def environment(model: dict[str, Any]) -> Environment:
    """This machine and its packages, with the facts ``model`` about the loaded model."""
    versions = {name: machine.version(name) for name in PACKAGES}
    return Environment(
        model={key: value for key, value in model.items() if key != "versions"},
        versions={name: version for name, version in versions.items() if version is not None},
        machine={"python": platform.python_version(), "system": platform.system(), "architecture": platform.machine()},
        host=machine.host(),
        code=machine.code(),
    )


def digest(value: Any) -> str:
    """Hash of a JSON value, 16 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
