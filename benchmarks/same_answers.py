"""Whether two run folders say the same, cell by cell: what a change of code must leave as it was.

    python benchmarks/same_answers.py OLD NEW

Cells are paired by their configurations' hashes. Of each pair the labels, the scores and metrics, and of every question
the columns below must be equal, figures bit by bit; times, versions and hosts may differ. Prints what differs, a line
each; exit code 1 if anything does, 2 where a folder cannot be read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

QUESTION = ["doc_id", "question_id", "image", "prompt", "target"]
ANSWER = ["output", "answer", "score", "kept", "visual_tokens", "kv_lengths", "executed_macs"]
OUTCOME = ["size", "total", "scores", "metrics", "categories", "visual_tokens", "data_hash"]


def differences(old: Path, new: Path) -> Iterator[str]:
    """What differs between the finished cells of two run folders, a line each."""
    from visibench.results.store.store import Store

    before, after = ({cell.config.digest(): cell for cell in Store(folder).cells()} for folder in (old, new))
    for folder, cells, others in ((old, before, after), (new, after, before)):
        yield from (f"{cell.path.name}: only in {folder}" for digest, cell in cells.items() if digest not in others)
    for digest in filter(after.__contains__, before):
        one, other = before[digest], after[digest]
        if one.config.label != other.config.label:
            yield f"{one.path.name}: label {one.config.label!r} and {other.config.label!r}"
        for name in OUTCOME:
            if getattr(one.metrics, name) != getattr(other.metrics, name):
                yield f"{one.path.name}: {name} {getattr(one.metrics, name)} and {getattr(other.metrics, name)}"
        for problem in questions(one.samples(), other.samples()):
            yield f"{one.path.name}: {problem}"


def questions(one: pd.DataFrame, other: pd.DataFrame) -> Iterator[str]:
    """What differs between the samples of a cell."""
    one, other = (samples.sort_values("doc_id", ignore_index=True) for samples in (one, other))
    if one["doc_id"].tolist() != other["doc_id"].tolist():
        yield "other questions"
        return
    for column in QUESTION + ANSWER:
        if (column in one) != (column in other):
            yield f"column {column!r} on one side alone"
        elif column in one:
            pairs = list(zip(one["doc_id"], one[column], other[column], strict=True))
            if differ := [pair for pair in pairs if not same(*pair[1:])]:
                doc_id, left, right = differ[0]
                yield f"{column} of {len(differ)} of {len(pairs)} questions, first {doc_id}: {left!r} and {right!r}"


def same(left: Any, right: Any) -> bool:
    """Equality of two entries: texts, numbers of which NaN equals NaN, or lists."""
    if isinstance(left, float) and isinstance(right, float):
        return left == right or (left != left and right != right)
    return bool(np.array_equal(left, right)) if isinstance(left, np.ndarray) else left == right


def main(arguments: list[str] | None = None) -> int:
    """Print what differs between two run folders; the exit code."""
    from visibench.errors import VisibenchError

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name in ("old", "new"):
        parser.add_argument(name, type=Path, help="the folder of a run or sweep")
    folders = parser.parse_args(arguments)
    try:
        lines = list(differences(folders.old, folders.new))
    except VisibenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print("\n".join(lines) or f"{folders.old} and {folders.new}: the same in every cell")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
