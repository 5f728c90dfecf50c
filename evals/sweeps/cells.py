"""What a sweep's configuration comes to: its cells."""

from __future__ import annotations

from ...methods import load_method
from ...methods.files import file_of
from ...models.load import fingerprint
from ...results.store import code
from ...results.store.records import CellConfig
from ..answers.cell_spec import CellSpec
from ..settings.config import DENSE, Variant, variants
from ..settings.method_spec import Solve, nowhere
from ..tasks.definitions import Definition
from ..tasks.tasks import EMBEDDED, data_of, defined, origin_of
from .config import SweepConfig


def cell_specs(config: SweepConfig, *, dense: bool = True, solve: Solve = nowhere) -> list[CellSpec]:
    """All cells of a sweep, the dense model first. Names and options are checked; nothing is loaded.

    ``solve`` is asked, after all checks, for the methods that have a budget.
    """
    tasks = defined(config.tasks, config.data, config.include_path)
    here = code.Here()
    return [
        cell
        for one in config.by_model()
        for cell in _of_model(one, tasks, variants(one, dense=dense, solve=solve), here)
    ]


def _of_model(config: SweepConfig, tasks: list[Definition], every: list[Variant], here: code.Here) -> list[CellSpec]:
    checkpoint = fingerprint(config.model)
    reference = next(
        (one for one in every if one.method.name == DENSE), Variant(load_method(DENSE), DENSE, every[0].seed)
    )
    cells = []
    for variant in every:
        for task in tasks:
            cell = _cell(config, checkpoint, variant, task, here)
            dense_cell = cell if cell.method == DENSE else _cell(config, checkpoint, reference, task, here)
            cells.append(CellSpec(cell, variant.method, dense_cell))
    return cells


def _cell(config: SweepConfig, checkpoint: str, variant: Variant, task: Definition, here: code.Here) -> CellConfig:
    file, origin = file_of(type(variant.method)), origin_of(task, config.data)
    where = {
        "method": file.path if file else type(variant.method).__module__,
        "task": task.place + ("+" if origin == EMBEDDED else ""),
    }
    hashes = {"method": here.method(where["method"]), "task": here.task(where["task"]), "engine": code.engine()}
    if data := data_of(task, origin):
        where["data"], hashes["data"] = data, here.data(data)
    return CellConfig(
        model=config.model,
        checkpoint=checkpoint,
        device=config.device,
        dtype=config.dtype,
        attention=config.attention,
        placed=config.placed,
        method=variant.method.name,
        options=variant.method.hyperparameters(),
        label=variant.label,
        title=variant.method.title,
        seed=variant.seed,
        task=task.name,
        origin=origin,
        limit=config.limit_of(task.name),
        batch_size=config.batch_size,
        timing=config.timing,
        protocol=config.asked.record(),
        method_file=file.path if file else "",
        method_hash=file.digest if file else "",
        control=variant.control,
        code={part: hashed for part, hashed in hashes.items() if hashed},
        sources=where,
    )
