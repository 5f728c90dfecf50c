"""The command line. Heavy imports stand inside the commands, so that ``--help`` answers at once."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from . import __version__
from .errors import OptionError, VisibenchError

if TYPE_CHECKING:
    from .evals.config import SweepConfig
    from .results.store import Cell

app = typer.Typer(
    name="visibench",
    help="Compare visual-token pruning methods for multimodal LLMs: accuracy against compute.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
# Click's class or typer's own copy of it, depending on typer's version.
_UsageProblem: Any = typer.BadParameter.__mro__[2]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on standard output.")]
Limit = Annotated[int | None, typer.Option(min=1, metavar="N", help="Ask only the first N questions of each task.")]


def main() -> NoReturn:
    """Entry point: what a user can mend ends as one line on standard error and exit code 2."""
    # Where cores are shared with other programs, OpenMP threads that spin while they wait make small models several
    # times slower. Must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        code = app(standalone_mode=False)
    except VisibenchError as error:
        _fail(str(error))
    except typer.Abort:
        code = 130
    except _UsageProblem as error:
        _fail(f"{error.format_message()} (see `visibench --help`)", error.exit_code)
    if code == 130:  # Ctrl-C: raised or returned, depending on typer's version
        _fail("interrupted: the same command goes on where this one stopped", 130)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int = 2) -> NoReturn:
    line = f"[bold red]error:[/] {escape(' '.join(message.split()))}"
    Console(stderr=True, soft_wrap=True, highlight=False).print(line)
    sys.exit(code)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Compare visual-token pruning methods for multimodal LLMs: accuracy against compute."""
    if version:
        print(f"visibench {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def methods(as_json: AsJson = False) -> None:
    """List the pruning methods with their options."""
    from .evals.spec import describe_methods

    found = describe_methods()
    rows = [[m["name"], m["about"], _defaults(m["options"]), m["paper"]] for m in found]
    _print_list(found, ["method", "what it does", "options and defaults", "arXiv"], rows, as_json=as_json)


@app.command()
def models(as_json: AsJson = False) -> None:
    """List the models that need no download. Any supported hub name or local folder works as well."""
    from .models import list_models

    found = [{"name": name, "about": about} for name, about in list_models().items()]
    also = "Also: a local folder, or a hub name such as llava-hf/llava-1.5-7b-hf."
    _print_list(found, ["model", "about"], [[m["name"], m["about"]] for m in found], also, as_json=as_json)


@app.command()
def tasks(as_json: AsJson = False) -> None:
    """List the tasks with embedded data. Any other generate_until task of lmms-eval works by name, from the hub."""
    from .evals.tasks import TASKS

    found = [dataclasses.asdict(info) for info in TASKS.values()]
    rows = [[t["name"], t["about"], ", ".join(m["key"] for m in t["metrics"])] for t in found]
    also = "Also: any other task of lmms-eval by its name, such as scienceqa_img, with data from the hub."
    _print_list(found, ["task", "about", "metrics in tables"], rows, also, as_json=as_json)


@app.command()
def run(
    model: Annotated[str, typer.Option(help="tiny, a local folder, or a hub name.")],
    method: Annotated[
        str,
        typer.Option(metavar="NAME[:key=value,…]", help="E.g. fastv:layer=2,keep=0.5; see `visibench methods`."),
    ],
    task_list: Annotated[str, typer.Option("--tasks", metavar="A,B", help="Tasks, separated by commas.")],
    limit: Limit = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at once.")] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    seed: Annotated[int | None, typer.Option(help="For methods that draw.  [default: 0]")] = None,
    data: Annotated[
        str,
        typer.Option(
            help="embedded, hub, or a folder laid out like the hub: MME, POPE, textvqa and GQA as parquet, or as "
            "written by save_to_disk (then GQA_images and GQA_instructions)."
        ),
    ] = "embedded",
    out: Annotated[Path | None, typer.Option(help="Run folder.  [default: runs/MODEL]")] = None,
    as_json: AsJson = False,
) -> None:
    """Run one method on some tasks: scores, visual tokens by layer, compute and prefill time."""
    from .evals.config import parse_config
    from .evals.spec import split

    _, options = split(method)
    if seed is not None and options.get("seed", str(seed)) != str(seed):
        raise OptionError(f"seed is given twice: {options['seed']} in --method and {seed} in --seed")
    content = {
        "model": model,
        "methods": [method],
        "tasks": [task.strip() for task in task_list.split(",") if task.strip()],
        "limit": limit,
        "batch_size": batch_size,
        "device": device,
        "dtype": dtype,
        "seeds": [seed or 0],
        "data": data,
    }
    folder = out or Path("runs") / Path(model).name
    cells = _sweep(parse_config(content, "visibench run"), folder, dense=False)
    if as_json:
        print(json.dumps({"out": str(folder), "cells": [_cell_json(cell) for cell in cells]}, indent=1))
        return
    _print_tables(cells, folder)
    for cell in cells:
        layers = " ".join(f"{count:.4g}" for count in cell.metrics.visual_tokens.per_layer)
        print(f"Visual tokens at each layer's input, {cell.config.task}: {layers}")


@app.command()
def sweep(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of one in the package: quick, ci.")],
    out: Annotated[Path | None, typer.Option(help="Run folder.  [default: the configuration's, or runs/NAME]")] = None,
    limit: Limit = None,
) -> None:
    """Run all methods × tasks of a configuration; run again, it skips what is done."""
    from .evals.config import load_config
    from .evals.sweep import save_tables

    settings, name = load_config(config)
    if limit is not None:
        settings = settings.model_copy(update={"limit": limit})
    folder = out or Path(settings.out or f"runs/{name}")
    cells = _sweep(settings, folder)
    save_tables(cells, folder)
    _print_tables(cells, folder)


@app.command()
def table(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run or sweep.")],
    form: Annotated[str, typer.Option("--format", metavar="text|md|csv|json", help="How to print it.")] = "text",
) -> None:
    """Print the table of a run folder again."""
    from .results.render import FORMATS, render
    from .results.store import Store
    from .results.tables import build

    if form not in FORMATS:
        raise OptionError(f"unknown format {form!r}: choose text, md, csv or json")
    print(render(build(Store(folder).cells()), form))


def _sweep(config: SweepConfig, folder: Path, *, dense: bool = True) -> list[Cell]:
    from .evals.sweep import sweep as run_sweep

    return run_sweep(config, folder, Console(stderr=True), dense=dense)


def _print_tables(cells: list[Cell], folder: Path) -> None:
    from .results.render import render
    from .results.tables import build

    print(render(build(cells)))
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"Stored in {folder}: `visibench table {folder}` prints all that is there."
    )


def _cell_json(cell: Cell) -> dict[str, Any]:
    metrics = cell.metrics.model_dump(mode="json")
    metrics["visual_tokens"] |= {"mean": cell.metrics.visual_tokens.mean, "last": cell.metrics.visual_tokens.last}
    metrics["executed_tflops"] = cell.metrics.compute.macs * 1e-12
    return {"folder": str(cell.path), "config": cell.config.model_dump(mode="json"), **metrics}


def _defaults(options: dict[str, Any]) -> str:
    """Options with their defaults, as they are written on the command line."""
    spelled = {k: o["default"] for k, o in options.items()}
    return ", ".join(f"{k}={'+'.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in spelled.items())


def _print_list(
    found: list[dict[str, Any]], header: list[str], rows: list[list[str]], also: str = "", *, as_json: bool
) -> None:
    """Print ``found`` as JSON, or ``rows`` as a table with the line ``also`` below."""
    if as_json:
        print(json.dumps(found, indent=1))
        return
    grid = RichTable(box=None, pad_edge=False, header_style="bold")
    for number, title in enumerate(header):
        grid.add_column(title, no_wrap=number == 0)
    for row in rows:
        grid.add_row(*map(escape, row))
    Console(width=_width(), highlight=False).print(grid)
    if also:
        print(also)


def _width() -> int:
    """Columns to print in: the terminal's, or many where the output goes to a file."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 160
