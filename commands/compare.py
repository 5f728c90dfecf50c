"""Compare two methods question by question."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from ..errors import DataError, OptionError, UnknownNameError, suggest
from .shared import AsJson, Margin, share, spelled_p, width, wrapped

if TYPE_CHECKING:
    from ..results.statistics.paired import PairedMetric, Pairing
    from ..results.store.store import Cell

WIDE = 140
"""Columns that the table of metrics needs with a line for each."""
_SIDE = "A cell's folder, or DIR#LABEL:TASK of a run folder (all seeds)."


def compare(
    first: Annotated[str, typer.Argument(metavar="A", help=_SIDE)],
    second: Annotated[str, typer.Argument(metavar="B", help="The same for the method to compare with.")],
    show: Annotated[int, typer.Option("--show", min=0, help="Questions to list where the scores differ.")] = 20,
    margin: Margin = None,
    as_json: AsJson = False,
) -> None:
    """Compare two methods on the same questions: differences with intervals, tests, and where they disagree."""
    from pydantic_core import to_json

    from ..results.statistics.paired import pair

    within = share(margin)
    sides = [_cells(first), _cells(second)]
    result = pair(sides[0], sides[1], within)
    if as_json:
        print(to_json(result, indent=1, inf_nan_mode="null").decode())
        return
    for name, cells in zip("AB", sides, strict=True):
        config, seeds = cells[0].config, ", ".join(str(cell.config.seed) for cell in cells)
        print(f"{name}  {config.label} (model {config.model}, seed {seeds})")
    _print(result, show)


def _cells(text: str) -> list[Cell]:
    """The cells that an argument names: one, or all seeds of a label on a task."""
    from ..results.store import code
    from ..results.store.store import Store

    path = Path(text)
    if os.path.isdir(path) and path.resolve().parent.name == "cells":
        named = [cell for cell in Store(path.resolve().parent.parent).cells() if cell.path == path.resolve()]
        if not named:
            raise DataError(f"no finished results in {text!r}: run it again")
        return named
    folder, given, rest = text.partition("#")
    label, _, task = rest.rpartition(":")
    cells = Store(folder).cells()
    labels = sorted({f"{cell.config.label}:{cell.config.task}" for cell in cells})
    if not given or not label:
        raise OptionError(f"{text!r} names no cell: give DIR#LABEL:TASK, such as '{folder}#{labels[0]}'")
    named = [cell for cell in cells if (cell.config.label, cell.config.task) == (label, task)]
    if not named:
        raise UnknownNameError(f"no cell {rest!r} in {folder}; {suggest(rest, labels)}")
    named = code.present(named, lambda cell: cell.config.asked(), lambda cell: bool(cell.other_code))
    if len({cell.config.seed for cell in named}) < len(named):
        raise OptionError(
            f"{text!r} names {len(named)} cells of different settings: give one's folder, {named[0].path}"
        )
    return named


def _print(result: Pairing, show: int) -> None:
    from rich import box
    from rich.table import Table

    scores = result.metrics[0].comparison
    subset = " SUBSET: these are no full-set scores." if result.asked < result.total else ""
    print(f"{result.task}: {result.asked} questions of {result.total}, {scores.images} images.{subset}")
    for name, (one, two) in result.differs.items():
        print(f"Beside the method, {name} differs: A {one}, B {two}.")
    titles = ("metric", "A", "B", "A − B", "p", "p, Holm", "test", "detectable")
    lines = [list(titles), *map(_line, result.metrics)]
    if width() < WIDE:  # a column for each metric, so that no number is cut
        lines = [list(row) for row in zip(*lines, strict=True)]
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, title in enumerate(lines[0]):
        grid.add_column(title, justify="right" if place else "left", no_wrap=True)
    for line in lines[1:]:
        grid.add_row(*line)
    Console(width=max(width(), WIDE), highlight=False).print(grid)
    wrapped(
        "In brackets: 95 % interval, clustered by image. Detectable: the smallest true difference that these questions "
        "show with about 80 % power, one test at α = 0.05; – where they can show none."
    )
    for metric in result.metrics:
        if result.margin is not None:
            wrapped(_equivalence(metric, result.margin))
    if result.agreement:
        print(f"Both answer alike on {100 * result.agreement.value:.1f} % of questions.")
    apart = f"{scores.better + scores.worse} questions tell them apart: A scores higher on {scores.better}, "
    apart += f"B on {scores.worse}."
    if scores.mcnemar_p is not None:
        apart += f" McNemar's exact p, which takes questions as independent: {spelled_p(scores.mcnemar_p)}."
    wrapped(apart)
    for row in result.discordant[:show]:
        question, target = row["question"].splitlines()[0], row["target"].splitlines()[0]
        said = [f"{name} {', '.join(row[side]['answers'])!r}" for name, side in (("A", "first"), ("B", "second"))]
        print(f"  {row['question_id']}  {question}  {target!r}: {', '.join(said)}")
    if len(result.discordant) > show:
        print(f"  and {len(result.discordant) - show} more: --show N lists more, --json all.")


def _equivalence(metric: PairedMetric, margin: float) -> str:
    """Whether two one-sided tests show that a difference is within the margin."""
    within = f"{metric.title}: a difference of less than {100 * margin:g} % of the best score"
    if metric.p_equivalent is None:
        return f"{within} cannot be tested: too few images, or no best score."
    verdict = "is shown" if metric.equivalent else "is not shown"
    return f"{within} {verdict} (two one-sided tests, p {spelled_p(metric.p_equivalent)})."


def _line(metric: PairedMetric) -> list[str]:
    c, scale = metric.comparison, 100.0 if metric.maximum == 1 else 1.0
    unit = " %" if metric.maximum == 1 else f" /{metric.maximum:g}" if metric.maximum else ""
    spans = [(e.value, e.low, e.high) for e in (metric.first, metric.second)] + [(c.difference, c.low, c.high)]
    numbers = [f"{value * scale:.2f} [{low * scale:.2f}, {high * scale:.2f}]" for value, low, high in spans]
    floor = "–" if c.detectable is None else f"{c.detectable * scale:.2f}"
    return [metric.title + unit, *map(escape, numbers), spelled_p(c.p), spelled_p(metric.p_holm), c.test, floor]
