"""Tables of a run folder: methods × tasks, with what each method really kept, computed and took.

Only cells that can be compared stand in one table. Others come as tables of their own, and each says in what it
differs.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, groupby
from typing import Any

import numpy as np

from ...errors import DataError
from ..statistics.inference import BASELINES, DENSE, Evidence, infer
from ..store.facts import differences, facts_of, questions_of
from ..store.records import ScoreRecord, VisualTokens
from ..store.store import Cell
from .titles import row_titles

_ORDER = {method: place for place, method in enumerate(BASELINES)}


@dataclass(frozen=True)
class SeedMean:
    """A mean over ``n`` seeds, with their standard deviation (None for a single one)."""

    mean: float
    sd: float | None = None
    n: int = 1

    @classmethod
    def over(cls, values: Sequence[float]) -> SeedMean | None:
        """Mean and standard deviation of ``values``; None if there are none."""
        if not values:
            return None
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True)
class PrefillTimes:
    """Median, quartiles, their range and minimum of ``n`` prefill times over tasks and seeds, in milliseconds."""

    median: float
    lower: float
    upper: float
    iqr: float
    min: float
    n: int


@dataclass(frozen=True)
class Latency:
    """Median over ``questions`` of all tasks and seeds of the milliseconds in which their batches were answered.

    ``batch``: the median number of questions in such a batch. ``reused``: questions of cells in which vision features
    were reused, so that some of these times leave out the vision tower.
    """

    median: float
    questions: int
    batch: float
    reused: int


@dataclass(frozen=True)
class MethodRow:
    """One method. ``scores``: by task and metric, lmms-eval's units. Tokens and MACs are means over tasks and seeds.

    ``macs``: of each question alone, and ``batch_macs`` what its batch executed for it, padding included (None: some
    cell did not record it). ``components``: the former by what spent them
    (:class:`~visibench.results.store.records.Compute`).
    ``evidence``: intervals, comparisons and loyalty from the answers to single questions. ``cells``: what it is made
    of, by task and seed.
    """

    label: str
    method: str
    options: dict[str, Any]
    seeds: list[int]
    scores: dict[str, dict[str, SeedMean]]
    retained: SeedMean | None
    tokens: VisualTokens
    macs: float
    batch_macs: float | None
    components: dict[str, float]
    prefill: PrefillTimes | None
    evidence: Evidence
    cells: tuple[Cell, ...] = ()

    @property
    def title(self) -> str:
        """What its run says the method is called in print; empty in early versions."""
        return self.cells[0].config.title if self.cells else ""

    def named(self, chosen: Callable[[Cell], bool]) -> str:
        """Its ``chosen`` cells by label, task and, where not all of a task's are, seed; empty if there are none."""
        tasks = []
        for task, group in groupby(self.cells, key=lambda cell: cell.config.task):
            cells = list(group)
            seeds = [cell.config.seed for cell in cells if chosen(cell)]
            only = f" (seed {' and '.join(map(str, seeds))})" if len(seeds) < len(cells) else ""
            tasks += [f"{task}{only}"] if seeds else []
        if len(tasks) > 1 and all(map(chosen, self.cells)):
            tasks = ["all tasks"]
        return f"{self.label} · {', '.join(tasks)}" if tasks else ""

    @cached_property
    def latency(self) -> Latency | None:
        """What the cells' samples say of the time of each question; None where they say nothing."""
        timed = [(cell, cell.table("latency_ms", "batch_questions").drop_null()) for cell in self.cells]
        times, batches = (
            np.concatenate([table[name].to_numpy() for _, table in timed]) for name in ("latency_ms", "batch_questions")
        )
        if not len(times):
            return None
        reused = sum(len(table) for cell, table in timed if cell.metrics.reused_images > 0)
        return Latency(float(np.median(times)), len(times), float(np.median(batches)), reused)


@dataclass(frozen=True)
class TaskQuestions:
    """How many questions of a task were asked, of how many, and where they come from."""

    asked: int
    of: int
    origin: str
    note: str


@dataclass(frozen=True)
class ResultTable:
    """Rows that can be compared. ``metrics``: of each task; ``facts``: what all cells have in common.

    ``differs``: in what this table differs from the others of the same folder. ``commits``: of visibench, where cells
    were made from a checkout. ``remarks``: what a reader must know of single cells.
    ``margin``: a share of the best score, within which differences were tested to be; None: they were not.
    """

    rows: list[MethodRow]
    metrics: dict[str, list[ScoreRecord]]
    questions: dict[str, TaskQuestions]
    facts: dict[str, Any]
    differs: dict[str, Any]
    commits: list[str]
    remarks: list[str]
    margin: float | None = None

    @property
    def is_subset(self) -> bool:
        """Whether some task was asked only in part."""
        return any(task.asked < task.of for task in self.questions.values())

    @cached_property
    def titles(self) -> dict[str, str]:
        """What its rows are called in print, by label."""
        return row_titles({row.label: row.title for row in self.rows})

    def grouped(self) -> list[tuple[str, list[MethodRow]]]:
        """The dense row without a title, then the others by similar T, the largest first, each group with its title."""
        groups: dict[int, list[MethodRow]] = defaultdict(list)
        for row in self.rows:
            groups[-1 if row.evidence.budget_group is None else row.evidence.budget_group].append(row)
        return [("" if place < 0 else _group_title(rows), rows) for place, rows in sorted(groups.items())]


def build(cells: Iterable[Cell], margin: float | None = None) -> list[ResultTable]:
    """Tables of comparable cells, the largest first. Raises :class:`DataError` for cells that contradict each other.

    ``margin``: test as well whether scores differ from their references by less than this share of the best score.
    """
    groups = _comparable(list(cells))
    differs = differences([group[0] for group in groups])
    return [_table(group, facts, margin) for group, facts in zip(groups, differs, strict=True)]


def _comparable(cells: list[Cell]) -> list[list[Cell]]:
    """Cells in groups that may stand in one table."""
    groups = _grouped(cells, lambda cell: json.dumps(facts_of(cell), sort_keys=True))
    result: list[list[Cell]] = []
    for group in groups:
        # One set of questions a task is one experiment; several for one task are several.
        mixed = any(len(chosen) > 1 for chosen in _by_task(group, lambda cell: json.dumps(questions_of(cell))).values())
        result += _grouped(group, lambda cell: json.dumps(questions_of(cell))) if mixed else [group]
    for group in result:
        for task, hashes in _by_task(group, lambda cell: cell.metrics.data_hash).items():
            if len(hashes) > 1:
                raise DataError(
                    f"cells of task {task!r} in {group[0].path.parent} were asked different questions although their "
                    "settings agree (the data have changed): delete the older cells and run them again"
                )
    return sorted(result, key=len, reverse=True)


def _table(cells: list[Cell], differs: dict[str, Any], margin: float | None) -> ResultTable:
    metrics = {cell.config.task: list(cell.metrics.scores) for cell in sorted(cells, key=lambda cell: cell.config.task)}
    questions = {
        c.config.task: TaskQuestions(c.metrics.size, c.metrics.total, c.config.origin, c.metrics.note) for c in cells
    }
    dense = {cell.config.task: cell.metrics.scores[0].value for cell in cells if cell.config.method == DENSE}
    groups = _grouped(cells, _method_key)
    rows = [_row(group, dense, evidence) for group, evidence in zip(groups, infer(groups, margin), strict=True)]
    rows.sort(key=lambda row: (_ORDER.get(row.method, len(_ORDER)), row.method, -row.tokens.mean, row.label))
    return ResultTable(
        rows=rows,
        metrics=metrics,
        questions=dict(sorted(questions.items())),
        facts=facts_of(cells[0]),
        differs=differs,
        commits=_commits(cells),
        remarks=[f"{_name(cell)}: {remark}" for cell in cells for remark in cell.metrics.remarks],
        margin=margin,
    )


def _group_title(rows: Sequence[MethodRow]) -> str:
    means = [row.tokens.mean for row in rows]
    low, high = f"{min(means):.1f}", f"{max(means):.1f}"
    span = low if low == high else f"{low} to {high}"
    share = f"{100 * sum(means) / len(means) / max(rows[0].tokens.prompt, 1):.0f} %"
    return f"T = {span} of {rows[0].tokens.prompt:g} visual tokens ({share})"


def _name(cell: Cell) -> str:
    return f"{cell.config.label} · {cell.config.task} · seed {cell.config.seed}"


def _commits(cells: list[Cell]) -> list[str]:
    codes = [cell.metrics.environment.code for cell in cells]
    named = [
        f"{code['commit'][:9]}{' with changes' if code.get('dirty') else ''}" for code in codes if "commit" in code
    ]
    return sorted(set(named))


def _method_key(cell: Cell) -> str:
    options = {key: value for key, value in cell.config.options.items() if key != "seed"}
    code = cell.config.code.get("method")
    return json.dumps([cell.config.label, cell.config.role, options, code], sort_keys=True)


def _row(cells: list[Cell], dense: dict[str, float], evidence: Evidence) -> MethodRow:
    config = cells[0].config
    scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        for score in cell.metrics.scores:
            scores[cell.config.task][score.key].append(score.value)
    tokens = [cell.metrics.visual_tokens for cell in cells]
    return MethodRow(
        label=config.label,
        method=config.role,
        options=config.options,
        seeds=sorted({cell.config.seed for cell in cells}),
        scores={task: {key: _seed_mean(values) for key, values in by.items()} for task, by in scores.items()},
        retained=_retained(cells, dense),
        tokens=VisualTokens(
            prompt=statistics.fmean(t.prompt for t in tokens),
            per_layer=[statistics.fmean(layer) for layer in zip(*(t.per_layer for t in tokens), strict=True)],
        ),
        macs=statistics.fmean(cell.metrics.compute.macs for cell in cells),
        batch_macs=_batch_macs(cells),
        components=_components(cells),
        prefill=_prefill(cells),
        evidence=evidence,
        cells=tuple(sorted(cells, key=lambda cell: (cell.config.task, cell.config.seed))),
    )


def _seed_mean(values: list[float]) -> SeedMean:
    mean = SeedMean.over(values)
    assert mean is not None
    return mean


def _retained(cells: list[Cell], dense: dict[str, float]) -> SeedMean | None:
    """Percent of the dense score, mean over the dense model's tasks, for each seed that has them all."""
    by_seed: dict[int, list[float]] = defaultdict(list)
    for cell in cells:
        reference = dense.get(cell.config.task, 0.0)
        if reference > 0:
            by_seed[cell.config.seed].append(100 * cell.metrics.scores[0].value / reference)
    wanted = sum(value > 0 for value in dense.values())
    return SeedMean.over([statistics.fmean(values) for values in by_seed.values() if len(values) == wanted])


def _batch_macs(cells: list[Cell]) -> float | None:
    known = [cell.metrics.compute.batch_macs for cell in cells]
    return statistics.fmean(macs for macs in known if macs is not None) if None not in known else None


def _components(cells: list[Cell]) -> dict[str, float]:
    parts = [cell.metrics.compute.components for cell in cells]
    return {name: statistics.fmean(part.get(name, 0.0) for part in parts) for name in dict.fromkeys(chain(*parts))}


def _prefill(cells: list[Cell]) -> PrefillTimes | None:
    times = [time for cell in cells if cell.metrics.prefill for time in cell.metrics.prefill.times_ms]
    if not times:
        return None
    lower, _, upper = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return PrefillTimes(statistics.median(times), lower, upper, upper - lower, min(times), len(times))


def _grouped(cells: list[Cell], key: Callable[[Cell], str]) -> list[list[Cell]]:
    groups: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[key(cell)].append(cell)
    return list(groups.values())


def _by_task(cells: list[Cell], value: Callable[[Cell], Any]) -> dict[str, set[Any]]:
    values: dict[str, set[Any]] = defaultdict(set)
    for cell in cells:
        values[cell.config.task].add(value(cell))
    return values
