"""One cell: answered, scored, timed and stored, or its failures written down."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from ...engine.vision.features import FeatureStore
from ...errors import FOREIGN, IncompleteError, StorageError, disk_full
from ...methods import Method
from ...models import LoadedModel
from ...results.statistics.metrics import agreement
from ...results.store.records import CellConfig, CellMetrics, Failure, PrefillTime, environment
from ...results.store.store import FAILURES, Cell, Store
from ..tasks.tasks import Task
from .cell_spec import CellSpec


def run_cell(
    loaded: LoadedModel,
    spec: CellSpec,
    task: Task,
    store: Store,
    on_batch: Callable[[int], Any] | None = None,
    features: FeatureStore | None = None,
) -> Cell:
    """Answer what is not answered yet, score, time and store a cell. The caller holds its claim.

    ``features``: where cells share what the vision tower computes for an image. Prefill is timed without it. The
    samples get a column ``dense_agreement``: whether an answer is that of the cell ``spec.dense`` (see
    :func:`visibench.results.statistics.metrics.agreement`); null where that cell is not done by now (:func:`agreed`
    makes up for it), or was asked other questions.

    Raises :class:`IncompleteError` if some questions or the scoring failed: then the failures lie in the cell's folder,
    the cell is not done, and its good batches are kept for the next time. Raises :class:`StorageError` if the folder
    cannot be written.
    """
    from . import generate
    from .score import score

    config, method = spec.config, spec.method
    folder = store.begin(config)
    try:
        answers = generate.answer(loaded, spec, task, folder, on_batch=on_batch, features=features)
        failures = answers.failures
        if not failures:
            evaluation = score(
                task,
                answers,
                limit=config.limit,
                batch_size=config.batch_size,
                seed=config.seed,
                output_dir=folder,
            )
            metrics = CellMetrics(
                **dict(evaluation.outcome),
                config_hash=config.digest(),
                prefill=_time(loaded, method, task, config, evaluation.samples),
                environment=environment(loaded.describe()),
            )
            same = _agreement(evaluation.samples, metrics, config, store, spec.dense)
            return store.finish(config, evaluation.samples.assign(dense_agreement=same), metrics)
    except StorageError:
        raise
    except FOREIGN as error:
        if disk_full(error):
            raise StorageError(f"no room left on the disk ({error}): make room; what is finished is kept") from error
        failures = [generate.failure(error)]
    store.fail(config, failures)
    raise IncompleteError(described(failures, task.size(config.limit)[0], folder))


def agreed(cell: Cell, dense: CellConfig | None, store: Store) -> Cell:
    """The finished cell, its ``dense_agreement`` filled in where the dense cell was done only after it.

    Processes that do this at once write the same files. A crash between the two costs the cell, which runs again.
    """
    samples = cell.samples()
    if samples["dense_agreement"].notna().all():
        return cell
    same = _agreement(samples, cell.metrics, cell.config, store, dense)
    if same.isna().all():
        return cell
    return store.finish(cell.config, samples.assign(dense_agreement=same), cell.metrics)


def described(failures: list[Failure], size: int, folder: Path) -> str:
    """What failed, and where it is written down."""
    failed = [failure for failure in failures if failure.doc_id is not None]
    whole = [failure.error for failure in failures if failure.doc_id is None]
    where = f"see {folder / FAILURES}"
    if not failed:
        return f"failed, {whole[0]}: {where}"
    which = f"question {failed[0].doc_id}" if len(failed) == 1 else f"first question {failed[0].doc_id}"
    described = [f"{len(failed)} of {size} questions failed, {which}, {failed[0].error}", *whole]
    return f"{'; '.join(described)}: {where}"


def _agreement(
    samples: pd.DataFrame, metrics: CellMetrics, config: CellConfig, store: Store, dense: CellConfig | None
) -> pd.Series:
    """Whether the answers are the dense model's, bool or null; the dense cell agrees with itself."""
    if config == dense:
        return agreement(samples, samples)
    reference = store.find(dense) if dense is not None else None
    if reference is None or reference.metrics.data_hash != metrics.data_hash:
        return pd.Series(pd.NA, samples.index, dtype="boolean")
    return agreement(reference.samples(), samples)


def _time(
    loaded: LoadedModel, method: Method, task: Task, config: CellConfig, samples: pd.DataFrame
) -> PrefillTime | None:
    if config.timing is None or config.control:  # which runs the method as well, and is no way to go faster
        return None
    from ..compute.timing import time_prefill

    repeats, count = config.timing, min(config.timing.batch_size, len(task.docs))
    doc_ids = _typical(samples, count) if method.adaptive else list(range(count))
    questions = [task.question(doc_id) for doc_id in doc_ids]
    inputs = loaded.inputs([prompt for prompt, _ in questions], [images for _, images in questions])
    timing = time_prefill(loaded, method, inputs, warmup=repeats.warmup, repeats=repeats.repeats)
    return PrefillTime(
        times_ms=list(timing.times_ms),
        warmup=timing.warmup,
        batch_size=timing.batch_size,
        device=timing.device,
        doc_ids=doc_ids,
    )


def _typical(samples: pd.DataFrame, count: int) -> list[int]:
    """So many questions in the middle by executed compute; of two in the middle the lower one."""
    by_compute = samples.sort_values(["executed_macs", "doc_id"])["doc_id"].tolist()
    start = max(len(by_compute) - count, 0) // 2
    return by_compute[start : start + count]
