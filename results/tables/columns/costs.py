"""Columns of what methods cost in tokens and multiply-adds."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..tables import MethodRow, ResultTable
from .column import MISSING, Column, TableEntry, TableLook, add_column

_UNITS = ((1e12, "TFLOPs"), (1e9, "GFLOPs"), (1e6, "MFLOPs"))
TERA = 1e-12


def compute_unit(table: ResultTable) -> tuple[float, str]:
    """The unit in which this table's compute reads well: its size in MACs, and its name."""
    most = max(row.macs for row in table.rows)
    return next(((unit, name) for unit, name in _UNITS if most >= unit / 10), _UNITS[-1])


class _TokensColumn(Column):
    def notes(self, shown: TableLook) -> list[str]:
        prompt = f"{self.table.rows[0].tokens.prompt:g} in the prompt"
        last = "" if shown.brief else " and at the last layer's,"
        return [f"Visual tokens: T = mean over decoder-layer inputs,{last} of {prompt}."]


@add_column
class MeanTokensColumn(_TokensColumn):
    """T: visual tokens averaged over decoder-layer inputs."""

    name, title, brief = "tokens", "visual\ntokens T", True
    about = "T: visual tokens, mean over decoder-layer inputs"

    def show(self, row: MethodRow) -> TableEntry:
        spread = row.evidence.spread
        return TableEntry(f"{row.tokens.mean:.1f}", sd=f"{spread.tokens:.1f}" if spread else "")

    def figures(self, row: MethodRow) -> dict[str, Any]:
        spread = row.evidence.spread
        return {
            "visual_tokens_mean_over_layers": row.tokens.mean,
            "visual_tokens_mean_over_layers_sd_over_questions": spread.tokens if spread else None,
        }

    def json(self, row: MethodRow) -> dict[str, Any]:
        spread = row.evidence.spread
        return {
            "visual_tokens": row.tokens.model_dump() | {"mean": row.tokens.mean, "last": row.tokens.last},
            "sd_over_questions": asdict(spread) if spread else None,
        }

    def notes(self, shown: TableLook) -> list[str]:
        return [*super().notes(shown), *_over_questions(self.table)[: not shown.brief]]


@add_column
class LastTokensColumn(_TokensColumn):
    """Visual tokens behind the last cut."""

    name, title = "last", "at the\nlast layer"
    about = "visual tokens at the input of the last decoder layer"

    def show(self, row: MethodRow) -> TableEntry:
        return TableEntry(f"{row.tokens.last:.1f}")

    def figures(self, row: MethodRow) -> dict[str, Any]:
        return {"visual_tokens_at_last_layer": row.tokens.last}

    def json(self, row: MethodRow) -> dict[str, Any]:
        return {}  # beside the mean


@add_column
class ComputeColumn(Column):
    """Multiply-adds of a prefill, each question alone."""

    name, brief = "compute", True
    about = "multiply-adds that the prefill of each question alone executes"

    @property
    def title(self) -> str:
        return f"compute\nalone, {compute_unit(self.table)[1]}"

    def show(self, row: MethodRow) -> TableEntry:
        (unit, _), spread = compute_unit(self.table), row.evidence.spread
        return TableEntry(f"{row.macs / unit:#.3g}", sd=f"{spread.macs / unit:#.2g}" if spread else "")

    def figures(self, row: MethodRow) -> dict[str, Any]:
        spread = row.evidence.spread
        return {
            "executed_tmacs_question_alone": row.macs * TERA,
            "executed_tmacs_question_alone_sd_over_questions": spread.macs * TERA if spread else None,
        }

    def json(self, row: MethodRow) -> dict[str, Any]:
        return {
            "executed_macs": row.macs,
            "executed_tflops": row.macs * TERA,
            "executed_macs_by_component": row.components,
        }

    def notes(self, shown: TableLook) -> list[str]:
        alone = "all that a prefill of each question alone executes, mean over questions"
        return [
            f"FLOPs: one multiply-add = 1. Compute alone: {alone}.",
            *_over_questions(self.table)[: not shown.brief],
        ]


@add_column
class BatchComputeColumn(Column):
    """Multiply-adds of the batches that were run, shared out among their questions."""

    name = "batch_compute"
    about = "multiply-adds that the prefills of whole batches executed, padding included, for each question"

    @property
    def known(self) -> bool:
        return any(row.batch_macs is not None for row in self.table.rows)

    @property
    def title(self) -> str:
        return f"compute\nin batch, {compute_unit(self.table)[1]}"

    def show(self, row: MethodRow) -> TableEntry:
        unit, _ = compute_unit(self.table)
        return MISSING if row.batch_macs is None else TableEntry(f"{row.batch_macs / unit:#.3g}")

    def figures(self, row: MethodRow) -> dict[str, Any]:
        return {"executed_tmacs_in_batch": None if row.batch_macs is None else row.batch_macs * TERA}

    def json(self, row: MethodRow) -> dict[str, Any]:
        return {"batch_executed_macs": row.batch_macs}

    def notes(self, shown: TableLook) -> list[str]:
        size = self.table.facts["batch_size"]
        return [
            f"Compute in batch: what the prefills of batches of {size} executed, divided by their questions: with "
            "what rows were padded to the longest of their batch, so it depends on which questions came together."
        ]


def _over_questions(table: ResultTable) -> list[str]:
    said = "standard deviation over the questions of a task, where a method adapts to them"
    return [f"sd of visual tokens and compute: {said}."] * any(row.evidence.spread for row in table.rows)
