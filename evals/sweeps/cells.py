"""What a sweep's configuration comes to: its cells."""

from __future__ import annotations

from collections.abc import Mapping

from ...methods import load_method
from ...methods.files import file_of
from ...models.load import fingerprint
from ...results.store import code
from ...results.store.records import CellConfig
from ..answers.cell_spec import CellSpec
from ..settings.config import DENSE, Variant, variants
from ..settings.method_spec import Solve, nowhere
from ..tasks.tasks import EMBEDDED, origins, place_of
from .config import SweepConfig


def cell_specs(config: SweepConfig, *, dense: bool = True, solve: Solve = nowhere) -> list[CellSpec]:
    """All cells of a sweep, the dense model first. Names and options are checked; nothing is loaded.

    ``solve`` is asked, after all checks, for the methods that have a budget.
    """
    where = origins(config.tasks, config.data)
    return [cell for one in config.by_model() for cell in _of_model(one, where, dense, solve)]


def _of_model(config: SweepConfig, where: Mapping[str, str], dense: bool, solve: Solve) -> list[CellSpec]:
    checkpoint = fingerprint(config.model)
    every = variants(config, dense=dense, solve=solve)
    reference = next(
        (one for one in every if one.method.name == DENSE), Variant(load_method(DENSE), DENSE, every[0].seed)
    )
    cells = []
    for variant in every:
        for task, origin in where.items():
            cell = _cell(config, checkpoint, variant, task, origin)
            dense_cell = cell if cell.method == DENSE else _cell(config, checkpoint, reference, task, origin)
            cells.append(CellSpec(cell, variant.method, dense_cell))
    return cells


def _cell(config: SweepConfig, checkpoint: str, variant: Variant, task: str, origin: str) -> CellConfig:
    file = file_of(type(variant.method))
    where = {
        "method": file.path if file else type(variant.method).__module__,
        "task": place_of(task) + ("+" if origin == EMBEDDED else ""),
    }
    hashes = {"method": code.of_method(where["method"]), "task": code.of_task(where["task"]), "engine": code.engine()}
    return CellConfig(
        model=config.model,
        checkpoint=checkpoint,
        device=config.device,
        dtype=config.dtype,
        attention=config.attention,
        method=variant.method.name,
        options=variant.method.hyperparameters(),
        label=variant.label,
        seed=variant.seed,
        task=task,
        origin=origin,
        limit=config.limit_of(task),
        batch_size=config.batch_size,
        timing=config.timing,
        method_file=file.path if file else "",
        method_hash=file.digest if file else "",
        code={part: hashed for part, hashed in hashes.items() if hashed},
        sources=where,
    )
