"""Draw the figures of a run folder, or of a profile."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ..errors import DataError, OptionError
from .shared import Current, finished, names

if TYPE_CHECKING:
    from ..results.figures.style import Look
    from ..results.store.store import Cell
    from ..results.tables.tables import ResultTable


def plot(
    source: Annotated[
        Path, typer.Argument(metavar="DIR|FILE", help="The folder of a run or sweep, or a file of profile --out.")
    ],
    kind: Annotated[
        str | None,
        typer.Option(metavar="pareto,prefill,tokens,components", help="What to draw. (default: all that was measured)"),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Draw these tasks' scores, tokens, compute and times alone. (default: all)"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE|DIR",
            help="A file ending in .png, .svg or .pdf, or a folder. (default: DIR/plots)",
        ),
    ] = None,
    form: Annotated[str | None, typer.Option("--format", metavar="png,svg,pdf", help="(default: png)")] = None,
    width: Annotated[
        str | None,
        typer.Option(
            metavar="column|page|INCHES",
            help="For a paper: as wide as its column (3 inches) or page (6.3), with small type and display names.",
        ),
    ] = None,
    notes: Annotated[bool, typer.Option("--notes/--no-notes", help="What the figure says below its axes.")] = True,
    current: Current = False,
) -> None:
    """Plot accuracy against compute and prefill time, visual tokens by decoder layer, and compute by component.

    Prints the names of the files. Results that cannot be compared are drawn in files of their own, with a number.

    A file that `visibench profile --out` wrote is drawn as the time of vision, prefill and decoding, by method.
    """
    from ..results.figures.style import FORMATS, Look

    single = out is not None and bool(out.suffix) and not out.is_dir()
    if single and form is not None:
        raise OptionError(
            f"--format {form} and --out {out} both say the format: give a folder to --out, or no --format"
        )
    forms, look = names(form, FORMATS, "--format") or ["png"], Look(_inches(width), notes, titled=width is not None)
    if source.is_file() or (source.suffix == ".json" and not source.is_dir()):
        for option, value in (("--kind", kind), ("--task", task), ("--current", current or None)):
            if value is not None:
                raise OptionError(
                    f"no folder {str(source)!r} (it is a file): {option} is for the folder of a run, while a profile "
                    "has one figure: leave it out"
                )
        beside = source.parent if out is None else out
        _profile(source, [out] if single and out else [beside / f"{source.stem}.{suffix}" for suffix in forms], look)
    else:
        _run(finished(source, current=current), source, kind, task, out, None if single else forms, look)


WIDTHS = {"column": 3.0, "page": 6.3}
"""Inches, of the narrowest among the usual styles (ACL), so that figures fit into all of them."""
LEAST, MOST = 2.0, 40.0
"""Inches between which a figure can be drawn."""


def _inches(width: str | None) -> float | None:
    """What ``--width`` says. Raises :class:`OptionError` for no width."""
    if width is None or width in WIDTHS:
        return WIDTHS.get(width or "")
    try:
        inches = float(width)
    except ValueError:
        inches = 0.0
    if not LEAST <= inches <= MOST:
        raise OptionError(f"--width {width}: give column, page, or inches from {LEAST:g} to {MOST:g}")
    return inches


def _profile(source: Path, files: list[Path], look: Look) -> None:
    """Write the figure of a profile."""
    from ..results.figures import style, timeplot
    from ..results.store import profiles

    if os.path.realpath(source) in map(os.path.realpath, files):
        raise OptionError(f"the figure would take the place of {source} itself: give another file to --out")
    profile = profiles.read(source)
    for file in files:
        style.save(timeplot.draw(profile, look), file)  # anew: a layout moves when it is drawn twice
        print(file)


def _run(
    cells: list[Cell],
    folder: Path,
    kind: str | None,
    task: str | None,
    out: Path | None,
    forms: list[str] | None,
    look: Look,
) -> None:
    """Write the figures of ``cells`` of the run in ``folder``; ``forms`` None: one figure, to the file ``out``."""
    from ..results.figures.plots import KINDS
    from ..results.tables.tables import build

    kinds = names(kind, KINDS, "--kind") or list(KINDS)
    if forms is None and len(kinds) > 1:
        raise OptionError(
            f"{len(kinds)} figures do not fit into the file {out}: choose one with --kind, or give a folder"
        )
    tables = build(_of_tasks(cells, task))
    if forms is None and len(tables) > 1:
        raise OptionError(
            f"{folder} holds {len(tables)} tables, which are drawn one by one: give a folder to --out, or --current if "
            "the others are of other code"
        )
    base = folder / "plots" if out is None else out
    tasks = "" if task is None else "-" + "-".join(sorted(tables[0].questions))
    for number, table in enumerate(tables, start=1):
        name = f"{tasks}{f'-{number}' if len(tables) > 1 else ''}"
        for each in kinds:
            files = [base] if forms is None else [base / f"{each}{name}.{suffix}" for suffix in forms]
            _draw(table, each, files, look, needed=kind is not None)


def _draw(table: ResultTable, kind: str, files: list[Path], look: Look, *, needed: bool) -> None:
    """Write one figure; without its data, an error if it is ``needed`` and else a line."""
    from ..results.figures import plots, style

    try:
        figure = plots.draw(table, kind, look)
    except DataError as error:
        if needed:
            raise
        Console(stderr=True, highlight=False, soft_wrap=True, markup=False).print(f"No plot of {kind}: {error}")
        return
    for file in files:
        style.save(figure, file)
        print(file)


def _of_tasks(cells: list[Cell], tasks: str | None) -> list[Cell]:
    known = {cell.config.task for cell in cells}
    wanted = names(tasks, known, "--task") or known
    return [cell for cell in cells if cell.config.task in wanted]
