"""Run methods on tasks, and print the tables of what was run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..errors import IncompleteError, OptionError
from . import live, scale
from .dry_run import show
from .shared import (
    AsJson,
    Attention,
    Compiled,
    Current,
    Device,
    DeviceMap,
    Dtype,
    FeatureCache,
    FewestPixels,
    Limit,
    Margin,
    MostPixels,
    Packed,
    finished,
    print_list,
    run_folder,
    share,
    terminal,
)

if TYPE_CHECKING:
    from ..evals.sweeps.config import SweepConfig
    from ..evals.sweeps.events import Reporter
    from ..evals.sweeps.executor import Executor
    from ..results.store.store import Cell
    from ..results.tables.tables import ResultTable

Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Set a value of the configuration, as in YAML: limit=20, timing=null, timing.repeats=5, or an option of a "
        "method by its name or label: methods.fastv.keep=0.5. Repeat it for several.",
    ),
]
AsEvents = Annotated[
    bool,
    typer.Option(
        "--json", help="Print events as they happen, one JSON object a line, and nothing else on standard output."
    ),
]

TASKS = (
    "Tasks, separated by commas: by name, see `visibench tasks`; or your own questions, FILE.jsonl, FILE.parquet or a "
    "folder of such, with :SCORER behind it if wanted (docs/your_data.md)."
)
DATA = (
    "embedded, hub, or a folder laid out like the hub: MME, POPE, textvqa and GQA as parquet, or as written by "
    "save_to_disk (then GQA_images and GQA_instructions)."
)
IncludePath = Annotated[
    str, typer.Option(metavar="DIR", help="Tasks of your own, by name: a folder of YAMLs as lmms-eval reads them.")
]
AskedBy = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="How the model is asked: hf, as the checkpoint says; llava-1.5, as its authors evaluate it; free-form; or "
        "FILE.yaml:NAME (docs/protocols.md). (default: hf, or the configuration's)",
    ),
]
METHOD = "E.g. fastv:layer=2,keep=0.5; see `visibench methods`. Or of a file: ./FILE.py:NAME:key=value."


def run(
    model: Annotated[str, typer.Option(help="tiny, a local folder, or a hub name.")],
    method: Annotated[str, typer.Option(metavar="NAME[:key=value,…]", help=METHOD)],
    task_list: Annotated[str, typer.Option("--tasks", metavar="A,B", help=TASKS)],
    limit: Limit = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at once.")] = 8,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attention: Attention = None,
    quantization: Packed = None,
    device_map: DeviceMap = None,
    compiled: Compiled = None,
    min_pixels: FewestPixels = None,
    max_pixels: MostPixels = None,
    seed: Annotated[int | None, typer.Option(help="For methods that draw. (default: 0)")] = None,
    data: Annotated[str, typer.Option(help=DATA)] = "embedded",
    include_path: IncludePath = "",
    protocol: AskedBy = None,
    control: Annotated[
        bool, typer.Option("--control", help="Also run random tokens at the method's own layers and counts, 3 seeds.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Run folder. (default: runs/MODEL)")] = None,
    timing: Annotated[bool, typer.Option(help="Time prefill, 20 times a task.")] = True,
    feature_cache_gb: FeatureCache = None,
    as_json: AsJson = False,
    wandb: live.WandbMode = "off",
    wandb_project: live.WandbProject = None,
    wandb_entity: live.WandbEntity = None,
    wandb_group: live.WandbGroup = None,
    wandb_tags: live.WandbTags = None,
) -> None:
    """Run one method on some tasks: scores, visual tokens by layer, compute and prefill time."""
    from ..evals.sweeps.config import parse_config

    _check_seed(method, seed)
    content: dict[str, Any] = {
        "model": model,
        "methods": [method],
        "tasks": [task.strip() for task in task_list.split(",") if task.strip()],
        "limit": limit,
        "batch_size": batch_size,
        "seeds": [seed or 0],
        "data": data,
        "include_path": include_path,
        "protocol": protocol or "hf",
        "control": control,
    }
    content |= {"device": device, "dtype": dtype}
    content |= _said(attention=attention, quantization=quantization, device_map=device_map, compile=compiled)
    content |= _said(min_pixels=min_pixels, max_pixels=max_pixels, feature_cache_gb=feature_cache_gb)
    if not timing:
        content["timing"] = None
    folder = out or run_folder(model)
    parsed = parse_config(content, "visibench run")
    destination = live.destination_asked(folder, wandb, wandb_project, wandb_entity, wandb_group, wandb_tags)
    with (
        live.sending(folder, destination) as sink,
        _sweep(parsed, folder, dense=False, report=live.listening(None, sink)) as cells,
    ):
        _print_run(cells, folder, as_json=as_json)


def sweep(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of one in the package: quick, ci.")],
    out: Annotated[Path | None, typer.Option(help="Run folder. (default: the configuration's, or runs/NAME)")] = None,
    limit: Limit = None,
    settings: Settings = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="A,B", help="Only these methods, by name or label, and the dense model.")
    ] = None,
    only_tasks: Annotated[list[str] | None, typer.Option(metavar="A,B", help="Only these tasks.")] = None,
    protocol: AskedBy = None,
    feature_cache_gb: FeatureCache = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what is done and what is to do, with compute and time, and stop.")
    ] = False,
    rate: Annotated[
        float | None,
        typer.Option(metavar="N", help="With --dry-run: 10¹² multiply-adds a second. (default: 40 % of a card's peak)"),
    ] = None,
    executor: scale.Named = "local",
    workers: scale.Workers = None,
    address: scale.Address = None,
    shard: scale.Shard = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors and the final table only.")] = False,
    as_json: AsEvents = False,
    wandb: live.WandbMode = "off",
    wandb_project: live.WandbProject = None,
    wandb_entity: live.WandbEntity = None,
    wandb_group: live.WandbGroup = None,
    wandb_tags: live.WandbTags = None,
) -> None:
    """Run all methods × tasks of a configuration; run again, it skips what is done."""
    from ..evals.sweeps.config import load_config, select
    from ..evals.sweeps.events import JsonLines, Reporter
    from ..evals.sweeps.sweep import save_tables

    given = [*(settings or []), *_set(limit=limit, feature_cache_gb=feature_cache_gb, protocol=protocol)]
    loaded, name = load_config(config, given)
    if out is not None and any(setting.partition("=")[0].strip() == "out" for setting in given):
        raise OptionError(f"out is given twice, in --set and as --out {out}: leave one of them out")
    chosen = select(loaded, only or [], only_tasks or [])
    folder = out or Path(chosen.out or f"runs/{name}")
    if quiet and as_json:
        raise OptionError("--quiet and --json exclude each other: give one")
    runs = scale.choose(executor, workers, address, shard, chosen.device)
    destination = live.destination_asked(folder, wandb, wandb_project, wandb_entity, wandb_group, wandb_tags)
    if dry_run:
        show(chosen, folder, rate, as_json=as_json)
        return
    if rate is not None:
        raise OptionError("--rate belongs to --dry-run: add it, or leave the rate out")
    report = JsonLines() if as_json else Reporter() if quiet else None
    with (
        live.sending(folder, destination, quiet=quiet) as sink,
        _sweep(chosen, folder, report=live.listening(report, sink), executor=runs) as cells,
    ):
        tables = save_tables(cells, folder)
        if not as_json:
            _print_tables(tables, folder, quiet=quiet)


def table(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run or sweep.")],
    form: Annotated[
        str, typer.Option("--format", metavar="text|md|latex|html|csv|json", help="How to print it.")
    ] = "text",
    columns: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,C",
            help="Columns in order, such as method,gqa,compute; a task names all its scores. list: print the columns "
            "that there are, and what they show. (default: all but those that are shown only where named)",
        ),
    ] = None,
    wide: Annotated[
        bool, typer.Option("--wide", help="In a terminal: all columns with their intervals, as in files.")
    ] = False,
    notes: Annotated[bool, typer.Option("--notes/--no-notes", help="What the table says below its rows.")] = True,
    margin: Margin = None,
    current: Current = False,
    style: Annotated[
        str | None, typer.Option(metavar="paper", help="With --format latex: booktabs, display names, values alone.")
    ] = None,
    caption: Annotated[str | None, typer.Option(help="With --style paper.")] = None,
    label: Annotated[str | None, typer.Option(help="With --style paper: of the table, such as tab:main.")] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="published", help="Compare with published figures instead of printing the table."),
    ] = None,
) -> None:
    """Print the table of a run folder again, or its results beside published figures."""
    if against is not None:
        stray = [name for name, value in (("columns", columns), ("margin", margin)) if value is not None]
        if stray:
            raise OptionError(f"--{stray[0]} and --against exclude each other: give one")
        print(_against(against, finished(folder, current=current), form))
        return
    from ..results.tables.columns import listing
    from ..results.tables.render import FORMATS, fitted, render
    from ..results.tables.tables import build

    if form not in FORMATS:
        raise OptionError(f"unknown format {form!r}: choose {', '.join(FORMATS)}")
    within = share(margin)
    tables = build(finished(folder, current=current), within)
    if columns == "list":
        print_list([], ["column", "what it shows"], [[*one] for one in listing(tables)], as_json=False)
        return
    names = [name.strip() for name in columns.split(",")] if columns is not None else None
    if style or caption or label:
        print(_paper(tables, names, form, style, caption or "", label or "", noted=notes))
        return
    print(
        fitted(tables, names, terminal(), wide=wide, noted=notes)
        if form == "text"
        else render(tables, form, names, noted=notes)
    )


def _paper(
    tables: list[ResultTable],
    names: list[str] | None,
    form: str,
    style: str | None,
    caption: str,
    label: str,
    *,
    noted: bool,
) -> str:
    """The tables for a paper."""
    from ..results.tables.columns import brief, choose
    from ..results.tables.paper import paper

    if style != "paper" or form != "latex":
        raise OptionError("--style paper, with --caption and --label, belongs to --format latex: give both")
    chosen = brief(tables) if names is None else choose(tables, names)
    return paper(tables, chosen, caption=caption, label=label, noted=noted)


def _against(name: str, cells: list[Cell], form: str) -> str:
    from ..results.published import matching

    if name != "published":
        raise OptionError(f"--against {name!r} is unknown: results can be compared with published")
    for cell in cells:
        cell.samples()  # not read here, but a damaged cell is refused whatever is asked of it
    return matching.render(matching.compare(cells), form, terminal())


@contextmanager
def _sweep(
    config: SweepConfig,
    folder: Path,
    *,
    dense: bool = True,
    report: Reporter | None = None,
    executor: Executor | None = None,
) -> Iterator[list[Cell]]:
    """Run a sweep and yield what is done; what failed is raised afterwards, or at once where nothing is done."""
    from ..evals.sweeps.sweep import sweep as run_sweep

    try:
        cells = run_sweep(config, folder, Console(stderr=True), dense=dense, report=report, executor=executor)
        problem = None
    except IncompleteError as error:
        if not error.cells:
            raise
        cells, problem = error.cells, error
    yield cells
    if problem is not None:
        raise problem


def _check_seed(method: str, seed: int | None) -> None:
    from ..evals.settings.method_spec import split

    _, options = split(method)
    if seed is not None and options.get("seed", str(seed)) != str(seed):
        raise OptionError(f"seed is given twice: {options['seed']} in --method and {seed} in --seed")


def _set(**given: float | str | None) -> list[str]:
    """Options that stand for values of the configuration, as ``--set`` takes them."""
    return [f"{name}={value}" for name, value in _said(**given).items()]


def _said(**given: Any) -> dict[str, Any]:
    """Options that were given."""
    return {name: value for name, value in given.items() if value is not None}


def _print_run(cells: list[Cell], folder: Path, *, as_json: bool) -> None:
    from ..results.tables.tables import build

    if as_json:
        print(json.dumps({"out": str(folder), "cells": [_cell_json(cell) for cell in cells]}, indent=1))
        return
    _print_tables(build(cells), folder)
    for cell in cells:
        layers = " ".join(f"{count:.4g}" for count in cell.metrics.visual_tokens.per_layer)
        print(f"Visual tokens at each layer's input, {cell.config.task}: {layers}")


def _print_tables(tables: list[ResultTable], folder: Path, *, quiet: bool = False) -> None:
    from ..results.tables.render import fitted

    print(fitted(tables, None, terminal()))
    Console(stderr=True, highlight=False, soft_wrap=True, quiet=quiet).print(
        f"Stored in {folder}: `visibench table {folder}` prints all that is there."
    )


def _cell_json(cell: Cell) -> dict[str, Any]:
    metrics = cell.metrics.model_dump(mode="json")
    metrics["visual_tokens"] |= {"mean": cell.metrics.visual_tokens.mean, "last": cell.metrics.visual_tokens.last}
    metrics["executed_tflops"] = cell.metrics.compute.macs * 1e-12
    return {"folder": str(cell.path), "config": cell.config.model_dump(mode="json"), **metrics}
