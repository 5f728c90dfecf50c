"""What happens in a sweep, as events, and who tells of it: bars on a terminal, plain lines, or JSON.

Events are what ``visibench sweep --json`` prints: one JSON object a line on standard output, nothing else there, in
the order in which things happened. ``docs/events.md`` describes them for their readers.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from ...errors import shortened
from ...results.store.records import CellConfig, CellMetrics, Record, ScoreRecord


class Named(Record):
    """A cell: what it runs, its number among the ``of`` cells of its model that had to run, and its questions."""

    model: str
    method: str
    label: str
    task: str
    seed: int
    number: int
    of: int
    questions: int
    folder: str

    @classmethod
    def cell(cls, config: CellConfig, number: int, of: int, questions: int) -> Named:
        """Of a cell's configuration. ``folder``: below ``cells`` in the run folder."""
        names = ("model", "method", "label", "task", "seed", "folder")
        return cls(**{name: getattr(config, name) for name in names}, number=number, of=of, questions=questions)


class SweepStarted(Record):
    """Before anything is loaded. ``out``: the run folder."""

    event: Literal["sweep_started"] = "sweep_started"
    out: str
    models: list[str]
    tasks: list[str]


class ModelStarted(Record):
    """Of ``cells`` of this model ``done`` were there already; the rest asks ``questions``, cells added up."""

    event: Literal["model_started"] = "model_started"
    model: str
    cells: int
    done: int
    questions: int


class CellStarted(Record):
    """A cell begins."""

    event: Literal["cell_started"] = "cell_started"
    cell: Named


class Answered(Record):
    """A batch of the cell is answered: ``answered`` questions so far, ``seconds`` after its start."""

    event: Literal["progress"] = "progress"
    cell: Named
    answered: int
    seconds: float


class CellFinished(Record):
    """A cell is stored. ``scores`` in lmms-eval's units; ``seconds`` with scoring and timing."""

    event: Literal["cell_finished"] = "cell_finished"
    cell: Named
    scores: list[ScoreRecord]
    visual_tokens: float
    executed_macs: float
    seconds: float

    @classmethod
    def of(cls, cell: Named, metrics: CellMetrics, seconds: float) -> CellFinished:
        """With what was found."""
        tokens, macs = metrics.visual_tokens.mean, metrics.compute.macs
        return cls(cell=cell, scores=metrics.scores, visual_tokens=tokens, executed_macs=macs, seconds=seconds)


class CellFailed(Record):
    """A cell could not be finished; ``problem`` says why. What it has answered is kept for the next time."""

    event: Literal["cell_failed"] = "cell_failed"
    cell: Named
    problem: str
    seconds: float


class Note(Record):
    """What a user should know on the way."""

    event: Literal["note"] = "note"
    text: str


class SweepFinished(Record):
    """All is stored: ``cells`` in all, those of earlier runs included."""

    event: Literal["sweep_finished"] = "sweep_finished"
    out: str
    cells: int
    seconds: float


Event = SweepStarted | ModelStarted | CellStarted | Answered | CellFinished | CellFailed | Note | SweepFinished


class Reporter:
    """Receives events; says nothing. Subclasses answer to the kinds of events that they tell of."""

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def __call__(self, event: Event) -> None:
        """Tell of an event."""
        tell = getattr(self, event.event, None)
        if tell is not None:
            tell(event)


class JsonLines(Reporter):
    """One JSON object a line on standard output."""

    def __init__(self) -> None:
        self.stream = sys.stdout  # what it is now: while lmms-eval runs, its name stands for standard error

    def __call__(self, event: Event) -> None:
        print(event.model_dump_json(), file=self.stream, flush=True)


EVERY = 60.0
"""Seconds between plain lines on a cell that runs."""


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as many as matter."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{seconds / 60:.1f} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class Lines(Reporter):
    """A line for every finished cell, and one now and then on those that run."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.told = time.monotonic()
        self.recent: dict[str, deque[tuple[int, float]]] = {}

    def cell_started(self, event: CellStarted) -> None:
        self.recent[event.cell.folder] = deque([(0, 0.0)])

    def progress(self, event: Answered) -> None:
        # The pace of late: what an interrupted run had kept comes first, and in no time.
        recent = self.recent[event.cell.folder]
        recent.append((event.answered, event.seconds))
        while len(recent) > 2 and recent[1][1] <= event.seconds - EVERY / 2:
            recent.popleft()
        answered, seconds = (now - then for now, then in zip(recent[-1], recent[0], strict=True))
        if time.monotonic() - self.told < EVERY or not answered or not seconds:
            return
        self.told = time.monotonic()
        left = duration((event.cell.questions - event.answered) * seconds / answered)
        so_far = f"{event.answered} of {event.cell.questions} questions"
        self._outcome(event.cell, f"{so_far}, {answered / seconds:.3g} questions/s, {left} left in this cell")

    def model_started(self, event: ModelStarted) -> None:
        if event.done:
            self._say(f"{event.model}: {event.done} of {event.cells} cells are done already")

    def cell_finished(self, event: CellFinished) -> None:
        score = event.scores[0]
        self._outcome(event.cell, f"{score.title} {score.value:.4g} ({event.seconds:.1f} s)")

    def cell_failed(self, event: CellFailed) -> None:
        self._outcome(event.cell, event.problem)

    def note(self, event: Note) -> None:
        self._say(event.text)

    def _outcome(self, cell: Named, outcome: str) -> None:
        self._say(f"[{cell.number}/{cell.of}] {cell.label} · {cell.task} · seed {cell.seed}: {outcome}")

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class Bars(Lines):
    """The same above a bar over all questions with rate, time left and the latest score, and one for each open cell."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        # The latest score goes first where the terminal is narrow, then the end of a label; never a number.
        self.spare = console.width - _NUMBERS
        columns = [
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            _Rate(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        ]
        columns += [TextColumn("{task.fields[score]}")] if self.spare >= 2 * _SCORE else []
        self.bars = Progress(*columns, console=console, transient=True)
        self.total: TaskID | None = None
        self.open: dict[str, TaskID] = {}
        self.ended = 0

    def __enter__(self) -> Reporter:
        self.bars.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self.bars.stop()

    def model_started(self, event: ModelStarted) -> None:
        super().model_started(event)
        if self.total is not None:
            self.bars.remove_task(self.total)
        self.ended, cells = 0, event.cells - event.done
        if cells:
            self.total = self.bars.add_task(f"{cells} cell{'s' * (cells != 1)}", total=event.questions, score="")

    def cell_started(self, event: CellStarted) -> None:
        cell = event.cell
        self._close(cell)  # another worker may have begun it
        room = self.spare - _SCORE if self.spare >= 2 * _SCORE else self.spare
        name = shortened(f"{cell.label} · {cell.task}", max(room - 3, 12))
        self.open[cell.folder] = self.bars.add_task(escape(name), total=cell.questions, score="")

    def progress(self, event: Answered) -> None:
        bar = self.open[event.cell.folder]
        self._advance(event.answered - self._answered(bar))
        self.bars.update(bar, completed=event.answered)

    def cell_finished(self, event: CellFinished) -> None:
        super().cell_finished(event)
        score = event.scores[0]
        self._end(event.cell, escape(f"latest: {event.cell.task} {score.title} {score.value:.4g}"))

    def cell_failed(self, event: CellFailed) -> None:
        super().cell_failed(event)
        self._end(event.cell, "latest: failed")

    def _end(self, cell: Named, latest: str) -> None:
        """Close a cell's bar; its questions count as asked, whoever asked them."""
        self._close(cell)
        self._advance(cell.questions)
        self.ended += 1
        if self.total is not None:
            self.bars.update(self.total, description=f"{cell.of - self.ended} of {cell.of} cells left", score=latest)

    def _close(self, cell: Named) -> None:
        bar = self.open.pop(cell.folder, None)
        if bar is not None:
            self._advance(-self._answered(bar))
            self.bars.remove_task(bar)

    def _answered(self, bar: TaskID) -> float:
        return self.bars.tasks[self.bars.task_ids.index(bar)].completed

    def _advance(self, questions: float) -> None:
        if self.total is not None and questions:
            self.bars.advance(self.total, questions)


_NUMBERS, _SCORE = 62, 40
"""Columns of a terminal that the bars' numbers take at most, and those that the latest score takes."""


class _Rate(ProgressColumn):
    """Questions per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.3g} questions/s")


def reporter(console: Console) -> Reporter:
    """Bars where there is a terminal, plain lines elsewhere."""
    return Bars(console) if console.is_terminal else Lines(console)


class Listening(Reporter):
    """Passes events on to ``report``, and calls ``listener`` after each finished cell."""

    def __init__(self, report: Reporter, listener: Callable[[], None]) -> None:
        self.report, self.listener = report, listener

    def __enter__(self) -> Reporter:
        self.report.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self.report.__exit__(*raised)

    def __call__(self, event: Event) -> None:
        self.report(event)
        if isinstance(event, CellFinished):
            self.listener()


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self.start


class Counts:
    """Called with the questions of each answered batch of a cell; reports them added up."""

    def __init__(self, cell: Named, clock: Stopwatch, report: Reporter) -> None:
        self.cell, self.clock, self.report, self.answered = cell, clock, report, 0

    def __call__(self, more: int) -> None:
        self.answered += more
        self.report(Answered(cell=self.cell, answered=self.answered, seconds=self.clock()))
