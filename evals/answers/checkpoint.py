"""What a model answered, kept batch by batch, so that an interrupted cell goes on where it stopped.

A checkpoint is a file of JSON lines in the cell's folder: a head that says what the answers are answers to, then a line
a batch, forced to disk before the next batch runs. A line that a crash has torn is dropped. Several processes may each
write a file of their own (``answers-0of4.jsonl`` …); readers take them all.

A batch is found again by its questions, their prompts, its way of generating and its images. Changed data, another
batch size, other weights or another version of a package never mix with what was there: such batches run again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ...results.store import disk
from ...results.store.records import CellConfig, Failure, digest, environment
from ...results.store.samples import Answer
from ...results.store.store import ANSWERS

VERSION = 2


@dataclass
class Batch:
    """Questions answered at once, in their order.

    ``asked``: hash of questions, prompts and way of generating. ``components``: executed MACs of the prefill by
    component, summed over the questions. ``seconds``: ``generate``, and ``answer`` with the preparation of inputs.
    ``reused``: images whose vision features were kept from an earlier batch, attempt or cell.
    ``smaller``: why it ran in parts, empty if it ran whole. ``hardware``: what it ran on. ``failures``: what could not
    be answered; a batch with failures is not stored.
    """

    asked: str
    records: dict[int, Answer] = field(default_factory=dict)
    components: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: {"answer": 0.0, "generate": 0.0})
    reused: int = 0
    smaller: str = ""
    hardware: str = ""
    failures: list[Failure] = field(default_factory=list)

    def join(self, part: Batch) -> None:
        """Take in a part of this batch that ran by itself."""
        self.records |= part.records
        self.failures += part.failures
        self.reused += part.reused
        self.smaller = self.smaller or part.smaller
        for sums, more in ((self.components, part.components), (self.seconds, part.seconds)):
            for key, value in more.items():
                sums[key] = sums.get(key, 0.0) + value


class KeptAnswers:
    """The batches of one cell that are answered. In memory alone unless there is a folder.

    ``bound``: what the answers depend on beside the questions (see :func:`bound_to`); files bound to something else
    count for nothing. ``shard`` (k, n) names the file that :meth:`add` writes to.
    """

    def __init__(self, folder: Path | None = None, bound: str = "", shard: tuple[int, int] = (0, 1)) -> None:
        self.batches: dict[str, Batch] = {}
        self.failures: list[Failure] = []
        self._head = (json.dumps({"version": VERSION, "bound": bound}) + "\n").encode()
        self._file: Path | None = None
        if folder is None:
            return
        for file in sorted(folder.glob(f"{ANSWERS}*.jsonl")):
            for line in disk.bound_lines(file, self._head):
                batch = _parse(line)
                if batch is not None:
                    self.batches[batch.asked] = batch
        name = ANSWERS if shard == (0, 1) else f"{ANSWERS}-{shard[0]}of{shard[1]}"
        self._file = folder / f"{name}.jsonl"
        disk.bind(self._file, self._head)

    def find(self, key: str, pixels: Callable[[int], str]) -> Batch | None:
        """The stored answers to a batch, unless its images have changed. ``pixels``: their hash by question."""
        batch = self.batches.get(key)
        if batch is None or any(record.pixels != pixels(doc_id) for doc_id, record in batch.records.items()):
            return None
        return batch

    def add(self, batch: Batch) -> None:
        """Keep a batch; after this it is on disk. Raises :class:`StorageError` if it does not fit there."""
        self.failures += batch.failures
        if batch.failures:
            return
        self.batches[batch.asked] = batch
        if self._file is not None:
            with disk.writing(self._file):
                disk.append(self._file, (json.dumps(asdict(batch)) + "\n").encode())


def bound_to(config: CellConfig, model: dict) -> str:
    """Hash of what a cell's answers depend on: its configuration, the loaded model, and versions of packages.

    ``model``: :meth:`visibench.models.LoadedModel.describe`. Hardware is left out, so that a job that moves to another
    machine keeps its answers; each batch says where it ran.
    """
    made = environment({key: value for key, value in model.items() if key not in ("hardware", "threads")})
    return digest({"cell": config.digest(), "model": made.model, "versions": made.versions})


def _parse(line: bytes) -> Batch | None:
    """A stored batch; None for a line that is damaged."""
    try:
        content = json.loads(line)
        records = {int(doc_id): Answer(**record) for doc_id, record in content.pop("records").items()}
        return Batch(records=records, **content)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
