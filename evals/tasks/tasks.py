"""Tasks: lmms-eval's own definitions and scorers, on the embedded data, a local folder, or the hub.

``data`` says where the questions come from:

- ``embedded``: the synthetic data sets for ``gqa``, ``mme``, ``textvqa_val`` and ``pope``; any other task comes from
  the hub.
- ``hub``: the data set that lmms-eval names.
- a folder: laid out like the hub, one sub-folder a data set (``MME``, ``POPE``, ``textvqa``, ``GQA`` …) of parquet
  files, or as written by ``save_to_disk`` (then ``GQA_images`` and ``GQA_instructions`` for GQA).
"""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import DataError, InputError, OptionError, StorageError, UnknownNameError, disk_full, suggest
from ...utils.bounded_cache import BoundedCache
from .hub import hub_or_cache

if TYPE_CHECKING:
    from PIL.Image import Image

EMBEDDED, HUB = "embedded", "hub"
MME_CATEGORY_MAXIMUM = 200.0


@dataclass(frozen=True)
class TaskMetric:
    """One of lmms-eval's metrics, by its key there, as tables show it. ``maximum`` None: not known beforehand."""

    key: str
    title: str
    maximum: float | None = 1.0


@dataclass(frozen=True)
class TaskInfo:
    """Facts about a task. The first metric is its headline.

    ``cluster`` is the column that names the image, ``target`` the one with the reference answers where lmms-eval's own
    notion of a target is a placeholder.
    """

    name: str
    title: str
    about: str
    metrics: tuple[TaskMetric, ...]
    cluster: str | None = None
    target: str | None = None


TASKS = {
    info.name: info
    for info in (
        TaskInfo(
            "gqa",
            "GQA",
            "compositional questions about a scene",
            (TaskMetric("exact_match", "exact match"),),
            "imageId",
        ),
        TaskInfo(
            "mme",
            "MME",
            "two yes/no questions an image; the score counts single answers and whole pairs, 200 a category",
            (TaskMetric("mme_perception_score", "perception", None),),
            "question_id",
        ),
        TaskInfo(
            "textvqa_val",
            "TextVQA",
            "reading words in an image, ten reference answers a question",
            (TaskMetric("exact_match", "VQA accuracy"),),
            "image_id",
            "answers",
        ),
        TaskInfo(
            "pope",
            "POPE",
            "is an object there? absent ones are random, popular or adversarial",
            (TaskMetric("pope_f1_score", "F1"), TaskMetric("pope_accuracy", "accuracy")),
            "image_source",
        ),
    )
}


@dataclass(frozen=True)
class Task:
    """A loaded task. ``origin`` is ``embedded``, ``hub`` or the local folder; ``harness`` is lmms-eval's object."""

    name: str
    origin: str
    harness: Any

    @property
    def info(self) -> TaskInfo:
        """Facts about the task; for one outside the table, its first metric is the headline."""
        if self.name in TASKS:
            return TASKS[self.name]
        first = next(iter(self.harness.aggregation()))
        maximum = 1.0 if first in ("exact_match", "acc", "accuracy", "anls") else None
        return TaskInfo(self.name, self.name, "lmms-eval task", (TaskMetric(first, first, maximum),))

    @cached_property
    def docs(self) -> Any:
        """The questions without their images."""
        return self.harness.eval_docs_no_media

    def question(self, doc_id: int) -> tuple[str, list[Image]]:
        """Prompt and images of a question, before the model's chat template."""
        return self.harness.fewshot_context(self.docs[doc_id], 0), self.images(doc_id)

    @cached_property
    def _album(self) -> BoundedCache[list[Image]]:
        return BoundedCache(_bytes)

    def images(self, doc_id: int) -> list[Image]:
        """The decoded images of a question, not to be changed; see :func:`decoded`."""
        return self._album.get(
            doc_id,
            lambda: decoded(self.name, doc_id, lambda: self.harness.doc_to_visual(self.harness.task_docs[doc_id])),
        )

    def size(self, limit: int | None) -> tuple[int, str]:
        """How many questions a limit means, and a note where that differs from what was asked.

        MME scores pairs of questions, so a limit is raised to the next place where all pairs are whole.
        """
        total = len(self.docs)
        if limit is not None and limit < 1:
            raise OptionError(f"limit must be a whole number of at least 1, not {limit}")
        wanted = total if limit is None else min(limit, total)
        if self.name != "mme":
            return wanted, ""
        size = _whole_pairs(self.docs, wanted)
        return size, f"limit {wanted} raised to {size}: MME scores pairs of questions" if size != wanted else ""


def _bytes(images: list[Image]) -> int:
    return sum(image.width * image.height * len(image.getbands()) for image in images)


def decoded(task: str, doc_id: int, look: Callable[[], list[Image]]) -> list[Image]:
    """The images that ``look`` finds for a question.

    Raises :class:`DataError` where they cannot be decoded and :class:`InputError` where there are none.
    """
    try:
        images = look()
    except DataError:
        raise
    except AttributeError:  # the stock code calls a method of an image that is None
        images = []
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises on damaged files
        raise DataError(
            f"{task}: the image of question {doc_id} cannot be decoded ({error}): repair or remove it"
        ) from error
    if not images:
        raise InputError(
            f"{task}: question {doc_id} has no image, so there is nothing to prune: "
            "choose a task whose questions all have one"
        )
    if any(not hasattr(image, "convert") for image in images):
        raise InputError(f"{task}: question {doc_id} comes with something else than images: choose an image task")
    return images


def load_tasks(names: Sequence[str], data: str = EMBEDDED) -> list[Task]:
    """Load tasks by name. All names are checked before any data is read.

    Raises :class:`UnknownNameError`, :class:`OptionError` (a task that does not generate answers to image questions)
    and :class:`DataError` (data that are missing, damaged, or cannot be downloaded).
    """
    if not names:
        raise OptionError("no tasks given: name at least one, e.g. --tasks gqa,pope")
    doubled = [name for name, count in Counter(names).items() if count > 1]
    if doubled:
        raise OptionError(f"task {doubled[0]!r} is given twice")
    check_data(data)
    files = {name: definition(name) for name in names}
    return [_load(name, file, origin_of(name, data)) for name, file in files.items()]


def origins(names: Iterable[str], data: str) -> dict[str, str]:
    """Where the questions of each of these tasks come from, see :func:`origin_of`; names and data are checked."""
    check_data(data)
    for name in names:
        definition(name)
    return {name: origin_of(name, data) for name in names}


def check_data(data: str) -> None:
    """Raise :class:`DataError` unless ``data`` is ``embedded``, ``hub`` or an existing folder."""
    if data not in (EMBEDDED, HUB) and not Path(data).is_dir():
        raise DataError(f"no data folder {data!r}: give 'embedded', 'hub' or a folder laid out like the hub")


def definition(name: str) -> Path:
    """The YAML file that defines an lmms-eval task. Does not import lmms-eval, whose own index takes seconds."""
    stock = _stock()
    if name not in stock:
        hint = suggest(name, TASKS) + ", and lmms-eval's tasks by name"
        close = suggest(name, stock).partition("Known:")[0]
        raise UnknownNameError(f"unknown task {name!r}; {hint if hint.startswith('did') else close + hint}")
    kind, file = stock[name]
    if kind != "task":
        raise OptionError(f"{name!r} is a {kind} of tasks ({file.parent.name}/{file.name}): name its tasks instead")
    return file


def place_of(name: str) -> str:
    """Where a task is defined, for :func:`visibench.results.store.code.of_task`."""
    file = definition(name)
    return str(file.relative_to(_folder())) if file.is_relative_to(_folder()) else str(file)


def _folder() -> Path:
    """Where lmms-eval's own tasks are defined."""
    spec = importlib.util.find_spec("lmms_eval")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("lmms-eval is not installed: pip install 'lmms-eval>=0.7.3,<0.8'")
    return Path(spec.submodule_search_locations[0]) / "tasks"


@cache
def _stock() -> dict[str, tuple[str, Path]]:
    """lmms-eval's tasks, groups and tags: name → (kind, file)."""
    stock: dict[str, tuple[str, Path]] = {}
    entry = re.compile(r"""^["']?(task|group|tag)["']? *: *["']?([\w.+-]+)["']?\s*?(?:#.*)?$""", re.MULTILINE)
    for file in sorted(_folder().rglob("*.yaml")):
        entries = entry.findall(file.read_text(encoding="utf-8-sig"))
        for kind, name in entries:
            if kind == "task" or name not in stock:
                stock[name] = (kind, file)
    return stock


def origin_of(name: str, data: str) -> str:
    """Where ``data`` says that the questions of a task come from: ``embedded``, ``hub``, or an absolute folder."""
    if data == HUB or (data == EMBEDDED and name not in TASKS):
        return HUB
    return EMBEDDED if data == EMBEDDED else str(Path(data).resolve())


def _load(name: str, file: Path, origin: str) -> Task:
    from . import lmms_eval

    config = lmms_eval.load_yaml_config(str(file), mode="full")
    if config.get("output_type", "generate_until") != "generate_until" or "class" in config:
        raise OptionError(
            f"task {name!r} is not of lmms-eval's plain kind generate_until, the only one that can run here"
        )
    config.pop("group", None)
    try:
        with lmms_eval.quiet(), hub_or_cache() if origin == HUB else nullcontext():
            _place(config, name, origin)
            return Task(name, origin, lmms_eval.ConfigurableTask(config=config))
    except DataError:
        raise
    except Exception as error:  # whatever datasets, the hub client or Pillow raise
        if disk_full(error):
            place = "VISIBENCH_CACHE" if origin == EMBEDDED else "HF_HOME"
            raise StorageError(
                f"no room left on the disk for the data of task {name!r} ({reason(error)}): make room, or set {place} "
                "to a folder on another disk"
            ) from error
        mend = "check the network, or give a local copy with --data DIR" if origin == HUB else "repair or replace it"
        raise DataError(f"cannot load task {name!r} from {_described(origin)} ({reason(error)}): {mend}") from error


def _place(config: dict[str, Any], name: str, origin: str) -> None:
    """Point lmms-eval's configuration of a task at our data."""
    repo = Path(config["dataset_path"]).name
    options = dict(config.get("dataset_kwargs") or {})
    # Stock tasks insist on a Hugging Face login even for public data; without the option one is used if there.
    options.pop("token", None)
    config["dataset_kwargs"] = options
    if origin == HUB:
        path = config["dataset_path"]
        if name == "gqa":
            _join_gqa(config, lambda: _load_dataset(path, "testdev_balanced_images"))
        return
    root = _embedded_root() if origin == EMBEDDED else Path(origin)
    if name == "gqa" and (root / "GQA_instructions").is_dir():
        config["dataset_path"] = str(root / "GQA_instructions")
        options["load_from_disk"] = True
        _join_gqa(config, lambda: _load_from_disk(root / "GQA_images"))
        return
    folder = root / repo
    if not folder.is_dir():
        raise DataError(f"task {name!r}: no folder {repo!r} in {root}; see `visibench run --help` for the layout")
    config["dataset_path"] = str(folder)
    if (folder / "dataset_dict.json").exists():
        options["load_from_disk"] = True
    if name == "gqa":
        _join_gqa(config, lambda: _load_dataset(str(folder), "testdev_balanced_images"))


def _join_gqa(config: dict[str, Any], open_images: Callable[[], Any]) -> None:
    """Look GQA's images up when asked; lmms-eval instead writes a copy of its image for every question."""
    images = open_images()["testdev"]
    row = {name: i for i, name in enumerate(images["id"])}

    def gqa_image(doc: dict[str, Any]) -> list[Image]:
        if doc["imageId"] not in row:
            raise DataError(
                f"gqa: question {doc['id']} asks about image {doc['imageId']!r}, which is not in the image set"
            )
        return [images[row[doc["imageId"]]]["image"].convert("RGB")]

    config["process_docs"] = None
    config["doc_to_visual"] = gqa_image


def _load_dataset(path: str, name: str) -> Any:
    import datasets

    return datasets.load_dataset(path, name)


def _load_from_disk(folder: Path) -> Any:
    import datasets

    if not folder.is_dir():
        raise DataError(f"task 'gqa': no folder {folder.name!r} in {folder.parent}")
    return datasets.load_from_disk(str(folder))


def _embedded_root() -> Path:
    from ... import synthetic

    return Path(synthetic.ensure())


def _whole_pairs(docs: Any, wanted: int) -> int:
    """The first size of at least ``wanted`` at which each (category, question_id) has been seen twice or not at all."""
    open_pairs: set[tuple[str, str]] = set()
    for seen, key in enumerate(zip(docs["category"], docs["question_id"], strict=True), start=1):
        open_pairs ^= {key}
        if seen >= wanted and not open_pairs:
            return seen
    category, question = sorted(open_pairs)[0]
    raise DataError(
        f"mme: question {question!r} of category {category!r} is not there twice: complete or remove the pair"
    )


def _described(origin: str) -> str:
    return {EMBEDDED: "the embedded data", HUB: "the Hugging Face hub"}.get(origin, origin)


def reason(error: BaseException) -> str:
    """One line that says why: the root of a chain of exceptions, and of tenacity's retries."""
    last = getattr(error, "last_attempt", None)
    if last is not None and last.exception() is not None:
        return reason(last.exception())
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
