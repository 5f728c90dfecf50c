"""A regression gate for continuous integration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from .shared import AsJson, finished, spelled_p, width

if TYPE_CHECKING:
    from ..results.gate.gate import CellChange, MetricChange, Report


def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run or sweep.")],
    baseline: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What to compare with. (default: the package's, of configs/ci.yaml)"),
    ] = None,
    update: Annotated[bool, typer.Option("--update", help="Write the run as the new baseline instead.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare a run with a baseline, question by question; exit code 1 if a score dropped or token counts changed."""
    from pydantic_core import to_json

    from ..results.gate import baseline as baselines
    from ..results.gate import gate

    file, cells = baseline or baselines.PACKAGED, finished(folder)
    if update:
        baselines.save(baselines.baseline_of(cells), file)
    report = gate.check(cells, baselines.load(file))
    if as_json:
        print(to_json(report, indent=1, inf_nan_mode="null").decode())
    else:
        done = "Written" if update else "Compared with"
        print(f"{done} {file}: {len(cells)} cells, {file.stat().st_size / 1e3:.0f} kB.")
        _print(report)
    if not report.passed:
        raise typer.Exit(1)


def _print(report: Report) -> None:
    from rich import box
    from rich.table import Table

    from ..results.statistics.inference import ALPHA

    for note in report.notes:
        print(f"Noted, not compared: {note}.")
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("cell", "metric"):
        grid.add_column(title)
    for title in ("baseline", "now", "change, 95 % interval", "p, Holm", "detectable", "questions", "answers changed"):
        grid.add_column(title, justify="right")
    for cell in report.cells:
        for metric in cell.metrics:
            grid.add_row(*map(escape, _line(cell, metric)))
    Console(width=width(), highlight=False).print(grid)
    blind = sum(metric.verdict.detectable is None for cell in report.cells for metric in cell.metrics)
    print(
        f"p: one-sided, paired by image, below {ALPHA} a drop is shown; half of that is for the run as a whole, half\n"
        f"for its {report.tests} tests by cell (Holm). Detectable: a true drop shown with about 80 % power or more;\n"
        f"{blind} (–) have too low a score or too few images for any."
    )
    print(_whole(report.whole))
    for cell in report.cells:
        for line in _changes(cell):
            print(line)
    failed = [cell for cell in report.cells if cell.failed]
    could = "no drop of a score is shown" if blind < report.tests else "none of their scores could have shown a drop"
    parts = [f"{len(failed)} of {len(report.cells)} cells"] * bool(failed)
    parts += ["the run as a whole"] * report.whole.verdict.dropped
    print(
        f"PASS: {len(report.cells)} cells keep and compute the same; {could}."
        if report.passed
        else f"FAIL: {' and '.join(parts)}."
    )


def _whole(change: MetricChange) -> str:
    """The test of the run as a whole, in a line."""
    c = change.verdict.comparison
    before, now, difference, low, high = (
        f"{100 * value:.2f}" for value in (change.before, change.now, c.difference, c.low, c.high)
    )
    known = change.verdict.detectable
    sees = "it can show no drop" if known is None else f"a drop of {100 * known:.2f} in all cells at once is detectable"
    return (
        f"{'FAIL' if change.verdict.dropped else '  ok'} the run as a whole: {change.title} {before} %, now {now}, "
        f"change {difference} [{low}, {high}],\n     p {spelled_p(change.verdict.p_holm)}, {c.questions} questions "
        f"about {c.images} images; {sees}."
    )


def _line(cell: CellChange, metric: MetricChange) -> list[str]:
    c, scale = metric.verdict.comparison, 100.0 if metric.maximum == 1 else 1.0
    unit = " %" if metric.maximum == 1 else f" /{metric.maximum:g}" if metric.maximum else ""
    before, now, change, low, high = (
        f"{value * scale:.2f}" for value in (metric.before, metric.now, c.difference, c.low, c.high)
    )
    floor = "–" if metric.verdict.detectable is None else f"{metric.verdict.detectable * scale:.2f}"
    span = f"{change} [{low}, {high}]"
    counts = [str(cell.questions), str(cell.answers)]
    return [cell.name, metric.title + unit, before, now, span, spelled_p(metric.verdict.p_holm), floor, *counts]


def _changes(cell: CellChange) -> list[str]:
    """What changed in a cell, a line each."""
    lines = [
        f"FAIL {cell.name}: {fact.fact} changed on {fact.questions} of {cell.questions} questions; question "
        f"{fact.doc_id} had {_short(fact.before)}, now {_short(fact.now)}"
        for fact in cell.facts
    ]
    lines += [
        f"FAIL {cell.name}: {metric.title} dropped from {metric.before:.4g} to {metric.now:.4g} "
        f"(p {spelled_p(metric.verdict.p_holm)}, {cell.questions} questions, {cell.images} images)"
        for metric in cell.metrics
        if metric.verdict.dropped
    ]
    if cell.answers and not lines:
        c = cell.metrics[0].verdict.comparison
        lines.append(
            f"  ok {cell.name}: {cell.answers} of {cell.questions} answers changed, {c.better} scored higher, "
            f"{c.worse} lower: no drop shown"
        )
    return lines


def _short(value: tuple[int, ...] | float) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else f"{value:.12g}"
