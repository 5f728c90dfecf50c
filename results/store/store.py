"""The run folder: one sub-folder a cell, its configuration written first, its metrics last and atomically.

<root>/sweep.yaml                                            what was asked of the run, written before its first cell
<root>/cells/<task>-<method>-s<seed>-<hash>/config.json      what was asked
                                            samples.parquet  one row a question
                                            metrics.json     the outcome; its presence means done
                                            answers*.jsonl   until then: the batches answered so far
                                            failures.jsonl   what failed in its last run; such a cell is not done
                                            lock             held by the process that works on the cell
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import pyarrow as pa
from filelock import SoftFileLease, Timeout
from pydantic import ValidationError

from ...errors import DataError, StorageError
from . import code, columns, disk
from .records import UNHASHED, CellConfig, CellMetrics, Failure, Record, digest

CONFIG, SAMPLES, METRICS = "config.json", "samples.parquet", "metrics.json"
ANSWERS, FAILURES, LOCK = "answers", "failures.jsonl", "lock"
DONE = CONFIG, SAMPLES, METRICS
NULLABLE = {"batch_questions": "Int64", "dense_agreement": "boolean"}
"""Types of pandas for columns that may hold nothing at all; otherwise it takes their nulls for floats or objects."""
LEASE = 60.0
"""Seconds without a sign of life after which a claim of another machine is taken over."""
AnyRecord = TypeVar("AnyRecord", CellConfig, CellMetrics)


@dataclass(frozen=True)
class Cell:
    """A finished cell, read back."""

    path: Path
    config: CellConfig
    metrics: CellMetrics
    here: code.Here = field(default_factory=code.Here, compare=False, repr=False)

    @cached_property
    def other_code(self) -> list[str]:
        """What of ``method``, ``task``, ``data`` and ``engine`` has changed since, as far as can be told here."""
        return self.here.changed(self.config.code, self.config.sources)

    def table(self, *names: str) -> pa.Table:
        """Those of the columns ``names`` that the samples have, a row a question.

        Raises :class:`DataError` unless they are whole, and those that the metrics were made of.
        """
        return columns.read(self.path / SAMPLES, self.metrics.samples_hash, self.metrics.size, names)

    def samples(self) -> pd.DataFrame:
        """A row a question; see :class:`~visibench.results.store.samples.Sample` for the columns.

        Raises :class:`DataError` as :meth:`table`.
        """
        table = columns.read(self.path / SAMPLES, self.metrics.samples_hash, self.metrics.size)
        samples: pd.DataFrame = table.to_pandas()
        empty = {name: kind for name, kind in NULLABLE.items() if table[name].null_count == len(table)}
        return samples.astype(empty)


class Store:
    """A run folder on disk."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self._leases: dict[Path, SoftFileLease] = {}  # they remember how long others' claims have been untouched
        self._untouched: dict[Path, tuple[Any, float]] = {}  # the same of claims that are no leases: state, since when

    def path(self, config: CellConfig) -> Path:
        """Where the cell lies or will lie."""
        return self.root / "cells" / config.folder

    def done(self, config: CellConfig) -> Cell | None:
        """The finished cell of this configuration, or None if it has yet to run, in part or in whole.

        What a crash has left behind in it goes, and the claim of a process that is dead.
        """
        cell = self.find(config)
        if cell:
            with _where_allowed():
                self._relabel(config)
                with disk.writing(cell.path):
                    self.tidy(config, f"{ANSWERS}*.jsonl", FAILURES)
                if (cell.path / LOCK).exists():
                    with self.claim(config):
                        pass  # taking and leaving it removes it; a living process's stays
        return cell

    def _relabel(self, config: CellConfig) -> None:
        file = self.path(config) / CONFIG
        with suppress(DataError):
            if _read(file, CellConfig)[0] == config:
                return
        with disk.writing(file):
            _write(file, config)

    def find(self, config: CellConfig) -> Cell | None:
        """The same, with nothing written."""
        path = self.path(config)
        try:
            metrics = _metrics(path)
            cell = Cell(path, config, metrics)
            cell.table()
        except DataError:
            return None
        return cell if metrics.config_hash == config.digest() else None

    def begin(self, config: CellConfig) -> Path:
        """Make the cell's folder and write its configuration; leftovers go, but for the answers given so far."""
        path = self.path(config)
        with disk.writing(path):
            disk.make(path)
            for name in (METRICS, SAMPLES, FAILURES):
                (path / name).unlink(missing_ok=True)
            self.tidy(config)
            _write(path / CONFIG, config)
        return path

    def finish(self, config: CellConfig, samples: pd.DataFrame, metrics: CellMetrics) -> Cell:
        """Write samples, then metrics; after this, and only then, the cell is done."""
        path = self.path(config)
        with disk.writing(path):
            with disk.whole(path / SAMPLES) as partial:
                samples.to_parquet(partial, index=False)
                metrics = metrics.sealed(columns.hash_of(partial.read_bytes()))
            _write(path / METRICS, metrics)
            self.tidy(config, f"{ANSWERS}*.jsonl")
        return Cell(path, config, metrics)

    def take(self, config: CellConfig, files: Mapping[str, bytes]) -> None:
        """Write files of a cell that were made elsewhere, the metrics last."""
        path = self.path(config)
        with disk.writing(path):
            disk.make(path)
            for name in sorted(files, key=lambda name: name == METRICS):
                with disk.whole(path / name) as partial:
                    partial.write_bytes(files[name])
            if METRICS in files:
                self.tidy(config, f"{ANSWERS}*.jsonl", FAILURES)

    def fail(self, config: CellConfig, failures: Sequence[Failure]) -> Path:
        """Write what went wrong in a cell, which stays unfinished; the file is removed when it begins again."""
        file, attempt = self.path(config) / FAILURES, {"attempt": secrets.token_hex(8)}
        with disk.writing(file):
            disk.make(file.parent)
            disk.write(file, "".join(one.model_copy(update=attempt).model_dump_json() + "\n" for one in failures))
        return file

    def failures(self, config: CellConfig, *, but: str | None = None) -> list[Failure]:
        """What went wrong in a cell, unless that is the attempt ``but`` (see :meth:`attempt`)."""
        file = self.path(config) / FAILURES
        try:
            found = [Failure.model_validate_json(line) for line in disk.read(file).decode().splitlines()]
        except (OSError, ValueError):
            return []
        return [failure for failure in found if failure.attempt != but]

    def attempt(self, config: CellConfig) -> str | None:
        """Names the failed attempt at a cell that is written down; None if there is none."""
        failed = self.failures(config)
        return failed[0].attempt if failed else None

    def tidy(self, config: CellConfig, *patterns: str) -> None:
        """Remove what crashed writers have left in a cell's folder, and what else has one of these names."""
        for pattern in (f"*{disk.PARTIAL}", *patterns):
            for file in self.path(config).glob(pattern):
                file.unlink(missing_ok=True)

    @contextmanager
    def claim(self, config: CellConfig, *, wait: float = 0) -> Iterator[bool]:
        """Within: whether this process alone works on the cell; if not, another one has for ``wait`` seconds.

        The claim is a file that is there or not, so it holds on every file system that several machines share. Its
        process touches it now and then; it ends with that process, at once for others of the same machine. On other
        machines it ends where nobody has touched it for :data:`LEASE` seconds by the clock of who waits.
        """
        path = self.path(config)
        with disk.writing(path), ExitStack() as held:
            disk.make(path)
            lock, mine = self._leases.setdefault(path, SoftFileLease(path / LOCK, lease_duration=LEASE)), False
            try:
                held.enter_context(lock.acquire(timeout=wait))
                mine = True
            except Timeout:
                self._end_if_untouched(path / LOCK)
            release = held.pop_all()
        with release:
            yield mine

    def _end_if_untouched(self, lock: Path) -> None:
        """Take a claim away that nobody has touched for twice :data:`LEASE`, whatever stands in it.

        Leases end by themselves. An empty file, which a power cut leaves, and a claim of an early version never do.
        """
        with suppress(OSError):
            found = os.lstat(lock)
            state, now = (found.st_ino, found.st_mtime_ns, found.st_ctime_ns), time.monotonic()
            before, since = self._untouched.get(lock, (None, now))
            self._untouched[lock] = state, since if before == state else now
            if before != state or now - since < 2 * LEASE:
                return
            aside = lock.with_name(f"{LOCK}.{secrets.token_hex(6)}{disk.PARTIAL}")
            os.rename(lock, aside)
            if os.lstat(aside).st_ino != found.st_ino:  # another process was faster, and has claimed the cell
                os.link(aside, lock)
            aside.unlink()

    def save(self, name: str, text: str) -> None:
        """Write a file of the run as a whole, such as its configuration or a table, unless it says the same already."""
        file = self.root / name
        with suppress(OSError):
            if disk.read(file) == text.encode():
                return
        with disk.writing(self.root):
            disk.make(self.root)
            disk.write(file, text)
            disk.sweep_up(self.root, file.stat().st_mtime)

    def cells(self) -> list[Cell]:
        """All finished cells. Raises :class:`DataError` if there are none, or one is damaged."""
        here = code.Here()
        cells = [_open(folder, here) for folder, files in self._folders() if METRICS in files]
        if not cells:
            raise DataError(f"no finished results in {str(self.root)!r}{self._hint()}")
        paths: dict[str, Path] = {}
        for cell in cells:
            other = paths.setdefault(cell.metrics.config_hash, cell.path)
            if other != cell.path:
                raise DataError(f"{other} and {cell.path} hold the same cell twice: delete the copy")
        return cells

    def usable(self) -> list[Cell]:
        """All finished cells that can be read, possibly none."""
        cells, here = [], code.Here()
        for folder, files in self._folders() if os.path.isdir(self.root) else []:
            with suppress(DataError):
                cells += [_open(folder, here)] if METRICS in files else []
        return cells

    def superseded(self, configs: Iterable[CellConfig]) -> list[tuple[CellConfig, CellConfig]]:
        """Of cells that have yet to run, those that are done by other code, each with the latter."""
        done: dict[str, CellConfig] = {}
        for folder, files in self._folders() if os.path.isdir(self.root) else []:
            with suppress(DataError):
                config = _read(folder / CONFIG, CellConfig)[0] if METRICS in files else None
                done |= {config.asked(): config} if config else {}
        return [(config, done[config.asked()]) for config in configs if config.asked() in done]

    def unfinished(self) -> list[Path]:
        """The folders of cells that were begun and are not done, and are not done by changed code either."""
        folders = self._folders()
        begun = [folder for folder, files in folders if METRICS not in files]
        done = {_asked(folder) for folder, files in folders if METRICS in files} if begun else set()
        return [folder for folder in begun if (_asked(folder) or folder) not in done]

    def _folders(self) -> list[tuple[Path, list[str]]]:
        """The cells' folders with the names of their files."""
        if not os.path.isdir(self.root):
            what = "is a file" if os.path.exists(self.root) else "does not exist"
            raise DataError(f"no folder {str(self.root)!r} (it {what}): give the folder of a run or sweep")
        cells = self.root / "cells"
        return [(cells / name, _names(cells / name)) for name in _names(cells) if (cells / name).is_dir()]

    def _hint(self) -> str:
        inner = sorted(folder for folder in _names(self.root) if (self.root / folder / "cells").is_dir())
        if inner:
            return f": did you mean {str(self.root / inner[0])!r}?"
        begun = len(self.unfinished())
        if begun:
            return f": {begun} cells were begun and none is done; run the same command again to finish them"
        why = "it is empty" if not _names(self.root) else "this is not the folder of a run"
        return f" ({why}): run a sweep with --out {self.root} first, or give another folder"


def _asked(folder: Path) -> str:
    """What a cell is, whatever its code; empty where that cannot be read."""
    try:
        return _read(folder / CONFIG, CellConfig)[0].asked()
    except DataError:
        return ""


@contextmanager
def _where_allowed() -> Iterator[None]:
    """Within: what may not be written, as on a mount for reading alone, stays as it is."""
    try:
        yield
    except StorageError as error:
        if getattr(error.__cause__, "errno", None) not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise


def _open(path: Path, here: code.Here) -> Cell:
    config, config_facts = _read(path / CONFIG, CellConfig)
    metrics = _metrics(path)
    counted = {key: value for key, value in config_facts.items() if key not in UNHASHED}
    if metrics.config_hash != digest(counted):
        raise DataError(f"{path / CONFIG} was changed after its run: restore it, or delete {path} and run again")
    return Cell(path, config, metrics, here)


def _metrics(path: Path) -> CellMetrics:
    """The outcome of a cell. Raises :class:`DataError` if it was changed after its run."""
    metrics, facts = _read(path / METRICS, CellMetrics)
    checksum = facts.pop("checksum", None)
    if checksum is not None and checksum != digest(facts):
        raise DataError(f"{path / METRICS} was changed after its run: restore it, or delete {path} and run again")
    return metrics


def _names(folder: Path) -> list[str]:
    """What a folder holds, sorted; nothing if there is no such folder."""
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"cannot read {folder} ({error.strerror or error}): fix that, or give another run") from error


def _read(file: Path, kind: type[AnyRecord]) -> tuple[AnyRecord, dict[str, Any]]:
    """A record, and the JSON object that it was read from."""
    remedy = columns.remedy(file)
    try:
        text = disk.read(file).decode()
        content = json.loads(text)
    except OSError as error:
        raise columns.unreadable(file, error) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is damaged (no whole JSON file): {remedy}") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version not in kind.schemas:
        known = " and ".join(map(str, kind.schemas))
        raise DataError(
            f"{file} has schema version {version}, this visibench knows {known}: read it with the visibench that "
            "wrote it, or run again into another folder (--out)"
        )
    try:
        return kind.model_validate_json(text), content
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"{file} is damaged ({where}: {first['msg']}): {remedy}") from error


def _write(file: Path, record: Record) -> None:
    disk.write(file, record.model_dump_json(indent=1) + "\n")
