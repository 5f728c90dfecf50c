"""Columns of what methods take: the prefill that a sweep times, and the time in which questions were answered."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..tables import MethodRow
from .column import MISSING, Column, TableEntry, TableLook, add_column

IN_TURN = (
    "cells are timed one after another, so that differences hold drift of the machine: compare by visibench profile"
)


@add_column
class PrefillColumn(Column):
    """Prefill on one batch, timed many times in a row: no fair race, since the cells of a sweep follow each other."""

    name, title, default = "prefill", "prefill\nms", "csv"
    about = "measured prefill time; cells are timed one after another, visibench profile compares methods in turn"

    @property
    def known(self) -> bool:
        return any(row.prefill for row in self.table.rows)

    def show(self, row: MethodRow) -> TableEntry:
        return TableEntry(f"{row.prefill.median:.1f}", f"± {row.prefill.iqr:.1f}") if row.prefill else MISSING

    def figures(self, row: MethodRow) -> dict[str, Any]:
        return {
            "prefill_ms_cell_after_cell_median": row.prefill.median if row.prefill else None,
            "prefill_ms_cell_after_cell_iqr": row.prefill.iqr if row.prefill else None,
        }

    def json(self, row: MethodRow) -> dict[str, Any]:
        return {"prefill_ms": asdict(row.prefill) if row.prefill else None}

    def notes(self, shown: TableLook) -> list[str]:
        timing = self.table.facts["timing"]
        if not timing:
            return []
        repeats = f"{timing['repeats']} runs a task and seed after {timing['warmup']} to warm up"
        how = f"batch {timing['batch_size']}, median ± interquartile range, {repeats}"
        return [f"Prefill: {how}; {IN_TURN}."]


@add_column
class LatencyColumn(Column):
    """The time in which the batch of a question was answered."""

    name, title, default = "latency", "latency\nms (questions)", "nowhere"
    about = "median time in which the batch of a question was answered to its last token, and of how many questions"

    def show(self, row: MethodRow) -> TableEntry:
        latency = row.latency
        return TableEntry(f"{latency.median:.1f} ({latency.questions})") if latency else MISSING

    def figures(self, row: MethodRow) -> dict[str, Any]:
        latency = row.latency
        return {
            "latency_ms_median": latency.median if latency else None,
            "latency_questions": latency.questions if latency else None,
            "latency_batch_questions_median": latency.batch if latency else None,
        }

    def json(self, row: MethodRow) -> dict[str, Any]:
        return {"latency_ms": asdict(row.latency) if row.latency else None}

    def notes(self, shown: TableLook) -> list[str]:
        """What the time of a question is, and what is not in it."""
        known = [row.latency for row in self.table.rows if row.latency]
        if not known:
            return ["Latency: not recorded by the visibench that made these cells."]
        batches = ", ".join(f"{size:g}" for size in sorted({latency.batch for latency in known}))
        reused = sum(latency.reused for latency in known)
        left_out = f"; {reused} are of cells that reused vision features, which leaves out the tower" if reused else ""
        return [
            "Latency: median over questions, their number in brackets, of the time in which the batch of a question "
            f"was answered, from inputs on the device to its last token, measured once, without warm-up{left_out}. "
            f"Questions in such a batch: {batches} (median)."
        ]
