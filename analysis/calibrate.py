"""Settings of methods for one model, found by measuring on questions that no evaluation asks.

Of each method, in two steps::

    search   on the first questions: what to measure is chosen by what was measured before (:mod:`.searches`); over all
             tasks together no more than half of what the target allows may change, since the cheapest of many
             settings that just reach it owes that to these questions
    confirm  on the next ones, which the search never saw: the cheapest setting that reached the target, or one that
             is dearer by a step, until one reaches it there too

The target is a share of answers that are the dense model's, on every task. What is reported of a chosen setting was
measured in the second step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import DataError
from ..evals.answers.generate import picture_hash
from ..evals.settings.presets import Preset, PresetModel
from ..evals.tasks.tasks import Task
from ..methods import Method
from ..models import LoadedModel
from ..models.load import fingerprint
from ..results.store.calibration_records import CalibratedPoint, CalibrationRecord, ChosenSetting
from ..results.store.records import environment
from .asking import Asker
from .bench import SettingBench, given
from .fit import fit
from .searches import DEFAULT, SEARCHES

STEP = 0.02
"""By how much of the dense compute the next setting to confirm is dearer than one that failed."""


def calibrate(
    loaded: LoadedModel,
    tasks: Sequence[Task],
    methods: Sequence[str] = DEFAULT,
    *,
    evaluation: Sequence[Task] = (),
    target: float = 0.98,
    limit: int = 50,
    confirm: int = 50,
    batch_size: int = 10,
    prompts: int = 16,
    authors: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    seed: int = 0,
    on_point: Callable[[CalibratedPoint], Any] = lambda point: None,
) -> CalibrationRecord:
    """Search and confirm settings of ``methods``, names in :data:`~.searches.SEARCHES`.

    ``evaluation``: tasks whose questions must not be among those asked here. ``limit`` and ``confirm``: questions of
    each task in the two steps. ``prompts``: of the first task, for searches that look at prompts alone. ``authors``:
    settings by method, for the search of its authors (:mod:`.fit`) in place of the first step; their criterion is
    another one, so the second step measures what they find, whether or not it reaches the target.

    Raises :class:`DataError` if a question of the evaluation is among them.
    """
    check_apart(tasks, evaluation, limit + confirm)
    asked = Asker(loaded, limit, batch_size, seed), Asker(loaded, limit + confirm, batch_size, seed, skip=limit)
    search = SettingBench(asked[0], tasks, target, (1 + target) / 2, on_point)
    second = SettingBench(asked[1], tasks, target, on_point=on_point)
    inputs = cache(lambda: _inputs(loaded, tasks[0], min(prompts, limit), batch_size))
    by_authors = {name: fit(name, loaded.model, inputs(), **settings).method for name, settings in authors.items()}
    for name in methods:
        if name not in by_authors:
            SEARCHES[name](search, loaded.geometry.layers, inputs)
    found = [
        _by_authors(by_authors[name], second) if name in by_authors else _confirmed(name, search, second)
        for name in methods
    ]
    return CalibrationRecord(
        model=loaded.name,
        checkpoint=fingerprint(loaded.name),
        target=target,
        tasks={task.name: task.origin for task in tasks},
        evaluation={task.name: task.origin for task in evaluation},
        searched=limit,
        confirmed=confirm,
        seed=seed,
        dense_macs=second.dense.macs,
        dense_tokens=second.dense.tokens,
        chosen=found,
        points=[*search.points.values(), *second.points.values()],
        environment=environment(loaded.describe()),
    )


def _by_authors(method: Method, second: SettingBench) -> ChosenSetting:
    point = second.measure(method, everywhere=True)
    return ChosenSetting(
        method=method.name, options=given(method), by="the search of its authors", point=point, nearest=None
    )


def _confirmed(name: str, search: SettingBench, second: SettingBench) -> ChosenSetting:
    """The cheapest setting found that the second step confirms; each next one is dearer by a step."""
    by = f"the least compute at which {search.target:.0%} of the answers are the dense model's"
    failed: list[Method] = []
    spent = 0.0
    for method in (method for method in search.cheapest() if method.name == name):
        if search.measure(method).macs < spent:
            continue
        if second.passes(method):
            point = second.measure(method)
            return ChosenSetting(method=name, options=given(method), by=by, point=point, nearest=None)
        failed.append(method)
        spent = search.measure(method).macs + STEP * search.dense.macs
    nearest = second.nearest(failed) or search.nearest(one for one in search.methods.values() if one.name == name)
    beside = None if nearest is None else second.measure(nearest, everywhere=True)
    return ChosenSetting(method=name, options={}, by=by, point=None, nearest=beside)


def presets(record: CalibrationRecord) -> dict[str, Preset]:
    """A preset for each method that has a setting."""
    facts = record.environment
    without = {
        one.method: f"none reaches {record.target:.0%}; nearest: {one.nearest.spec}, {one.nearest.least.share:.2%}"
        for one in record.chosen
        if one.nearest is not None
    }
    found = {}
    for chosen in record.chosen:
        if chosen.point is None:
            continue
        agreement = {
            task: f"{one.share:.2%} [{one.low:.2%}, {one.high:.2%}], {one.questions} questions, {one.images} images"
            for task, one in chosen.point.agreement.items()
        }
        found[chosen.method] = Preset(
            method=chosen.method,
            options=chosen.options,
            source=f"visibench calibrate, on {record.model} and {', '.join(record.tasks)}: {chosen.by}",
            model=PresetModel(name=record.model, checkpoint=record.checkpoint),
            evidence={
                "agreement with dense, 95 % intervals by image": agreement,
                "GFLOPs (multiply-adds) of a prefill": round(chosen.point.macs * 1e-9, 4),
                "of dense": round(record.dense_macs * 1e-9, 4),
                "visual tokens, mean over layers": round(chosen.point.tokens, 1),
                **({"methods without a setting": without} if without else {}),
                "questions of each task": {"search": record.searched, "confirmation": record.confirmed},
                "data": {**record.tasks},
                "seed": record.seed,
                "versions": {**facts.versions},
                "hardware": str(facts.model.get("hardware")),
                "dtype": str(facts.model.get("dtype")),
            },
        )
    return found


def check_apart(tasks: Sequence[Task], evaluation: Sequence[Task], limit: int) -> None:
    """Raise :class:`DataError` if one of the first ``limit`` questions of a task is one of its evaluation's."""
    asked_there = {task.name: task for task in evaluation}
    for task in tasks:
        other = asked_there.get(task.name)
        if other is None:
            continue
        same = 0
        by_text: dict[str, list[int]] = defaultdict(list)
        for doc_id in range(len(other.docs)):
            by_text[other.text(doc_id)].append(doc_id)
        theirs: dict[int, str] = {}
        for doc_id in range(task.size(limit)[0]):
            alike = by_text.get(task.text(doc_id), [])
            ours = picture_hash(task.images(doc_id)) if alike else ""
            for twin in alike:
                if twin not in theirs:
                    theirs[twin] = picture_hash(other.images(twin))
            same += any(theirs[twin] == ours for twin in alike)
        if same:
            raise DataError(
                f"{task.name}: {same} of the questions to calibrate on are among those of the evaluation "
                f"({other.origin}): give --data a folder of other questions, or --evaluation what you evaluate on"
            )


def _inputs(loaded: LoadedModel, task: Task, count: int, batch_size: int) -> list[dict[str, Any]]:
    """Model inputs of the first ``count`` questions, in batches."""
    batches = []
    for start in range(0, count, batch_size):
        questions, images = zip(*map(task.question, range(start, min(start + batch_size, count))), strict=True)
        batches.append(dict(loaded.inputs(list(questions), list(images))))
    return batches


def write(record: CalibrationRecord, folder: Path) -> list[Path]:
    """Write a preset for each method that has a setting, ``METHOD.yaml``; the files."""
    files = []
    for name, preset in presets(record).items():
        files.append(folder / f"{name}.yaml")
        preset.write(files[-1])
    return files
