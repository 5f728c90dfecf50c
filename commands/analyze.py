"""Measure how a model fuses images: what its layers look at, what is lost without vision, where stages lie."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ..errors import OptionError
from .shared import AsJson, Device, Dtype, Seed, integers, names, progress, run_folder

if TYPE_CHECKING:
    from ..results.store.stage_records import StageRecord

JOURNAL = "stages.jsonl"
MOST_LAYERS = 2_000
"""That a model may have."""


def analyze(
    model: Annotated[str, typer.Option(help="tiny, a local folder, or a hub name.")],
    task_list: Annotated[
        str, typer.Option("--tasks", metavar="A,B", help="Tasks, separated by commas.")
    ] = "gqa,mme,textvqa_val,pope",
    data: Annotated[str, typer.Option(help="embedded, hub, or a folder laid out like the hub.")] = "embedded",
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="Ask only the first N questions of each task.")] = 20,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at once.")] = 20,
    layers: Annotated[
        str | None, typer.Option(metavar="A,B,C-D", help="Look at these decoder layers alone. (default: all)")
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            metavar="attention,values,contributions,lens,windows", help="Measure these alone. (default: all of them)"
        ),
    ] = None,
    against: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the analysis in this stages.json beside it.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder. (default: runs/MODEL)")] = None,
    weights: Annotated[str, typer.Option(help="pretrained; there is nothing to see in others.")] = "pretrained",
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure how a model fuses images, layer by layer, and find the stages of it.

    Writes stages.json, stages.png and stages.svg; `visibench report` shows them. Interrupted, it goes on where it was.
    """
    from ..analysis import stages
    from ..evals.tasks.tasks import load_tasks
    from ..models import load_model
    from ..models.load import check_outside
    from ..results.store import stage_records

    stages.check_trained(weights)
    parts = names(only, stages.PARTS, "--only") or list(stages.PARTS)
    wanted = _layers(layers)
    beside = None if against is None else stage_records.read(against)
    folder = out or run_folder(model)
    check_outside(folder, model)
    tasks = load_tasks([task.strip() for task in task_list.split(",") if task.strip()], data)
    loaded = load_model(model, device=device, dtype=dtype)
    analysis = stages.StageAnalysis(loaded, tasks, wanted, parts, limit, batch_size, seed, folder / JOURNAL)
    questions = sum(task.size(limit)[0] for task in tasks)
    with progress(f"Analysing {model}", questions * analysis.passes) as analysis.on_batch:
        record = analysis.run()
    files = _written(record, beside, folder)
    if as_json:
        print(record.model_dump_json(indent=1))
        return
    _print(record, beside)
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"Stored in {files[0]}; drawn in {' and '.join(map(str, files[1:]))}."
    )


def _written(record: StageRecord, beside: StageRecord | None, folder: Path) -> list[Path]:
    """The files that are written: the record, and its pictures."""
    from ..results.figures import stages as page
    from ..results.figures import style
    from ..results.store import disk, stage_records

    file = folder / stage_records.STAGES
    with disk.writing(file):
        disk.write(file, record.model_dump_json(indent=1))
    pictures = [folder / f"stages.{form}" for form in ("png", "svg")]
    for picture in pictures:
        style.save(page.draw(record, beside), picture)
    return [file, *pictures]


def _print(record: StageRecord, beside: StageRecord | None) -> None:
    for one in filter(None, (record, beside)):
        asked = ", ".join(f"{of.asked} of {of.total} {name}" for name, of in one.tasks.items())
        print(f"{one.model}, {one.depth} decoder layers, {asked}:")
        for found in one.stages:
            spread = ""
            if found.begins is not None and found.ends is not None:
                spread = (
                    f" (fusion begins {found.begin}, quartiles {found.begins[0]:g}–{found.begins[1]:g}; ends before "
                    f"{found.end}, {found.ends[0]:g}–{found.ends[1]:g}; {found.needed} of {found.asked} questions "
                    "need their image)"
                )
            print(f"  {found.task}, by the {found.by}: {found.said(one.depth)}{spread}")
        if not one.stages:
            print("  no windows were measured, so no stages are sought")


def _layers(text: str | None) -> list[int]:
    """Numbers and ranges, separated by commas."""
    found: list[int] = []
    for part in text.split(",") if text is not None else []:
        ends = integers(part, "-", "--layers")
        if len(ends) > 2 or not ends[0] <= ends[-1] < MOST_LAYERS:
            raise OptionError(f"--layers: expected numbers and ranges such as 0,2,4-7, not {part!r}")
        found += range(ends[0], ends[-1] + 1)
    return found
