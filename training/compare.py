"""One table of a sweep over checkpoints: what each scores under dense and staged inference, and under pruning.

    visibench sweep stages --set 'models=[PLAIN, STAGED]' --out RUN
    python -m visibench.training.compare RUN --name PLAIN=plain --csv FIGURES.csv
    python -m visibench.training.compare FIGURES.csv OTHER_RUN --plot PICTURE.png

Rows of a method stand together, one for each checkpoint, so that it shows who loses by what. Intervals are those of
:mod:`visibench.results.tables`; marks of single tests are left out, since they compare within one checkpoint alone.
"""

from __future__ import annotations

import argparse
import math
import textwrap
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

from ..errors import DataError, VisibenchError
from ..models import load_model
from ..results.figures.style import COLOURS, SMALL, save, styled
from ..results.store.records import ScoreRecord
from ..results.store.store import Store
from ..results.tables.tables import MethodRow, ResultTable, build

COSTS = {"T": 1, "GMACs": 3, "KV entries": 1, "KV kB": 0, "prefill ms": 1}  # digits behind the point
OWN = {"model", "checkpoint", *(f"environment.model.{fact}" for fact in ("name", "architecture", "parameters"))}
"""In what checkpoints may differ."""
COLUMNS = ["method", "checkpoint", "figure", "value", "low", "high", "n", "of"]
NOTE = (
    "Brackets: 95 % intervals, clustered by image. T, GMACs and KV: means over the questions of a task, and of these "
    "over tasks. T: visual tokens, mean over decoder layers. GMACs: multiply-adds "
    "that the prefill of a question alone executes. KV entries: in a layer's cache after it, mean over layers; "
    "KV kB: keys and values of all layers, in the precision of the run."
)


def figures_of(run: Path) -> pd.DataFrame:
    """The figures of the cells in ``run``, a row each: ``COLUMNS``.

    ``figure``: a task and its metric, in per cent where the most that can be had is 1, or one of ``COSTS``. ``low``,
    ``high``: its 95 % interval. ``n``, ``of``: questions asked, and those of the whole set. Raises :class:`DataError`
    if there are none, or unless all checkpoints were asked alike.
    """
    tables = build(Store(run).cells())
    for table in tables:
        apart = sorted({*table.differs} - OWN)
        if apart or table.questions != tables[0].questions:
            raise DataError(
                f"cells in {run} differ in {', '.join(apart) or 'their questions'}: run all checkpoints alike"
            )
    costs = {id(table): entry_bytes(str(table.facts["model"]), _precision(table)) for table in tables}
    rows = [
        [row.label, _name(table), *figure]
        for label in dict.fromkeys(row.label for table in tables for row in table.rows)
        for table in tables
        for row in table.rows
        if row.label == label
        for figure in _figures(table, row, costs[id(table)])
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def _figures(table: ResultTable, row: MethodRow, entry_bytes: int) -> Iterator[list]:
    for task, scores in table.metrics.items():
        asked = table.questions[task]
        for score in scores:
            yield [f"{task} {score.title}", *_score(row, task, score), asked.asked, asked.of]
    entries = fmean(cell.samples()["kv_lengths"].map(fmean).mean() for cell in row.cells)
    layers = len(row.tokens.per_layer)
    held = entries * layers * entry_bytes / 1e3
    prefill = None if row.prefill is None else row.prefill.median
    costs = [row.tokens.mean, row.macs / 1e9, entries, held, prefill]
    for name, cost in zip(COSTS, costs, strict=True):
        yield [name, cost, None, None, None, None]


def _score(row: MethodRow, task: str, score: ScoreRecord) -> list[float | None]:
    """Value and interval, in per cent where the most that can be had is 1."""
    mean, estimate = row.scores.get(task, {}).get(score.key), row.evidence.scores.get(task, {}).get(score.key)
    if mean is None:
        return [None, None, None]
    unit = 100 if score.maximum == 1 else 1
    return [mean.mean * unit, *((None, None) if estimate is None else (estimate.low * unit, estimate.high * unit))]


def _name(table: ResultTable) -> str:
    """The checkpoint as a reader would call it: by the folder of its run."""
    return str(table.facts["model"]).removesuffix("/export").rpartition("/")[2]


def _precision(table: ResultTable) -> str:
    return str(table.rows[0].cells[0].metrics.environment.model["dtype"])


def entry_bytes(model: str, dtype: str) -> int:
    """Bytes of a key and a value of one token in one layer of ``model``."""
    geometry = load_model(model, weights="meta").geometry
    return 2 * geometry.kv_heads * geometry.head_size * getattr(torch, dtype).itemsize


def table_of(figures: pd.DataFrame) -> str:
    """Markdown of what :func:`figures_of` gives."""
    titles = [*figures.figure.unique()]
    lines = [["method", "checkpoint", *titles], ["---", "---", *["---:"] * len(titles)]]
    for (method, checkpoint), row in figures.groupby(["method", "checkpoint"], sort=False):
        entries = {entry.figure: _entry(entry) for entry in row.itertuples()}
        lines.append([str(method), str(checkpoint), *(entries.get(title, "–") for title in titles)])
    asked = figures.dropna(subset="n").drop_duplicates("figure")
    questions = ", ".join(f"{row.figure} {row.n:.0f} of {row.of:.0f}" for row in asked.itertuples())
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + ["", f"Questions: {questions}. {NOTE}"])


def _entry(row: Any) -> str:
    if math.isnan(row.value):
        return "–"
    text = f"{row.value:.{COSTS.get(row.figure, 1)}f}"
    return text if math.isnan(row.low) else f"{text} [{row.low:.1f}, {row.high:.1f}]"


def drawn(figures: pd.DataFrame) -> Figure:
    """A panel for each score: methods from left to right, checkpoints beside each other, with their intervals."""
    scores = figures.dropna(subset="n")
    methods, checkpoints = [*scores.method.unique()], [*scores.checkpoint.unique()]
    titles = [*scores.figure.unique()]
    with styled():
        picture = Figure(figsize=(7.2, 1.9 * len(titles) + 1.1), layout="constrained")
        for axes, title in zip(picture.subplots(len(titles), sharex=True, squeeze=False)[:, 0], titles, strict=True):
            for number, checkpoint in enumerate(checkpoints):
                rows = scores[(scores.figure == title) & (scores.checkpoint == checkpoint)].set_index("method")
                rows = rows.loc[[method for method in methods if method in rows.index]]
                places = [methods.index(method) + 0.12 * (number - (len(checkpoints) - 1) / 2) for method in rows.index]
                ends = [rows.value - rows.low, rows.high - rows.value]
                style = {"color": COLOURS[number % len(COLOURS)], "fmt": "osD^vP"[number % 6], "markersize": 4}
                axes.errorbar(places, rows.value, ends, label=checkpoint, **style)
            axes.set_ylabel(textwrap.fill(title, 18))
        names = [method.replace(":", ":\n").replace(",", ",\n") for method in methods]
        axes.set_xticks(range(len(methods)), names, **SMALL)
        axes.set_xlabel("inference")
        picture.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, title="training")
    return picture


def together(parts: list[pd.DataFrame], names: dict[str, str]) -> pd.DataFrame:
    """Figures of several runs as one, checkpoints under their ``names``; what nobody measured is left out.

    Raises :class:`DataError` unless all were asked alike, and for a name of a checkpoint that is not there.
    """
    figures = pd.concat(parts, ignore_index=True)
    figures = figures[figures.groupby("figure")["value"].transform("count") > 0]
    for figure, asked in figures.groupby("figure")["n"]:
        if asked.nunique() > 1:
            raise DataError(f"runs differ in their questions of {figure}: run all checkpoints alike")
    strange = sorted(set(names) - set(figures.checkpoint))
    if strange:
        raise DataError(
            f"no checkpoint {', '.join(strange)} to name: there are {', '.join(figures.checkpoint.unique())}"
        )
    places = {method: place for place, method in enumerate(figures.method.unique())}
    figures = figures.assign(checkpoint=figures.checkpoint.replace(names))
    return figures.sort_values("method", key=lambda column: column.map(places), kind="stable")


def _name_of(text: str) -> tuple[str, str]:
    folder, equals, name = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r}: write FOLDER=NAME")
    return folder, name


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("source", type=Path, nargs="+", help="folders of sweeps, or figures written by --csv")
    parser.add_argument(
        "--name", action="append", default=[], type=_name_of, help="FOLDER=NAME: what to call a checkpoint"
    )
    parser.add_argument("--csv", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="draw the scores here, PNG or SVG")
    arguments = parser.parse_args()
    try:
        parts = [figures_of(source) if source.is_dir() else pd.read_csv(source) for source in arguments.source]
        figures = together(parts, dict(arguments.name))
    except (VisibenchError, OSError) as error:
        parser.error(str(error))
    if arguments.csv:
        figures.to_csv(arguments.csv, index=False, float_format="%.6g")
    if arguments.plot:
        save(drawn(figures), arguments.plot)
    print(table_of(figures))


if __name__ == "__main__":
    main()
