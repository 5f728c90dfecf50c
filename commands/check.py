"""A regression gate for continuous integration."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from ..errors import OptionError
from .shared import AsJson, finished, spelled_p, terminal, width, wrapped

if TYPE_CHECKING:
    from ..results.gate.gate import CellChange, MetricChange, Report


def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run or sweep.")],
    baseline: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What to compare with. (default: the package's, of configs/ci.yaml)"),
    ] = None,
    update: Annotated[bool, typer.Option("--update", help="Write the run as the new baseline instead.")] = False,
    subset: Annotated[
        bool, typer.Option("--subset", help="The run holds a part of the baseline's cells or questions: compare these.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare a run with a baseline, question by question; exit code 1 if a score dropped or token counts changed."""
    from pydantic_core import to_json

    from ..results.gate import baseline as baselines
    from ..results.gate import gate

    file, cells = baseline or baselines.PACKAGED, finished(folder)
    if update and subset:
        raise OptionError("--update writes a whole run: leave --subset out")
    if update:
        baselines.save(baselines.baseline_of(cells), file)
    report = gate.check(cells, baselines.load(file), subset=subset)
    if as_json:
        print(to_json(report, indent=1, inf_nan_mode="null").decode())
    else:
        done = "Written" if update else "Compared with"
        _say(f"{done} {file}: {len(cells)} cells, {file.stat().st_size / 1e3:.0f} kB.")
        _print(report)
    if not report.passed:
        raise typer.Exit(1)


def _print(report: Report) -> None:
    from rich import box
    from rich.table import Table

    from ..results.statistics.inference import ALPHA

    for note in report.notes:
        _say(f"Noted, not compared: {note}.")
    room = max(min(width(), 120) - 62, 18)
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column("cell\nmetric", max_width=room, overflow="fold")
    for title in ("baseline\nnow", "change\n[95 %]", "p,\nHolm", "detect-\nable", "answers\nchanged"):
        grid.add_column(title, justify="right", no_wrap=True)
    for cell in report.cells:
        for metric in cell.metrics:
            grid.add_row(*map(escape, _line(cell, metric, room)))
    Console(width=max(width(), 80), highlight=False).print(grid)
    blind = sum(metric.verdict.detectable is None for cell in report.cells for metric in cell.metrics)
    wrapped(
        f"p: one-sided, paired by image, below {ALPHA} a drop is shown; half of that is for the run as a whole, half "
        f"for its {report.tests} tests by cell (Holm). Detectable: a true drop shown with about 80 % power or more; "
        f"{blind} (–) have too low a score or too few images for any."
    )
    for line in [_whole(report.whole), *(line for cell in report.cells for line in _changes(cell))]:
        _say(line)
    failed = [cell for cell in report.cells if cell.failed]
    parts = [f"{len(failed)} of {len(report.cells)} cells"] * bool(failed)
    parts += ["the run as a whole"] * report.whole.verdict.dropped
    _say(
        f"PASS: {len(report.cells)} cells keep and compute the same; {_could(report, blind)}."
        + f" Not compared: {report.left_out} of the baseline." * bool(report.left_out)
        if report.passed
        else f"FAIL: {' and '.join(parts)}."
    )


def _say(line: str) -> None:
    """One line for other programs to search; a terminal has it broken between words."""
    if terminal() is None:
        print(line)
    else:
        wrapped(line, hang="     ")


def _could(report: Report, blind: int) -> str:
    """What the run shows of drops, and which it could not have shown."""
    if blind == report.tests:
        return "none of their scores could have shown a drop"
    metrics = [metric for cell in report.cells for metric in cell.metrics]
    known = [(metric.verdict.detectable, metric.maximum) for metric in metrics]
    floors = [100 * least / most for least, most in known if least is not None and most]
    whole = report.whole.verdict.detectable
    unseen = [] if whole is None else [f"below {100 * whole:.2f} % of the best score in all cells at once"]
    unseen += [f"below {min(floors):.1f} to {max(floors):.1f} % in one"] * bool(floors)
    unseen += [f"of any size in {blind} of {report.tests} scores"] * bool(blind)
    return f"no drop of a score is shown; not seen would be one {', or '.join(unseen)}"


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
        f"change {difference} [{low}, {high}], p {spelled_p(change.verdict.p_holm)}, {c.questions} questions "
        f"about {c.images} images; {sees}."
    )


def _line(cell: CellChange, metric: MetricChange, room: int) -> list[str]:
    """A row of two lines; the cell and its metric in ``room`` characters."""
    from ..results.tables.render import broken

    c, scale = metric.verdict.comparison, 100.0 if metric.maximum == 1 else 1.0
    unit = " %" if metric.maximum == 1 else f" /{metric.maximum:g}" if metric.maximum else ""
    before, now, change, low, high = (
        f"{value * scale:.2f}" for value in (metric.before, metric.now, c.difference, c.low, c.high)
    )
    floor = "–" if metric.verdict.detectable is None else f"{metric.verdict.detectable * scale:.2f}"
    name = "\n".join(
        broken(part, room) for part in textwrap.wrap(cell.name, room, break_on_hyphens=False, break_long_words=False)
    )
    answers = f"{cell.answers}\nof {cell.questions}"
    titled = f"{name}\n{metric.title}{unit}"
    return [titled, f"{before}\n{now}", f"{change}\n[{low}, {high}]", spelled_p(metric.verdict.p_holm), floor, answers]


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
