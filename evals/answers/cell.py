"""One cell: answered, scored, timed and stored, or its failures written down."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from ...engine.features import FeatureStore
from ...errors import IncompleteError, StorageError, disk_full
from ...methods import Method
from ...models import LoadedModel
from ...results.statistics.metrics import agreement
from ...results.store.records import CellConfig, CellMetrics, Compute, Failure, PrefillTime, VisualTokens, environment
from ...results.store.store import FAILURES, Cell, Store
from ..sweeps.cells import Plan
from ..tasks.tasks import Task

if TYPE_CHECKING:
    from .score import Evaluation


def claimed(
    cells: Sequence[Plan], store: Store, say: Callable[[str], Any], check: Callable[[], None]
) -> Generator[Plan, None, None]:
    """Cells one after the other, each while this process holds its claim; those of other processes when they let go.

    ``cells`` hold the dense ones first. A cell comes only behind its dense one, so that it can be compared with it:
    while another process works on that, all cells that do not depend on it come first. ``check`` is called now and
    then, also while this waits, and may raise.
    """
    todo, wait = list(cells), 0.0
    while todo:
        later: list[Plan] = []
        held: set[str] = set()
        for cell in todo:
            check()
            if cell.dense is not None and cell.dense.folder in held:
                later.append(cell)
                continue
            with store.claim(cell.config, wait=wait) as mine:
                if mine:
                    yield cell
                else:
                    later.append(cell)
                    held.add(cell.config.folder)
        stuck = len(later) == len(todo)
        if stuck and not wait:
            say(f"Waiting for {len(held)} cells of {store.root} that another process works on.")
        todo, wait = later, 1.0 if stuck else 0.0


def others(config: CellConfig, size: int, store: Store, since: float) -> Cell | None:
    """The cell if another process has finished it by now; :class:`IncompleteError` if it has failed there.

    ``since``: when this process began, in seconds since the epoch; older failures are to be tried again.
    """
    failures = store.failures(config, since)
    if failures:
        raise IncompleteError(_described(failures, size, store.path(config)))
    return store.done(config)


def run_cell(
    loaded: LoadedModel,
    method: Method,
    task: Task,
    config: CellConfig,
    store: Store,
    on_batch: Callable[[int], Any] | None = None,
    features: FeatureStore | None = None,
    *,
    dense: CellConfig | None = None,
) -> Cell:
    """Answer what is not answered yet, score, time and store a cell. The caller holds its claim.

    ``features``: where cells share what the vision tower computes for an image. Prefill is timed without it. ``dense``:
    the dense model's cell on the same questions. The samples get a column ``dense_agreement``: whether an answer is
    that cell's (see :func:`visibench.results.statistics.metrics.agreement`); null where that cell is not done by now
    (:func:`agreed` makes up for it), or was asked other questions.

    Raises :class:`IncompleteError` if some questions or the scoring failed: then the failures lie in the cell's folder,
    the cell is not done, and its good batches are kept for the next time. Raises :class:`StorageError` if the folder
    cannot be written.
    """
    from ..sweeps.torchrun import answer
    from .generate import failure
    from .score import score

    folder = store.begin(config)
    try:
        answers = answer(loaded, method, task, config, folder, on_batch=on_batch, features=features)
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
            prefill = _time(loaded, method, task, config)
            metrics = _metrics(evaluation, prefill, config, loaded)
            same = _agreement(evaluation.samples, metrics, config, store, dense)
            return store.finish(config, evaluation.samples.assign(dense_agreement=same), metrics)
    except StorageError:
        raise
    except Exception as error:
        if disk_full(error):
            raise StorageError(f"no room left on the disk ({error}): make room; what is finished is kept") from error
        failures = [failure(error)]
    store.fail(config, failures)
    raise IncompleteError(_described(failures, task.size(config.limit)[0], folder))


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


def _described(failures: list[Failure], size: int, folder: Path) -> str:
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
    reference = store.found(dense) if dense is not None else None
    if reference is None or reference.metrics.data_hash != metrics.data_hash:
        return pd.Series(pd.NA, samples.index, dtype="boolean")
    return agreement(reference.samples(), samples)


def _time(loaded: LoadedModel, method: Method, task: Task, config: CellConfig) -> PrefillTime | None:
    if config.timing is None:
        return None
    from ..compute.timing import time_prefill

    wanted = config.timing
    questions = [task.question(i) for i in range(min(wanted.batch_size, len(task.docs)))]
    inputs = loaded.inputs([prompt for prompt, _ in questions], [images for _, images in questions])
    timing = time_prefill(loaded, method, inputs, warmup=wanted.warmup, repeats=wanted.repeats)
    return PrefillTime(
        times_ms=list(timing.times_ms), warmup=timing.warmup, batch_size=timing.batch_size, device=timing.device
    )


def _metrics(result: Evaluation, prefill: PrefillTime | None, config: CellConfig, loaded: LoadedModel) -> CellMetrics:
    samples = result.samples
    tokens = list(zip(*samples["visual_tokens"], strict=True))
    macs = samples["executed_macs"].tolist()
    return CellMetrics(
        config_hash=config.digest(),
        size=result.size,
        total=result.total,
        note=result.note,
        remarks=result.remarks,
        nonfinite=result.nonfinite,
        reused_images=result.reused_images,
        scores=result.scores,
        metrics=result.metrics,
        categories=result.categories,
        visual_tokens=VisualTokens(
            prompt=statistics.fmean(samples["prompt_visual_tokens"]), per_layer=[statistics.fmean(t) for t in tokens]
        ),
        compute=Compute(macs=statistics.fmean(macs), macs_sd=statistics.pstdev(macs), components=result.components),
        prefill=prefill,
        generation=result.generation,
        seconds=result.seconds,
        data_hash=result.data_hash,
        environment=environment(loaded.describe()),
    )
