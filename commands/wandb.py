"""Weights & Biases: send the results of a run folder, at any time, and make a report of them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ..errors import OptionError, suggest
from .shared import check_writable, finished

if TYPE_CHECKING:
    from ..results.store import Cell
    from ..results.wandb import Pictures, Target

app = typer.Typer(no_args_is_help=True, help="Send results to Weights & Biases, and make reports there.")

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run or sweep.")]
Project = Annotated[str | None, typer.Option(help="(default: visibench)")]
Entity = Annotated[str | None, typer.Option(help="User or team. (default: the account's)")]
Group = Annotated[str | None, typer.Option(help="What runs belong together. (default: the folder's name)")]
Tags = Annotated[str | None, typer.Option(metavar="A,B", help="Tags of every run.")]


@app.command()
def sync(
    folder: Folder,
    project: Project = None,
    entity: Entity = None,
    group: Group = None,
    tags: Tags = None,
    mode: Annotated[
        str,
        typer.Option(metavar="online|offline", help="offline writes to DIR/wandb, for a machine without a network."),
    ] = "online",
    samples: Annotated[int, typer.Option(min=0, help="Answers of each cell in its table.")] = 32,
    images: Annotated[
        bool, typer.Option(help="Their images, with the tokens that stayed, from the run's data.")
    ] = True,
    follow: Annotated[bool, typer.Option("--follow", hidden=True)] = False,
) -> None:
    """Send what is new in a run folder, finished or not: a run for each cell, and one with tables and figures."""
    from ..results.store import Store
    from ..results.wandb import Sink

    target = destination(folder, mode, project, entity, group, tags, samples)
    if follow:
        os.nice(10)  # cells that are being timed should not notice
        rounds: Iterator[list[Cell]] = (Store(folder).usable() for _ in chain([""], sys.stdin))
    else:
        rounds = iter([finished(folder)])
    sink, cells, new = Sink(folder, target, _overlaid() if images and samples else None), [], 0
    for cells in rounds:
        new += sum(sink.send(cell, cells) for cell in cells)
    tables = bool(cells) and sink.finish(cells)
    Console(stderr=True, highlight=False, soft_wrap=True, markup=False).print(
        f"{'Sent' if mode == 'online' else f'Written to {folder}/wandb'}: {new} of {len(cells)} cells"
        f"{' and their tables' if tables else ''} in group {target.group!r} of project {target.project!r}."
        f"{'' if new == len(cells) else ' The others had gone before.'}"
    )


def _overlaid() -> Pictures:
    from ..evals.pictures import Pictures

    return Pictures().overlaid


def destination(
    folder: Path,
    mode: str,
    project: str | None,
    entity: str | None,
    group: str | None,
    tags: str | None,
    samples: int = 32,
) -> Target:
    """Where results go. Raises :class:`OptionError` for names that cannot be."""
    from ..results.wandb import MODES, PROJECT, Target

    if mode not in MODES:
        raise OptionError(f"unknown mode {mode!r}; {suggest(mode, MODES)}")
    named = tuple(tag.strip() for tag in (tags or "").split(",") if tag.strip())
    chosen = project or os.environ.get("WANDB_PROJECT") or PROJECT
    return Target(group or folder.resolve().name, mode, chosen, entity, named, samples)


@app.command()
def report(
    folder: Folder,
    project: Project = None,
    entity: Entity = None,
    group: Group = None,
    dry_run: Annotated[
        Path | None, typer.Option("--dry-run", metavar="FILE.json", help="Write what would be saved, and save nothing.")
    ] = None,
) -> None:
    """Save a report in W&B: words, plots of the runs that sync made, tables, and where each method comes from."""
    try:
        import wandb_workspaces  # noqa: F401
    except ImportError as error:
        raise OptionError("reports need wandb-workspaces: pip install 'visibench[report]'") from error
    from ..results.tables import build
    from ..results.wandb import prepare
    from ..results.wandb_report import as_json, document, save

    target = destination(folder, "offline" if dry_run else "online", project, entity, group, None)
    tables = build(finished(folder))
    if dry_run is not None:
        check_writable(dry_run)
        dry_run.write_text(json.dumps(as_json(document(tables, target)), indent=1) + "\n", encoding="utf-8")
        print(dry_run)
        return
    prepare(folder)
    target.check()
    print(save(tables, target))
