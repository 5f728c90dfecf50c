"""Weights & Biases: send the results of a run folder, at any time, and make a report of them."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ..errors import DataError, OptionError, VisibenchError, suggest
from .shared import add, check_writable, finished, progress

if TYPE_CHECKING:
    from ..reports.wandb.sink import Destination, OverlaySource, Sink

SENT, FAILED = "sent: ", "not sent: "
"""How lines begin that say what became of a try, while a sweep runs."""

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Send results to Weights & Biases, and make reports there."
)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run or sweep.")]
Project = Annotated[str | None, typer.Option(help="(default: visibench)")]
Entity = Annotated[str | None, typer.Option(help="User or team. (default: the account's)")]
Group = Annotated[str | None, typer.Option(help="What runs belong together. (default: the folder's name)")]
Tags = Annotated[str | None, typer.Option(metavar="A,B", help="Tags of every run.")]


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
    from ..reports.wandb.sink import Sink

    if not folder.is_dir():
        raise DataError(f"no folder {str(folder)!r}: give the folder of a run or sweep")
    destination = destination_of(folder, mode, project, entity, group, tags, samples)
    if follow:
        os.nice(10)  # cells that are being timed should not notice
        os.environ.setdefault("WANDB_INIT_TIMEOUT", "30")  # there is another try, and an end that waits
    sink = Sink(folder, destination, _overlaid() if images and samples else None)
    if not follow:
        destination.reach()
    new = _followed(sink) if follow else 0
    cells = sink.store.usable() if follow else finished(folder)
    with nullcontext(lambda done: None) if follow else progress("Sending to W&B", len(cells) + 1) as done:
        for cell in cells:
            new += sink.send(cell, cells)
            done(1)
        tables = bool(cells) and sink.finish(cells)
        done(1)
    Console(stderr=True, highlight=False, soft_wrap=True, markup=False).print(
        f"{'Sent' if mode == 'online' else f'Written to {folder}/wandb'}: {new} of {len(cells)} cells"
        f"{' and their tables' if tables else ''} in group {destination.group!r} of project {destination.project!r}."
        f"{'' if new == len(cells) else ' The others had gone before.'}"
    )


def _followed(sink: Sink) -> int:
    """Send cells whenever standard input says that there are new ones, until it ends; how many went.

    Where W&B does not take one, a line says so, and all that is left is tried again with the next.
    """
    new, more = 0, True
    while more:
        try:
            cells = sink.store.usable()
            for cell in cells:
                new += sink.send(cell, cells)
            print(f"{SENT}{len(cells)} cells", flush=True)
        except VisibenchError as error:
            print(f"{FAILED}{error}", flush=True)
        more = bool(os.read(sys.stdin.fileno(), 1 << 16))
    return new


def _overlaid() -> OverlaySource:
    from ..reports.image_loader import ImageLoader

    return ImageLoader().overlaid


def destination_of(
    folder: Path,
    mode: str,
    project: str | None,
    entity: str | None,
    group: str | None,
    tags: str | None,
    samples: int = 32,
) -> Destination:
    """Where results go. Raises :class:`OptionError` for names that cannot be, by wandb's own rules where it has one."""
    from ..reports.wandb.sink import MODES, PROJECT, Destination

    if mode not in MODES:
        raise OptionError(f"unknown mode {mode!r}; {suggest(mode, MODES)}")
    given = {"project": project, "entity": entity, "group": group, "tags": tags}
    empty = [name for name, value in given.items() if value is not None and not value.strip(" ,")]
    if empty:
        raise OptionError(f"the {empty[0]} for W&B is empty: name one, or leave the option out")
    named = tuple(tag.strip() for tag in (tags or "").split(",") if tag.strip())
    chosen = project or os.environ.get("WANDB_PROJECT") or PROJECT
    destination = Destination(group or folder.resolve().name, mode, chosen, entity, named, samples)
    _check_names(destination)
    return destination


def _check_names(destination: Destination) -> None:
    """Raise :class:`OptionError` for a name that wandb would refuse, if only once there is something to send."""
    from pydantic import ValidationError
    from wandb import Settings
    from wandb.errors import UsageError
    from wandb.sdk.artifacts._validators import validate_artifact_name

    checks: dict[str, Callable[[], object]] = {
        "project": lambda: Settings(project=destination.project),
        "entity": lambda: Settings(project=destination.entity),  # part of the same addresses; has no rule of its own
        "tags": lambda: Settings(run_tags=destination.tags),
        "group": lambda: validate_artifact_name(f"{destination.group}-tables".replace("/", "-")),
    }
    for name, check in checks.items():
        try:
            check()
        except (UsageError, ValueError) as error:
            problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            told = problem.removeprefix("Value error, ").replace("project name", f"{name} name")
            raise OptionError(f"W&B takes no such {name}: {told}") from error


def sync_command(folder: Path, destination: Destination) -> str:
    """The command that sends ``folder`` to the same place, with the options that differ from what would be."""
    from ..reports.wandb.sink import PROJECT, Destination

    given = destination.options()
    default = Destination(folder.resolve().name, project=os.environ.get("WANDB_PROJECT") or PROJECT).options()
    usual = set(zip(default[::2], default[1::2], strict=True))
    options = [part for pair in zip(given[::2], given[1::2], strict=True) if pair not in usual for part in pair]
    return shlex.join(["visibench", "wandb", "sync", str(folder), *options])


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
    from ..reports.wandb.document import as_json, document, save
    from ..reports.wandb.sink import prepare
    from ..results.store import disk
    from ..results.tables.tables import build

    destination = destination_of(folder, "offline" if dry_run else "online", project, entity, group, None)
    tables = build(finished(folder))
    if dry_run is not None:
        check_writable(dry_run)
        with disk.writing(dry_run):
            disk.write(dry_run, json.dumps(as_json(document(tables, destination)), indent=1) + "\n")
        print(dry_run)
        return
    prepare(folder)
    destination.check()
    print(save(tables, destination))


for command in (sync, report):
    add(app, command)
