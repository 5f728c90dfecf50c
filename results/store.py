"""The run folder: one sub-folder a cell, its configuration written first, its metrics last and atomically.

<root>/cells/<task>-<method>-s<seed>-<hash>/config.json      what was asked
                                            samples.parquet  one row a question
                                            metrics.json     the outcome; its presence means done
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pandas as pd
from pydantic import ValidationError

from ..errors import DataError
from .records import CellConfig, CellMetrics, Record

CONFIG, SAMPLES, METRICS = "config.json", "samples.parquet", "metrics.json"
AnyRecord = TypeVar("AnyRecord", bound=Record)


@dataclass(frozen=True)
class Cell:
    """A finished cell, read back."""

    path: Path
    config: CellConfig
    metrics: CellMetrics

    def samples(self) -> pd.DataFrame:
        """One row a question; see :func:`visibench.evals.lmms.evaluate` for the columns."""
        try:
            return pd.read_parquet(self.path / SAMPLES)
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read {self.path / SAMPLES}: delete {self.path} and run again") from error


class Store:
    """A run folder on disk."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    def path(self, config: CellConfig) -> Path:
        """Where the cell lies or will lie."""
        return self.root / "cells" / config.folder

    def done(self, config: CellConfig) -> Cell | None:
        """The finished cell of this configuration, or None if it has yet to run, in part or in whole."""
        path = self.path(config)
        try:
            metrics = _read(path / METRICS, CellMetrics)
        except DataError:
            return None
        if metrics.config_hash != config.digest() or not (path / SAMPLES).exists():
            return None
        _write(path / CONFIG, config)  # the label may be a new one
        return Cell(path, config, metrics)

    def begin(self, config: CellConfig) -> Path:
        """Make the cell's folder and write its configuration; leftovers of an interrupted run go."""
        path = self.path(config)
        with _writing(path):
            path.mkdir(parents=True, exist_ok=True)
            (path / METRICS).unlink(missing_ok=True)
            (path / SAMPLES).unlink(missing_ok=True)
            _write(path / CONFIG, config)
        return path

    def finish(self, config: CellConfig, samples: pd.DataFrame, metrics: CellMetrics) -> Cell:
        """Write samples, then metrics; after this, and only then, the cell is done."""
        path = self.path(config)
        partial = _partial(path / SAMPLES)
        with _writing(path):
            samples.to_parquet(partial, index=False)
            _publish(partial, path / SAMPLES)
            _write(path / METRICS, metrics)
        return Cell(path, config, metrics)

    def save(self, name: str, text: str) -> None:
        """Write a file of the run as a whole, such as its configuration or a table."""
        with _writing(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            (self.root / name).write_text(text, encoding="utf-8")

    def cells(self) -> list[Cell]:
        """All finished cells. Raises :class:`DataError` if there are none, or one is damaged."""
        if not self.root.is_dir():
            raise DataError(f"no folder {str(self.root)!r}: give the folder of a run or sweep")
        found = [_open(file.parent) for file in sorted(self.root.glob(f"cells/*/{METRICS}"))]
        if not found:
            inner = sorted(str(folder.parent) for folder in self.root.glob("*/cells"))
            hint = f"did you mean {inner[0]!r}?" if inner else f"run a sweep with --out {self.root} first"
            raise DataError(f"no finished results in {str(self.root)!r}: {hint}")
        return found


def _open(path: Path) -> Cell:
    config, metrics = _read(path / CONFIG, CellConfig), _read(path / METRICS, CellMetrics)
    if metrics.config_hash != config.digest():
        raise DataError(f"{path / CONFIG} was changed after its run: restore it, or delete {path} and run again")
    return Cell(path, config, metrics)


def _read(file: Path, kind: type[AnyRecord]) -> AnyRecord:
    try:
        return kind.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {file}: delete its folder and run again") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "JSON"
        complaint = f"{file} is damaged or of another version ({where}: {first['msg']})"
        raise DataError(f"{complaint}: delete its folder and run again") from error


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot write to {path} ({error.strerror or error}): make room, or choose another --out"
        ) from error


def _write(file: Path, record: Record) -> None:
    _partial(file).write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
    _publish(_partial(file), file)


def _partial(file: Path) -> Path:
    return file.with_name(file.name + ".partial")


def _publish(partial: Path, file: Path) -> None:
    """Put a written file in its place so that what stands there is always complete, also after a power cut."""
    with partial.open("rb+") as stream:
        os.fsync(stream.fileno())
    os.replace(partial, file)
