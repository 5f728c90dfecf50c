"""The samples of a cell, read back: the columns that somebody asks for, out of one Parquet file that is checked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

from ...errors import DataError
from ...utils.bounded_cache import BoundedCache
from . import disk

KEPT = 2**29
"""Bytes of samples that stay in memory once they are read: tables and reports ask for them again and again."""
_tables: BoundedCache[pa.Table] = BoundedCache(lambda table: int(table.get_total_buffer_size()), KEPT)
_files: BoundedCache[bytes] = BoundedCache(len, KEPT // 8)  # as they lie on disk, for columns that are asked for later
Kind = Callable[[pa.DataType], bool]


def _number(kind: pa.DataType) -> bool:
    return types.is_floating(kind) or types.is_integer(kind) or types.is_boolean(kind)


def _text(kind: pa.DataType) -> bool:
    return types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind)


# Columns that statistics need, and what they hold: numbers, or text, which may be nothing at all.
KINDS: dict[str, Kind] = {
    "doc_id": types.is_integer,
    "question_id": _text,
    "image": _text,
    "category": _text,
    "prompt": _text,
    "target": _text,
    "answer": _text,
    "score": _number,
}
# Columns that early cells lack, with the type in which they hold nulls.
LATER: dict[str, tuple[pa.DataType, Kind]] = {
    "latency_ms": (pa.float64(), types.is_floating),
    "batch_questions": (pa.int64(), types.is_integer),
    "batch_macs": (pa.float64(), types.is_floating),
    "dense_agreement": (pa.bool_(), types.is_boolean),
}


def read(file: Path, samples_hash: str, size: int, columns: Sequence[str] | None = None) -> pa.Table:
    """Those of ``columns`` that the file has (None: all), and of :data:`LATER` also those that it lacks.

    A file is read and checked once as long as it stays as it is, and all that is read fits into memory. Raises
    :class:`DataError` unless it is whole, has ``size`` questions, and is the one that ``samples_hash`` was made of.
    """
    try:
        state = file.stat()
    except OSError as error:
        raise unreadable(file, error) from error
    wanted = None if columns is None else tuple(columns)
    which = (file, samples_hash, state.st_ino, state.st_size, state.st_mtime_ns)

    def checked() -> pa.Table:
        return _checked(file, _files.get(which, lambda: _intact(file, samples_hash)), samples_hash, size, wanted)

    return _tables.get((which, size, wanted), checked)


def _intact(file: Path, samples_hash: str) -> bytes:
    try:
        content = disk.read(file)
    except OSError as error:
        raise unreadable(file, error) from error
    if samples_hash and samples_hash != hash_of(content):
        raise DataError(f"{file} is damaged, or was changed after its run (its hash differs): {remedy(file)}")
    return content


def _checked(file: Path, content: bytes, samples_hash: str, size: int, columns: Sequence[str] | None) -> pa.Table:
    try:
        parquet = pq.ParquetFile(pa.BufferReader(content))
        schema, rows = parquet.schema_arrow, parquet.metadata.num_rows
        kinds = {field.name: field.type for field in schema}
        wanted = None if columns is None or not samples_hash else [name for name in columns if name in kinds]
        table = parquet.read(columns=wanted, use_threads=False)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{file} is damaged (no whole Parquet file): {remedy(file)}") from error
    if rows != size:
        raise DataError(f"{file} holds {rows} questions, but its metrics {size}: {remedy(file)}")
    _check(file, kinds, table)
    for name, (kind, _) in LATER.items():
        if name not in kinds and (columns is None or name in columns):
            table = table.append_column(name, pa.nulls(rows, kind))
    have = {*table.column_names}
    return table if columns is None else table.select([name for name in columns if name in have])


def _check(file: Path, kinds: Mapping[str, pa.DataType], table: pa.Table) -> None:
    """Raise :class:`DataError` unless the columns that are needed are there, and hold what they should."""
    have = {*table.column_names}
    for name, holds in (KINDS | {name: holds for name, (_, holds) in LATER.items()}).items():
        kind = kinds.get(name)
        if kind is None:
            if name in KINDS:
                raise DataError(f"{file} has no column {name!r}: {remedy(file)}")
            continue
        exact = name in KINDS and holds is not _text and not types.is_floating(kind)  # null is NaN, and no whole number
        if not holds(kind) or (exact and name in have and table[name].null_count):
            what = "text" if holds is _text else "numbers"
            raise DataError(f"{file} holds no {what} in column {name!r}: {remedy(file)}")


def remedy(file: Path) -> str:
    """What to do about a file of a cell that cannot be used."""
    return f"delete {file.parent} and run again"


def unreadable(file: Path, error: OSError) -> DataError:
    """A file of a cell that cannot be read."""
    return DataError(f"cannot read {file} ({error.strerror or error}): {remedy(file)}")


def hash_of(content: bytes) -> str:
    """What metrics know of the file of samples."""
    return hashlib.sha256(content).hexdigest()[:16]
