"""Settings of methods for one model, found by measuring on questions that no evaluation asks.

Of each method, in two steps::

    search   on the first questions: all settings of a grid (:mod:`.searches`) in order of what they execute, until one
             keeps the target on every task; over all tasks together no more than half of what the target allows may
             change, since the cheapest of many settings that just reach it owes that to these questions
    confirm  on the next ones, which the search never saw: that setting, or else the search goes on a step dearer,
             until one reaches the target there too

The target is a share of answers that are the dense model's, on every task. What is reported of a chosen setting was
measured in the second step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from ..errors import DataError
from ..evals.answers.generate import picture_hash
from ..evals.settings.presets import Preset, PresetModel
from ..evals.tasks.tasks import Task
from ..methods import Method
from ..models import LoadedModel
from ..models.load import fingerprint
from ..results.store.calibration_records import CalibrationRecord, ChosenSetting
from ..results.store.records import environment
from .asking import Asker
from .bench import Candidate, SettingBench, given
from .candidates import SearchPrompts
from .fit import fit
from .searches import DEFAULT, GRIDS

STEP = 0.02
"""By how much of the dense compute the next setting to confirm is dearer than one that failed."""
PARTS = 3
"""In so many parts of a grid, by compute, a setting that was given up is measured for the frontier."""


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
    on_setting: Callable[[str], Any] = lambda text: None,
) -> CalibrationRecord:
    """Search and confirm settings of ``methods``, names in :data:`~.searches.GRIDS`.

    ``evaluation``: tasks whose questions must not be among those asked here. ``limit`` and ``confirm``: questions of
    each task in the two steps. ``prompts``: of the first task, for searches that look at prompts alone. ``authors``:
    settings by method, for the search of its authors (:mod:`.fit`) in place of the first step; their criterion is
    another one, so the second step measures what they find, whether or not it reaches the target. ``on_setting``:
    told before each setting which it is.

    Raises :class:`DataError` if a question of the evaluation is among them, and for tasks of too few questions.
    """
    check_enough(tasks, limit, confirm)
    check_apart(tasks, evaluation, limit + confirm)
    asked = Asker(loaded, limit, batch_size, seed), Asker(loaded, limit + confirm, batch_size, seed, skip=limit)
    search, second = SettingBench(asked[0], tasks, target, (1 + target) / 2), SettingBench(asked[1], tasks, target)
    prompts_of = SearchPrompts(search, min(prompts, limit))
    by_authors = {name: fit(name, loaded.model, prompts_of.first, **settings) for name, settings in authors.items()}
    grids: dict[str, int] = {}
    found = []
    for name in methods:
        if name in by_authors:
            found.append(_by_authors(by_authors[name].method, second))
            continue
        grid = GRIDS[name](prompts_of)
        grids[name] = len(grid)
        found.append(least(name, grid, search, second, on_setting))
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
        grids=grids,
        given_up={name: sum(key.partition(":")[0] == name for key in search.given_up) for name in grids},
        environment=environment(loaded.describe()),
    )


def _by_authors(method: Method, second: SettingBench) -> ChosenSetting:
    point = second.measure(method)
    return ChosenSetting(
        method=method.name, options=given(method), by="the search of its authors", point=point, nearest=None
    )


def least(
    name: str,
    grid: Sequence[Candidate],
    search: SettingBench,
    second: SettingBench,
    on_setting: Callable[[str], Any] = lambda text: None,
) -> ChosenSetting:
    """The setting of a ``grid`` that executes least of those that pass; behind one that is not confirmed, of those a
    step dearer. One that saves nothing is none.
    """
    grid = sorted((one for one in grid if one.macs < search.dense.macs), key=lambda one: one.macs)
    by = f"the least compute at which {search.target:.0%} of the answers are the dense model's"
    failed: list[Method] = []
    spent = 0.0
    for number, one in enumerate(grid, 1):
        if one.macs < spent:
            continue
        on_setting(f"{name}: setting {number} of {len(grid)}, {one.macs * 1e-9:.4g} GFLOPs")
        if not search.passes(one.method, one):
            continue
        if second.passes(one.method):
            _frontier(grid[: number - 1], search)
            point = second.measure(one.method)
            return ChosenSetting(method=name, options=given(one.method), by=by, point=point, nearest=None)
        failed.append(one.method)
        spent = one.macs + STEP * search.dense.macs
    nearest = failed or _frontier(grid, search)
    points = [second.measure(method) for method in nearest]
    beside = max(points, key=lambda point: (point.least.share, -point.macs), default=None)
    return ChosenSetting(method=name, options={}, by=by, point=None, nearest=beside)


def _frontier(grid: Sequence[Candidate], search: SettingBench) -> list[Method]:
    """Measure settings that were given up: of each part of the ``grid``, by compute, the one that changed fewest."""
    chosen: list[Method] = []
    edges = np.linspace(grid[0].macs, grid[-1].macs, PARTS + 1).tolist() if grid else []
    for first, end in pairwise(edges):
        inside = [one for one in grid if first <= one.macs <= end and str(one.method) in search.given_up]
        best = min(inside, key=lambda one: search.given_up[str(one.method)], default=None)
        if best is not None:
            search.measure(best.method, best)
            chosen.append(best.method)
    return chosen


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


def check_enough(tasks: Sequence[Task], limit: int, confirm: int) -> None:
    """Raise :class:`DataError` for a task without questions left to confirm on."""
    for task in tasks:
        there, first, all_ = len(task.docs), task.size(limit)[0], task.size(limit + confirm)[0]
        if there < limit + confirm or all_ <= first:
            raise DataError(
                f"{task.name} has {there} questions, fewer than --limit {limit} and --confirm {confirm} take together: "
                "give smaller ones, or --data with more questions"
            )


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


def write(record: CalibrationRecord, folder: Path) -> list[Path]:
    """Write a preset for each method that has a setting, ``METHOD.yaml``; the files."""
    files = []
    for name, preset in presets(record).items():
        files.append(folder / f"{name}.yaml")
        preset.write(files[-1])
    return files
