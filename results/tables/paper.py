"""A table for a paper: booktabs, display names, values alone, notes as comments; it goes into one or two columns."""

from __future__ import annotations

from collections.abc import Sequence

from ...methods.registry import list_methods
from .columns import Column
from .formats import escaped
from .notes import heading, notes
from .tables import MethodRow, ResultTable

TASKS = {"gqa": "GQA", "mme": "MME", "textvqa_val": "TextVQA", "pope": "POPE"}
KEPT = ("method", "retained", "compute")
"""Columns beside the scores where none are named."""


def paper(
    tables: Sequence[ResultTable], chosen: Sequence[Sequence[Column]], *, caption: str = "", label: str = ""
) -> str:
    """A floating ``table`` each; ``chosen``: the columns, of which marks and intervals are left out."""
    parts = [
        _table(table, columns, place, len(tables), caption, label)
        for place, (table, columns) in enumerate(zip(tables, chosen, strict=True), 1)
    ]
    return "\n\n".join([r"% \usepackage{booktabs,graphicx}", *parts])


def paper_columns(table: ResultTable, columns: Sequence[Column]) -> list[Column]:
    """Of the columns of a table those that a paper shows: method, one score a task, retained, compute."""
    heads = {f"{task}:{scores[0].key}" for task, scores in table.metrics.items()}
    return [column for column in columns if column.name in {*heads, *table.metrics, *KEPT}]


def _table(table: ResultTable, columns: Sequence[Column], place: int, tables: int, caption: str, label: str) -> str:
    body: list[str] = []
    for _, rows in table.grouped():
        body += [r"\midrule", *(" & ".join(_entry(column, row) for column in columns) + r" \\" for row in rows)]
    about = f"Visual-token pruning on {table.facts['model']}."
    told = [*heading(table, place, tables), *notes(table, columns, "Bold")]
    name = label or f"tab:visibench{f'-{place}' if tables > 1 else ''}"
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering\small\setlength{\tabcolsep}{4pt}",
            rf"\caption{{{escaped(caption or about)}}}",
            rf"\label{{{name}}}",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{{''.join('l' if column.words else 'r' for column in columns)}}}",
            r"\toprule",
            " & ".join(_title(column) for column in columns) + r" \\",
            *body,
            r"\bottomrule",
            r"\end{tabular}}",
            *(f"% {' '.join(line.split())}" for line in told),
            r"\end{table}",
        ]
    )


def _title(column: Column) -> str:
    task = column.name.partition(":")[0]
    known = {"method": "Method", "retained": r"Avg.\ (\%)"}
    return known.get(task) or escaped(TASKS.get(task, " ".join(column.title.split())))


def _entry(column: Column, row: MethodRow) -> str:
    entry = column.show(row)
    if column.words:
        return escaped(_called(row))
    value = escaped(entry.value)
    return rf"\textbf{{{value}}}" if entry.best else value


def _called(row: MethodRow) -> str:
    """The method's display name, with the options of its label."""
    name, _, options = row.label.partition(":")
    method = list_methods().get(name)
    title = {"none": "Dense"}.get(name, method.title if method else name)
    return f"{title} ({', '.join(options.split(','))})" if options else title
