"""Find settings of methods for a model by measuring, on questions that no evaluation asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ..errors import OptionError
from ..utils.rows import laid_out
from .shared import AsJson, Device, Dtype, Seed, names, run_folder, width, wrapped

if TYPE_CHECKING:
    from ..evals.tasks.tasks import Task
    from ..results.store.calibration_records import CalibratedPoint, CalibrationRecord


Methods = Annotated[
    str | None,
    typer.Option(
        "--methods",
        "--method",
        metavar="visipruner,fastv,pyramiddrop,vtw,fitprune,readers",
        help="(default: all but readers, which is no paper's)",
    ),
]
Data = Annotated[
    str | None,
    typer.Option(help="Questions to calibrate on: hub, or a folder laid out like the hub. (default: the package's)"),
]
Evaluation = Annotated[str, typer.Option(help="Questions that must not be among them: embedded, hub, or a folder.")]
Least = Annotated[float, typer.Option(help="Least share of answers that are the dense model's, on each task.")]
Searched = Annotated[int, typer.Option(min=2, metavar="N", help="Questions of each task to search on.")]
Confirmed = Annotated[int, typer.Option(min=2, metavar="N", help="Others of each task to confirm on.")]
Divergence = Annotated[
    float | None, typer.Option(metavar="NATS", help="vtw by its authors' search: largest KL of the next token (0.003).")
]
Spared = Annotated[
    float | None,
    typer.Option(metavar="SHARE", help="fitprune by its authors': share of compute on visual tokens to spare."),
]


def calibrate(
    model: Annotated[str, typer.Option(help="tiny, a local folder, or a hub name.")],
    methods: Methods = None,
    task_list: Annotated[str, typer.Option("--tasks", metavar="A,B", help="Separated by commas.")] = "gqa,mme,pope",
    data: Data = None,
    evaluation: Evaluation = "embedded",
    target: Least = 0.98,
    limit: Searched = 50,
    confirm: Confirmed = 50,
    kl: Divergence = None,
    spare: Spared = None,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at once.")] = 10,
    out: Annotated[Path | None, typer.Option(help="Folder. (default: runs/MODEL/presets)")] = None,
    weights: Annotated[str, typer.Option(help="pretrained; others give no answers to keep.")] = "pretrained",
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Find the settings of methods that keep a model's answers at the least compute.

    Writes METHOD.yaml for each, used as METHOD@FILE.yaml; calibration.json, and its picture as PNG and SVG.
    """
    from ..analysis import calibrate as calibration
    from ..analysis import searches
    from ..analysis.stages import check_trained
    from ..models import load_model
    from ..models.load import check_outside
    from ..results.store import disk

    check_trained(weights)
    _check_share(target)
    wanted = names(methods, searches.GRIDS, "--methods") or list(searches.DEFAULT)
    authors = _authors(wanted, {"vtw": ("threshold", kl), "fitprune": ("target", spare)})
    folder = out or run_folder(model) / "presets"
    check_outside(folder, model)
    tasks, others = _asked(task_list, data, evaluation)
    loaded = load_model(model, device=device, dtype=dtype)
    with disk.made(folder), _told(wanted) as on_setting:
        record = calibration.calibrate(
            loaded,
            tasks,
            wanted,
            evaluation=others,
            target=target,
            limit=limit,
            confirm=confirm,
            batch_size=batch_size,
            authors=authors,
            seed=seed,
            on_setting=on_setting,
        )
        files = [*calibration.write(record, folder), *_written(record, folder)]
    if as_json:
        print(record.model_dump_json(indent=1))
        return
    _print(record, folder)
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"Stored: {', '.join(map(str, files))}.")


@contextmanager
def _told(wanted: list[str]) -> Iterator[Callable[[str], None]]:
    """A line on standard error with the latest setting."""
    with Console(stderr=True).status(f"Asking {', '.join(wanted)} …") as status:
        yield lambda text: status.update(text)


def _check_share(target: float) -> None:
    if not 0 < target <= 1:
        raise OptionError(f"--target {target:g} is no share of answers: give one above 0 and up to 1, such as 0.98")


def _asked(task_list: str, data: str | None, evaluation: str) -> tuple[list[Task], list[Task]]:
    """The tasks to calibrate on, and those of the evaluation."""
    from ..evals.tasks.tasks import load_tasks

    chosen = [task.strip() for task in task_list.split(",") if task.strip()]
    return load_tasks(chosen, _calibration() if data is None else data), load_tasks(chosen, evaluation)


def _calibration() -> str:
    from .. import synthetic

    return str(synthetic.ensure(calibration=True))


def _authors(wanted: list[str], given: dict[str, tuple[str, float | None]]) -> dict[str, dict[str, float]]:
    """Settings of the authors' searches, by method."""
    from ..analysis import fit

    found = {name: {setting: value} for name, (setting, value) in given.items() if value is not None}
    for name, settings in found.items():
        if name not in wanted:
            raise OptionError(f"an option of {name} is given, which is not among --methods: add it, or leave it out")
        fit.check(name, settings)
    return found


def _written(record: CalibrationRecord, folder: Path) -> list[Path]:
    from ..results.figures import calibration as picture
    from ..results.figures import style
    from ..results.store import calibration_records, disk

    file = folder / calibration_records.CALIBRATION
    with disk.writing(file):
        disk.write(file, record.model_dump_json(indent=1))
    pictures = [folder / f"calibration.{form}" for form in style.FORMATS]
    for one in pictures:
        style.save(picture.draw(record), one)
    return [file, *pictures]


def _print(record: CalibrationRecord, folder: Path) -> None:
    header = ["setting", "GFLOPs", "of dense", "T", *record.tasks, "lower bound"]
    rows = []
    for chosen in record.chosen:
        point = chosen.point or chosen.nearest
        if point is None:
            rows.append([f"{chosen.method}: nothing to search", *["–"] * (len(header) - 1)])
            continue
        reached = "" if chosen.point else f"{chosen.method}: none reaches {record.target:.0%}; nearest: "
        rows.append([f"{reached}{point.spec}", *_figures(point, record), f"{point.least.low:.1%}"])
    print(laid_out(header, rows, width(), header[1:]))
    wrapped(
        f"Answers as dense on {record.confirmed} questions of each task that the search did not see; lower bound: of "
        "the 95 % interval of the task where fewest are, clustered by image. GFLOPs: multiply-adds of a prefill."
    )
    best = [point for chosen in record.chosen for point in record.frontier(chosen.method)]
    print()
    print(laid_out(header[:-1], [[point.spec, *_figures(point, record)] for point in best], width(), header[1:]))
    asked = ", ".join(f"{record.given_up[name]} of {there} ({name})" for name, there in record.grids.items())
    wrapped(
        f"Frontier: settings that no other of their method beats, of those that were asked all {record.searched} "
        "questions of each task that were searched on. Given up from the cheapest on, each as soon as the target was "
        f"out of reach: {asked}."
    )
    for chosen in record.chosen:
        if chosen.point is not None:
            print(f"--method {chosen.method}@{folder / chosen.method}.yaml")
        elif chosen.method == "visipruner":
            wrapped("Where VisiPruner's rule keeps too few answers, readers may keep more: --methods readers.")


def _figures(point: CalibratedPoint, record: CalibrationRecord) -> list[str]:
    shares = [f"{point.agreement[task].share:.1%}" for task in record.tasks]
    return [f"{point.macs * 1e-9:.4f}", f"{point.macs / record.dense_macs:.1%}", f"{point.tokens:.1f}", *shares]
