"""What goes to Weights & Biases: configuration and numbers of a cell, and the tables and figures of a sweep."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ...errors import DataError
from ...results.statistics.inference import DENSE
from ...results.store.store import Cell
from ...results.tables.columns import columns
from ...results.tables.tables import MethodRow, ResultTable, build
from ..question_image import numbered

GIGA = 1e-9
SHOWN = ["doc_id", "question_id", "category", "prompt", "target", "output", "answer", "score"]


def dense_of(cell: Cell, cells: Iterable[Cell]) -> list[Cell]:
    """The dense model's cells on the same questions."""
    if cell.config.method == DENSE:
        return []
    wanted = (cell.config.task, cell.metrics.data_hash)
    return [c for c in cells if c.config.method == DENSE and (c.config.task, c.metrics.data_hash) == wanted]


def row_of(cell: Cell, dense: Sequence[Cell]) -> MethodRow:
    """The cell as a row of a table of its own, beside those of the ``dense`` cells that it can be compared with."""
    identity = (cell.config.label, cell.config.role)
    return next(row for table in build([cell, *dense]) for row in table.rows if (row.label, row.method) == identity)


def config_of(cell: Cell) -> dict[str, Any]:
    """The whole configuration, and the environment."""
    return cell.config.model_dump(mode="json") | {
        "config_hash": cell.metrics.config_hash,
        "data_hash": cell.metrics.data_hash,
        "questions": cell.metrics.size,
        "questions_of": cell.metrics.total,
        "generation": cell.metrics.generation,
        "environment": cell.metrics.environment.model_dump(mode="json"),
    }


def names(cells: list[Cell]) -> dict[str, list[str]]:
    return {f"{name}s": sorted({getattr(cell.config, name) for cell in cells}) for name in ("model", "task", "method")}


def summary(cell: Cell, dense: Sequence[Cell]) -> dict[str, Any]:
    """The cell's numbers by the names they have in W&B; units stand in the names, scores are in lmms-eval's.

    ``TASK/METRIC`` with ``…/ci_low`` and ``…/ci_high`` (95 %, clustered by image), ``score_percent`` (the headline as
    a share of its maximum), ``retained_percent``, ``loyalty_percent``, ``visual_tokens/…``, ``compute/…gflops`` (one
    multiply-add = 1; of each question alone, ``in_batch`` of the batches that were run), ``kv_cache/entries`` (mean
    over decoder layers), ``prefill_ms/…``, ``seconds/…``.
    """
    task, row = cell.config.task, row_of(cell, dense)
    numbers: dict[str, Any] = {}
    for score in cell.metrics.scores:
        numbers[f"{task}/{score.key}"] = score.value
        interval = row.evidence.scores.get(task, {}).get(score.key)
        if interval:
            numbers |= {f"{task}/{score.key}/ci_low": interval.low, f"{task}/{score.key}/ci_high": interval.high}
    headline = cell.metrics.scores[0]
    if headline.maximum:
        numbers["score_percent"] = 100 * headline.value / headline.maximum
    if row.retained:
        numbers["retained_percent"] = row.retained.mean
    if row.evidence.loyalty_mean:
        numbers["loyalty_percent"] = 100 * row.evidence.loyalty_mean.value
    tokens = cell.metrics.visual_tokens
    numbers |= {
        "visual_tokens/prompt": tokens.prompt,
        "visual_tokens/T": tokens.mean,
        "visual_tokens/last": tokens.last,
    }
    numbers["compute/gflops"] = cell.metrics.compute.macs * GIGA
    numbers["compute/tflops"] = cell.metrics.compute.macs * 1e-12
    if cell.metrics.compute.batch_macs is not None:
        numbers["compute/in_batch_gflops"] = cell.metrics.compute.batch_macs * GIGA
    numbers |= {f"compute/{name}_gflops": macs * GIGA for name, macs in cell.metrics.compute.components.items()}
    answered = cell.samples()
    if "kv_lengths" in answered:
        numbers["kv_cache/entries"] = statistics.fmean(statistics.fmean(lengths) for lengths in answered["kv_lengths"])
    if row.prefill:
        numbers |= {"prefill_ms/median": row.prefill.median, "prefill_ms/iqr": row.prefill.iqr}
    return numbers | {f"seconds/{name}": seconds for name, seconds in cell.metrics.seconds.items()}


def samples(cell: Cell, rows: int) -> pd.DataFrame:
    """The first ``rows`` questions with answers, tokens and compute."""
    answers = cell.samples().sort_values("doc_id", ignore_index=True)[:rows]
    frame = answers[[name for name in SHOWN if name in answers]].copy()
    for name in ("visual_tokens", "kv_lengths"):
        if name in answers:
            frame[f"{name}_mean"] = [float(statistics.fmean(counts)) for counts in answers[name]]
            frame[f"{name}_last"] = [int(counts[-1]) for counts in answers[name]]
    if "executed_macs" in answers:
        frame["executed_gflops"] = answers["executed_macs"] * GIGA
    return frame


def sweep_content(tables: Sequence[ResultTable], scratch: Path) -> dict[str, Any]:
    """Tables with the figures that their numbers allow, each as PNG and as data; those after the first numbered."""
    return {
        numbered(name, place): value
        for place, table in enumerate(tables, start=1)
        for name, value in _drawn(table, scratch / str(place)).items()
    }


def _drawn(table: ResultTable, scratch: Path) -> dict[str, Any]:
    import wandb

    from ...results.figures.plots import PLOTS
    from ...results.figures.style import save

    figures = [
        {key: figure for column in columns(table, csv=True) for key, figure in column.figures(row).items()}
        for row in table.rows
    ]
    content: dict[str, Any] = {"table": wandb.Table(dataframe=pd.DataFrame(figures))}
    for plot in PLOTS:
        try:
            figure = plot.draw(table)
        except DataError:  # nothing was timed
            continue
        file = scratch / f"{plot.name}.png"
        save(figure, file)
        content[f"plots/{plot.name}"] = wandb.Image(str(file))
        content[f"plots/{plot.name}_data"] = wandb.Table(dataframe=pd.DataFrame(plot.numbers(table)))
    return content
