"""Tasks: lmms-eval's own definitions and scorers, on the embedded data, a local folder, or the hub; and one's own.

``data`` says where the questions come from:

- ``embedded``: the synthetic data sets for ``gqa``, ``mme``, ``textvqa_val`` and ``pope``; any other task comes from
  the hub.
- ``hub``: the data set that lmms-eval names.
- a folder: laid out like the hub, one sub-folder a data set (``MME``, ``POPE``, ``textvqa``, ``GQA`` …) of parquet
  files, or as written by ``save_to_disk`` (then ``GQA_images`` and ``GQA_instructions`` for GQA).
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import (
    FOREIGN,
    DataError,
    InputError,
    OptionError,
    StorageError,
    VisibenchError,
    boundary,
    disk_full,
    reason,
)
from ...models.protocols import HF, Protocol
from ...utils import sources
from ...utils.bounded_cache import GIB, BoundedCache
from .definitions import BUILDERS, Definition, find
from .hub import hub_or_cache
from .known import TASKS, TaskInfo, TaskMetric
from .scorers import reference_in

if TYPE_CHECKING:
    from PIL.Image import Image

EMBEDDED, HUB = "embedded", "hub"
MME_CATEGORY_MAXIMUM = 200.0
PARTS = ("", "_images", "_instructions")
"""How the folders of a data set are called behind its name; GQA's may be two."""


@dataclass(frozen=True)
class Task:
    """A loaded task. ``origin``: ``embedded``, ``hub`` or the local file or folder. ``harness``: lmms-eval's object.

    ``own``: facts about questions of one's own. ``lenient``: an answer in which a reference stands counts as that one.
    ``kept``: bytes of decoded images that stay in memory at most.
    """

    name: str
    origin: str
    harness: Any
    own: TaskInfo | None = None
    lenient: bool = False
    kept: int = GIB

    @property
    def info(self) -> TaskInfo:
        """Facts about the task; for one outside the table, its first metric is the headline."""
        info = self._info
        if not self.lenient:
            return info
        return replace(info, metrics=tuple(replace(one, title=f"{one.title}, lenient") for one in info.metrics))

    def taken(self, doc_id: int, answer: str) -> str:
        """What of an answer is scored."""
        if not self.lenient:
            return answer
        doc, column = self.docs[doc_id], self.info.target
        target = doc[column] if column else self.harness.doc_to_target(doc)
        return reference_in(answer, [str(one) for one in (target if isinstance(target, list) else [target])])

    @property
    def _info(self) -> TaskInfo:
        if self.own:
            return self.own
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
        return self.text(doc_id), self.images(doc_id)

    def text(self, doc_id: int) -> str:
        """Prompt of a question, before the model's chat template."""
        return self.harness.fewshot_context(self.docs[doc_id], 0)

    @cached_property
    def _album(self) -> BoundedCache[list[Image]]:
        return BoundedCache(_bytes, self.kept)

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
    from ...models.inputs import undecoded

    try:
        images = look()
    except (VisibenchError, MemoryError):
        raise
    except AttributeError:  # the stock code calls a method of an image that is None
        images = []
    except FOREIGN as error:
        why = undecoded(error)
        raise DataError(
            f"{task}: the image of question {doc_id} cannot be decoded ({why}): repair or remove it"
        ) from error
    if not images:
        raise InputError(
            f"{task}: question {doc_id} has no image, so there is nothing to prune: "
            "choose a task whose questions all have one"
        )
    if any(not hasattr(image, "convert") for image in images):
        raise InputError(f"{task}: question {doc_id} comes with something else than images: choose an image task")
    return images


def load_tasks(
    entries: Sequence[str], data: str = EMBEDDED, include_path: str = "", protocol: Protocol = HF
) -> list[Task]:
    """Load tasks by what :func:`~visibench.evals.tasks.definitions.find` takes. All are found before data are read.

    ``protocol`` says how prompts end, how long answers may be and how they are taken.
    Raises :class:`UnknownNameError`, :class:`OptionError` (a task that does not generate answers to image questions)
    and :class:`DataError` (data that are missing, damaged, or cannot be downloaded).
    """
    loaded = [_load(one, origin_of(one, data)) for one in defined(entries, data, include_path)]
    return [_asked_by(protocol, task) for task in loaded]


def _asked_by(protocol: Protocol, task: Task) -> Task:
    """The task under a protocol; lmms-eval's own object is changed, which is this task's alone."""
    harness = task.harness
    if protocol.suffix is not None and harness.lmms_eval_specific_kwargs:
        harness.lmms_eval_specific_kwargs = {**harness.lmms_eval_specific_kwargs, "post_prompt": protocol.suffix}
    if protocol.max_new_tokens is not None:
        harness.config.generation_kwargs["max_new_tokens"] = protocol.max_new_tokens
    return replace(task, lenient=protocol.scoring == "lenient")


def defined(entries: Sequence[str], data: str = EMBEDDED, include_path: str = "") -> list[Definition]:
    """What defines each of these tasks; names and data are checked, nothing is read."""
    if not entries:
        raise OptionError("no tasks given: name at least one, e.g. --tasks gqa,pope")
    check_data(data)
    found = [find(entry, include_path) for entry in entries]
    doubled = [name for name, count in Counter(one.name for one in found).items() if count > 1]
    if doubled:
        raise OptionError(f"task {doubled[0]!r} is given twice")
    return found


def check_data(data: str) -> None:
    """Raise :class:`DataError` unless ``data`` is ``embedded``, ``hub`` or an existing folder."""
    if data not in (EMBEDDED, HUB) and not os.path.isdir(data):
        raise DataError(f"no data folder {data!r}: give 'embedded', 'hub' or a folder laid out like the hub")


def origin_of(definition: Definition, data: str) -> str:
    """Where ``data`` says that a task's questions come from: ``embedded``, ``hub``, or an absolute file or folder."""
    if definition.own or definition.on_disk:
        return str(definition.file)
    if data == HUB or (data == EMBEDDED and not (definition.stock and definition.name in TASKS)):
        return HUB
    return EMBEDDED if data == EMBEDDED else str(Path(data).resolve())


def data_of(definition: Definition, origin: str) -> str:
    """The files and folders on this disk that hold a task's questions, as patterns, one a line.

    None for embedded data, for the hub's, and for questions of one's own, which are the task itself.
    """
    if definition.own or origin in (EMBEDDED, HUB):
        return ""
    named = [glob.escape(definition.dataset)]
    if not definition.on_disk:
        named = [glob.escape(f"{origin}/{Path(definition.dataset).name}{part}") for part in PARTS]
    elif definition.dataset in BUILDERS:
        named = sources.said_in(definition.file, "data_files", "data_dir")
    return "\n".join(os.path.abspath(one) for one in named if one)


def _load(definition: Definition, origin: str) -> Task:
    from . import lmms_eval

    name = definition.name
    if definition.own:
        from . import own

        with lmms_eval.quiet():
            harness, scorer = own.load(definition)
        metrics = (TaskMetric(scorer.key, scorer.title),)
        return Task(name, origin, harness, TaskInfo(name, name, "questions of one's own", metrics, "image", "answers"))
    with boundary(f"cannot read task {name!r} in {definition.file}", DataError):
        config = dict(lmms_eval.load_yaml_config(str(definition.file), mode="full"))
    if config.get("output_type", "generate_until") != "generate_until" or "class" in config:
        raise OptionError(
            f"task {name!r} is not of lmms-eval's plain kind generate_until, the only one that can run here"
        )
    config.pop("group", None)
    try:
        with lmms_eval.quiet(), hub_or_cache() if origin == HUB else nullcontext():
            if not definition.on_disk:
                _place(config, name, origin)
            return Task(name, origin, lmms_eval.Decoding(config=config))
    except DataError:
        raise
    except FOREIGN as error:  # whatever datasets, the hub client or Pillow raise
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

    from .lmms_eval import with_images

    return with_images(datasets.load_dataset(path, name))


def _load_from_disk(folder: Path) -> Any:
    import datasets

    from .lmms_eval import with_images

    if not folder.is_dir():
        raise DataError(f"task 'gqa': no folder {folder.name!r} in {folder.parent}")
    return with_images(datasets.load_from_disk(str(folder)))


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
