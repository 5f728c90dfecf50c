"""Fit a method's hyperparameters to a model on a few prompts of a task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..errors import DataError, OptionError
from .shared import AsJson, Device, Dtype

if TYPE_CHECKING:
    from ..analysis.fit import Fitted
    from ..evals.tasks.tasks import Task
    from ..models import LoadedModel


def fit(
    method: Annotated[str, typer.Argument(help="fitprune or vtw.")],
    model: Annotated[str, typer.Option(help="tiny, a local folder, or a hub name.")],
    target: Annotated[
        float | None, typer.Option(help="fitprune: share of the decoder's compute on visual tokens to spare.")
    ] = None,
    tolerance: Annotated[float | None, typer.Option(help="fitprune: how closely to search (default 0.01).")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="vtw: largest KL divergence of the next token, in nats (default 0.003).")
    ] = None,
    first: Annotated[int | None, typer.Option(help="vtw: the first layer to try (default 5).")] = None,
    samples: Annotated[int, typer.Option(min=1, metavar="N", help="Number of prompts.")] = 32,
    task: Annotated[str, typer.Option(help="The prompts are a task's questions, drawn without their answers.")] = "gqa",
    data: Annotated[str, typer.Option(help="embedded, hub, or a folder laid out like the hub.")] = "embedded",
    seed: Annotated[int, typer.Option(help="Draws the prompts.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 8,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Annotated[Path | None, typer.Option(help="Write what was found, and on what, to this YAML file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Fit a method to a model: FitPrune's schedule for a target, VTW's layer for a threshold."""
    from ..analysis import fit as searches
    from ..evals.tasks.tasks import load_tasks
    from ..models import load_model

    given = {"target": target, "tolerance": tolerance, "threshold": threshold, "first": first}
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    searches.check(method, settings)
    if out is not None and not out.parent.is_dir():
        raise DataError(f"cannot write {out}: no folder {out.parent}")
    (loaded_task,) = load_tasks([task], data)
    drawn = _draw(loaded_task, samples, seed)
    loaded = load_model(model, device=device, dtype=dtype)
    with Console(stderr=True).status(f"Fitting {method} on {samples} prompts …"):
        fitted = searches.fit(method, loaded.model, _inputs(loaded, loaded_task, drawn, batch_size), **settings)
    prompts = {"task": task, "origin": loaded_task.origin, "seed": seed, "of": len(loaded_task.docs), "ids": drawn}
    result = _result(fitted, settings) | {"prompts": prompts, "model": loaded.describe()}
    if out is not None:
        _write(result, out)
    if as_json:
        print(json.dumps(result, indent=1))
        return
    print(f"{method} on {model}, {samples} of {len(loaded_task.docs)} prompts of {task}: {fitted.summary}")
    print(f'--method "{fitted.method}"')


def _draw(task: Task, count: int, seed: int) -> list[int]:
    """Row numbers of ``count`` of the task's questions, ascending."""
    import random

    total = len(task.docs)
    if count > total:
        raise OptionError(f"{task.name} has {total} questions, fewer than {count} samples: give --samples {total}")
    return sorted(random.Random(seed).sample(range(total), count))


def _inputs(loaded: LoadedModel, task: Task, drawn: list[int], batch_size: int) -> list[dict[str, Any]]:
    """Model inputs in batches."""
    batches = []
    for start in range(0, len(drawn), batch_size):
        questions, images = zip(*map(task.question, drawn[start : start + batch_size]), strict=True)
        batches.append(dict(loaded.inputs(list(questions), list(images))))
    return batches


def _result(fitted: Fitted, settings: dict[str, Any]) -> dict[str, Any]:
    """The method, on the command line and as an entry of a sweep configuration, and the numbers of the search."""
    import dataclasses

    method = fitted.method
    chosen = [field.name for field in dataclasses.fields(method) if getattr(method, field.name) != field.default]
    options = {name: value for name, value in method.hyperparameters().items() if name in chosen}
    return {
        "spec": str(method),
        "method": {"name": method.name} | options,
        "found": fitted.outcome,
        "settings": settings,
    }


def _write(result: dict[str, Any], file: Path) -> None:
    import yaml

    try:
        file.write_text(yaml.safe_dump(result, sort_keys=False, default_flow_style=None, width=120), encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot write {file}: {error.strerror}") from error
