"""The engine that is there without a word: this process, one cell after the other."""

from __future__ import annotations

from contextlib import closing

from ...errors import IncompleteError
from ...utils.interrupt import stoppable
from ..answers.cell import run_cell
from .claims import claimed, done_elsewhere
from .events import CellFailed, CellFinished, CellStarted, Counts, Note, Reporter, Stopwatch
from .executor import Job, Prepared
from .feature_sharing import feature_store


class InProcess:
    """Runs cells here. Several processes that do so on one folder share its cells out by their claims."""

    def run(self, job: Job, prepared: Prepared, report: Reporter) -> None:
        """Run a job; Ctrl-C waits for the batch that runs."""
        tasks, loaded, store = prepared.tasks(list(job.sizes)), prepared.loaded, job.store
        job.check(loaded)
        job.begin()

        def say(text: str) -> None:
            report(Note(text=text))

        with (
            feature_store(loaded, job.config, say) as features,
            stoppable(say) as check,
            closing(claimed(job.cells, store, say, check)) as mine,
        ):
            for number, cell in enumerate(mine, start=1):
                clock, name = Stopwatch(), job.named(cell, number)
                report(CellStarted(cell=name))
                counts = Counts(name, clock, report)

                def on_batch(answered: int, counts: Counts = counts) -> None:
                    counts(answered)
                    check()

                try:
                    done = done_elsewhere(cell.config, name.questions, store, job.before.get(cell.config.folder))
                    done = done or run_cell(loaded, cell, tasks[cell.config.task], store, on_batch, features)
                    report(CellFinished.of(name, done.metrics, clock()))
                except IncompleteError as error:
                    report(CellFailed(cell=name, problem=str(error), seconds=clock()))
