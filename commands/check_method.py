"""The table of invariants for one method, on miniature models."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .shared import AsJson, width

if TYPE_CHECKING:
    from ..evals.invariants.table import Result
    from ..methods import Method


def check_method(
    method: Annotated[
        str,
        typer.Argument(metavar="FILE.py[:NAME]", help="A Python file, and which of its methods; or a method's name."),
    ],
    as_json: AsJson = False,
) -> None:
    """Put a method through all invariants and two FLOP counters on miniature models; exit code 1 if one breaks.

    Every string of the class's examples is tried, and everything where the class says what keeps all tokens.
    """
    from ..evals.invariants.table import table

    checked = {cls.name: _followed(cls.name, table(cls)) for cls in _classes(method)}
    if as_json:
        print(json.dumps({name: [_json(result) for result in results] for name, results in checked.items()}, indent=1))
    else:
        for name, results in checked.items():
            _print(name, results)
    if not all(result.holds for results in checked.values() for result in results):
        raise typer.Exit(1)


def _classes(reference: str) -> list[type[Method]]:
    from ..methods.files import divided, find, load_file

    file, name = divided(reference)
    return list(load_file(file).values()) if file and not name else [find(reference)]


def _followed(name: str, results: Iterator[Result]) -> list[Result]:
    """All results; meanwhile the terminal shows how many there are."""
    done: list[Result] = []
    with Console(stderr=True).status(f"Checking {name} …") as status:
        for result in results:
            done.append(result)
            status.update(f"Checking {name}: {len(done)} invariants …")
    return done


def _json(result: Result) -> dict[str, object]:
    return {"holds": result.holds, **dataclasses.asdict(result)}


def _print(name: str, results: list[Result]) -> None:
    console = Console(width=min(width(), 100) if sys.stdout.isatty() else 80, highlight=False)
    grid = Table(box=None, show_header=False, pad_edge=False)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for result in results:
        grid.add_row("holds" if result.holds else "[bold red]BROKEN[/]", escape(result.what))
        for kind in (result.broken, result.noted):
            for example, text in kind.items():
                grid.add_row("", f"[dim]{escape(example)}[/]: {escape(text)}")
    console.print(grid)
    broken = sum(not result.holds for result in results)
    told = f"{broken} of {len(results)} invariants are broken" if broken else f"all {len(results)} invariants hold"
    console.print(f"{name}: {told}, on a LLaVA of {_sizes()} with random weights.")


def _sizes() -> str:
    from ..evals.invariants.miniature import LAYERS, PATCHES

    return f"{LAYERS} layers and {PATCHES} visual tokens an image"
