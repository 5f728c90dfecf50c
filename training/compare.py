"""One table of a sweep over checkpoints: what each scores under dense and staged inference, and under pruning.

    visibench sweep stages --set 'models=[PLAIN, STAGED]' --out RUN
    python -m visibench.training.compare RUN

Rows of a method stand together, one for each checkpoint, so that it shows who loses by what. Intervals are those of
:mod:`visibench.results.tables`; marks of single tests are left out, since they compare within one checkpoint alone.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import pandas as pd

from ..errors import DataError, VisibenchError
from ..results.store.records import ScoreRecord
from ..results.store.store import Store
from ..results.tables.tables import MethodRow, ResultTable, build

COSTS = ["T", "GMACs", "KV entries", "prefill ms"]
NOTE = (
    "Brackets: 95 % intervals, clustered by image. T: visual tokens, mean over decoder layers. GMACs: multiply-adds "
    "that the prefill of a question alone executes. KV entries: in a layer's cache after it, mean over layers."
)


def table_of(run: Path) -> str:
    """Markdown of the cells in ``run``. Raises :class:`DataError` if there are none, or unless all were asked alike."""
    tables = build(Store(run).cells())
    for table in tables:
        apart = [fact for fact in table.differs if fact != "model" and not fact.startswith("environment.model.")]
        if apart or table.questions != tables[0].questions:
            raise DataError(
                f"cells in {run} differ in {', '.join(apart) or 'their questions'}: run all checkpoints alike"
            )
    metrics = [(task, score) for task, scores in tables[0].metrics.items() for score in scores]
    titles = ["method", "checkpoint", *(f"{task} {score.title}" for task, score in metrics), *COSTS]
    lines = [titles, ["---", "---", *["---:"] * (len(titles) - 2)]]
    for label in dict.fromkeys(row.label for table in tables for row in table.rows):
        for table in tables:
            lines += [_line(table, row, metrics) for row in table.rows if row.label == label]
    asked = ", ".join(f"{task} {of.asked} of {of.of}" for task, of in tables[0].questions.items())
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + ["", f"Questions: {asked}. {NOTE}"])


def _line(table: ResultTable, row: MethodRow, metrics: Sequence[tuple[str, ScoreRecord]]) -> list[str]:
    scores = [_score(row, task, score) for task, score in metrics]
    prefill = "–" if row.prefill is None else f"{row.prefill.median:.1f}"
    entries = pd.concat([cell.samples()["kv_lengths"] for cell in row.cells]).map(fmean).mean()
    costs = [f"{row.tokens.mean:.1f}", f"{row.macs / 1e9:.3f}", f"{entries:.1f}", prefill]
    return [row.label, str(table.facts["model"]), *scores, *costs]


def _score(row: MethodRow, task: str, score: ScoreRecord) -> str:
    """In per cent where the most that can be had is 1."""
    mean, estimate = row.scores.get(task, {}).get(score.key), row.evidence.scores.get(task, {}).get(score.key)
    if mean is None:
        return "–"
    value, unit = mean.mean, 100 if score.maximum == 1 else 1
    if estimate is None or math.isnan(estimate.low):
        return f"{value * unit:.1f}"
    return f"{value * unit:.1f} [{estimate.low * unit:.1f}, {estimate.high * unit:.1f}]"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("run", type=Path, help="folder of the sweep")
    try:
        print(table_of(parser.parse_args().run))
    except VisibenchError as error:
        parser.error(str(error))
