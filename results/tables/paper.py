"""A table for a paper: booktabs, display names, values alone, notes as comments; it goes into one or two columns."""

from __future__ import annotations

from collections.abc import Sequence

from .columns import Column, TableLook
from .formats import escaped
from .notes import heading, notes
from .tables import MethodRow, ResultTable
from .titles import TASKS


def paper(
    tables: Sequence[ResultTable],
    chosen: Sequence[Sequence[Column]],
    *,
    caption: str = "",
    label: str = "",
    noted: bool = True,
) -> str:
    """A floating ``table`` each; ``chosen``: the columns, of which marks and intervals are left out.

    ``noted``: notes stand in comments.
    """
    shown = TableLook("Bold", brief=True, notes=noted)
    parts = [
        _table(table, columns, [*heading(table, place, len(tables)), *notes(table, columns, shown)], caption, name)
        for place, (table, columns) in enumerate(zip(tables, chosen, strict=True), 1)
        for name in [(label or "tab:visibench") + f"-{place}" * (len(tables) > 1)]
    ]
    return "\n\n".join([r"% \usepackage{booktabs,graphicx}", *parts])


def _table(table: ResultTable, columns: Sequence[Column], told: list[str], caption: str, label: str) -> str:
    body: list[str] = []
    titles = table.titles
    for _, rows in table.grouped():
        body += [
            r"\midrule",
            *(" & ".join(_entry(column, row, titles[row.label]) for column in columns) + r" \\" for row in rows),
        ]
    about = f"Visual-token pruning on {table.facts['model']}."
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering\small\setlength{\tabcolsep}{4pt}",
            rf"\caption{{{escaped(caption or about)}}}",
            rf"\label{{{label}}}\smallskip",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{{''.join('l' if column.words else 'r' for column in columns)}}}",
            r"\toprule",
            " & ".join(_titles(columns)) + r" \\",
            *body,
            r"\bottomrule",
            r"\end{tabular}}",
            *(f"% {' '.join(line.split())}" for line in told),
            r"\end{table}",
        ]
    )


def _titles(columns: Sequence[Column]) -> list[str]:
    """A task stands for its only score; of several the metrics are named too."""
    tasks = [column.name.partition(":")[0] for column in columns]
    return [_title(column, task, alone=tasks.count(task) == 1) for column, task in zip(columns, tasks, strict=True)]


def _title(column: Column, task: str, *, alone: bool) -> str:
    known = {"method": "Method", "retained": r"Avg.\ (\%)", "tokens": "Tokens", "compute": column.title.split()[-1]}
    if task in known:
        return known[task]
    _, *metric = column.title.split("\n")
    return escaped(" ".join([TASKS[task], *([] if alone else metric)]) if task in TASKS else column.title)


def _entry(column: Column, row: MethodRow, title: str) -> str:
    entry = column.show(row)
    value = escaped(title if column.name == "method" else entry.value)
    return rf"\textbf{{{value}}}" if entry.best else value
