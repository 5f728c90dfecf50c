"""What a sweep has still to do, in print: ``visibench sweep --dry-run``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from .shared import print_list, width

if TYPE_CHECKING:
    from ..evals.sweeps.config import SweepConfig
    from ..evals.sweeps.dry_run import CellCost
    from ..evals.sweeps.estimate import Rate

HEADER = ["model", "method", "task", "seed", "questions", "state", "TFLOPs", "basis", "time"]


def show(config: SweepConfig, folder: Path, rate: float | None = None, *, as_json: bool) -> None:
    """Print the cells of a sweep into ``folder``, what is done, and what the rest will take.

    ``rate``: 10¹² multiply-adds a second that prefills run at.
    """
    from ..evals.sweeps import estimate
    from ..evals.sweeps.dry_run import dry_run

    at = estimate.rate(rate)
    cells = dry_run(config, folder, Console(stderr=True), at)
    lines = _summary(cells, folder, at)
    if config.references:
        lines.append("Not among them: references, whose budgets are known once the other cells have run.")
    differs = {
        "model": len(config.by_model()) > 1,
        "seed": len({cell.config.seed for cell in cells}) > 1,
        "state": any(cell.done for cell in cells),
    }
    header = [name for name in HEADER if differs.get(name, True)]
    rows = [[row[name] for name in header] for row in map(_row, cells)]
    print_list([_json(cell) for cell in cells], header, rows, "\n" + "\n".join(lines), as_json=as_json)


def _row(cell: CellCost) -> dict[str, str]:
    from ..evals.sweeps.events import duration
    from ..results.tables.render import broken

    told = [
        cell.config.model,
        broken(cell.config.label, max(width() // 4, 20)),
        cell.config.task,
        str(cell.config.seed),
        _upto(cell),
        "done" if cell.done else "to do",
        "?" if cell.tflops is None else f"{'≤ ' if cell.basis == 'bound' else ''}{cell.tflops:.3g}",
        cell.basis or "",
        "?" if cell.seconds is None else duration(cell.seconds),
    ]
    return dict(zip(HEADER, told, strict=True))


def _upto(cell: CellCost) -> str:
    if cell.questions is not None:
        return str(cell.questions)
    return "?" if cell.config.limit is None else f"≤ {cell.config.limit}"


def _summary(cells: list[CellCost], folder: Path, rate: Rate) -> list[str]:
    from ..evals.sweeps.estimate import TEXT

    rest = [cell for cell in cells if not cell.done]
    lines = [f"{len(cells)} cells: {len(cells) - len(rest)} done in {folder}, {len(rest)} to do."]
    if not rest:
        return lines
    questions = [cell.questions for cell in rest if cell.questions is not None]
    tflops = [cell.tflops for cell in rest if cell.tflops is not None]
    lines.append(f"Questions to ask: {sum(questions)}{_but(rest, len(questions), 'of a size that is not known')}.")
    bound = "≤ " if any(cell.basis == "bound" for cell in rest) else ""
    lines.append(
        f"Prefills to execute: {bound}{sum(tflops):.4g} TFLOPs{_but(rest, len(tflops), 'unknown')}. Measured: by "
        "finished cells of the same method and task. Planned: by the method's plan of visual tokens on the first "
        f"questions, or, of data on the hub, on a prompt of {TEXT} text tokens and one image. Bound: the dense "
        "model's, where a method decides by what it sees. Neither of these two counts scoring."
    )
    memory = [cell.memory for cell in rest if cell.memory is not None]
    batch = rest[0].config.batch_size
    if memory:
        lines.append(
            f"Memory: about {max(memory) / 2**30:.1f} GiB for the largest batch ({batch} prompts): weights, KV cache "
            "and one decoder layer's activations in 16 bits, dense; allocator and kernels come on top."
        )
    return [*lines, _time(rest, rate)]


def _time(rest: list[CellCost], rate: Rate) -> str:
    from ..evals.sweeps.events import duration

    known = [cell.seconds for cell in rest if cell.seconds is not None]
    if not known:
        return "Time: unknown, until the sweep has finished a first cell: then --dry-run goes by that."
    bases = {
        "cells": "by the seconds per question of finished cells in the folder",
        "batch": "estimated from one batch of the dense model for each task, here and now",
        "rate": f"prefills alone, at {rate.tmacs:.4g}·10¹² multiply-adds a second ({rate.origin}); decoding comes on "
        "top",
    }
    used = [told for clock, told in bases.items() if any(cell.clock == clock for cell in rest)]
    by_rate = sum(cell.seconds or 0 for cell in rest if cell.clock == "rate") / 3600
    hours = f" ({by_rate:.3g} GPU-hours)" if by_rate else ""
    total = f"about {duration(sum(known))}{hours} in one process{_but(rest, len(known), 'unknown')}"
    return f"Time: {total}, {', else '.join(used)}; loading the model not counted."


def _but(cells: list[CellCost], known: int, reason: str) -> str:
    missing = len(cells) - known
    return f" ({missing} of {len(cells)} cells {reason})" if missing else ""


def _json(cell: CellCost) -> dict[str, Any]:
    return {
        "config": cell.config.model_dump(mode="json"),
        "done": cell.done,
        "questions": cell.questions,
        "executed_tflops": cell.tflops,
        "basis": cell.basis,
        "seconds": cell.seconds,
        "seconds_by": cell.clock,
        "memory_bytes": cell.memory,
    }
