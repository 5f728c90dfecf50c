"""Tables for papers and pages: LaTeX and HTML, with the rows in groups of similar budget."""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Sequence
from itertools import zip_longest

from .columns import Column, Shown
from .notes import heading, notes
from .tables import Row, Table

_LATEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "±": r"$\pm$",
        "↑": r"$\uparrow$",
        "↓": r"$\downarrow$",
        "α": r"$\alpha$",
        "×": r"$\times$",
        "–": "--",
        "…": r"\dots{}",
        "\n": " ",
    }
)


def grouped(table: Table) -> list[tuple[str, list[Row]]]:
    """The dense row without a title, then the others by budget, the largest first, each group with its title."""
    groups: dict[int, list[Row]] = defaultdict(list)
    for row in table.rows:
        groups[-1 if row.evidence.budget is None else row.evidence.budget].append(row)
    return [("" if budget < 0 else _title(rows), rows) for budget, rows in sorted(groups.items())]


def latex(tables: Sequence[Table], chosen: Sequence[Sequence[Column]]) -> str:
    """A floating table each, for a document that uses ``booktabs``."""
    count = len(tables)
    parts = [
        _latex_table(table, own, number, count)
        for number, (table, own) in enumerate(zip(tables, chosen, strict=True), 1)
    ]
    return "\n\n".join([r"% \usepackage{booktabs}", *parts])


def _latex_table(table: Table, chosen: Sequence[Column], number: int, count: int) -> str:
    body = []
    for title, rows in grouped(table):
        body += [r"\midrule"]
        if title:
            body += [rf"\multicolumn{{{len(chosen)}}}{{l}}{{\emph{{{_escape(title)}}}}} \\"]
        body += [" & ".join(_latex_entry(column.show(row)) for column in chosen) + r" \\" for row in rows]
    titles = zip_longest(*(column.title.split("\n") for column in chosen), fillvalue="")
    caption = " ".join([*(f"{line}." for line in heading(table, number, count)), *notes(table, bold=True)])
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\begin{{tabular}}{{{''.join('l' if column.name == 'method' else 'r' for column in chosen)}}}",
            r"\toprule",
            *(" & ".join(map(_escape, line)) + r" \\" for line in titles),
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            rf"\caption{{{_escape(caption)}}}",
            r"\end{table}",
        ]
    )


def _latex_entry(shown: Shown) -> str:
    value = _escape(shown.value)
    parts = [rf"\textbf{{{value}}}" if shown.best else value]
    parts += [rf"{{\scriptsize $\pm$ {_escape(shown.spread)}}}"] if shown.spread else []
    parts += [rf"\textsuperscript{{{_escape(' '.join(shown.marks))}}}"] if shown.marks else []
    return " ".join(parts)


def _escape(text: str) -> str:
    return text.translate(_LATEX)


def page(tables: Sequence[Table], chosen: Sequence[Sequence[Column]]) -> str:
    """A page of plain HTML tables, without style or script."""
    body = [
        part
        for number, (table, own) in enumerate(zip(tables, chosen, strict=True), 1)
        for part in _html_table(table, own, number, len(tables))
    ]
    head = '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>visibench</title></head>\n<body>'
    return "\n".join([head, *body, "</body>\n</html>"])


def _html_table(table: Table, chosen: Sequence[Column], number: int, count: int) -> list[str]:
    titles = ("<br>".join(map(html.escape, column.title.split("\n"))) for column in chosen)
    lines = ["<table>", *(f"<caption>{html.escape(line)}</caption>" for line in heading(table, number, count))]
    lines += ["<thead>", "<tr>" + "".join(f'<th scope="col">{title}</th>' for title in titles) + "</tr>", "</thead>"]
    for title, rows in grouped(table):
        lines += ["<tbody>"]
        if title:
            lines += [f'<tr><th scope="rowgroup" colspan="{len(chosen)}">{html.escape(title)}</th></tr>']
        lines += [
            "<tr>" + "".join(f"<td>{_html_entry(column.show(row))}</td>" for column in chosen) + "</tr>" for row in rows
        ]
        lines += ["</tbody>"]
    return [*lines, "</table>", *(f"<p>{html.escape(note)}</p>" for note in notes(table, bold=True))]


def _html_entry(shown: Shown) -> str:
    value = html.escape(shown.value)
    parts = [f"<strong>{value}</strong>" if shown.best else value]
    parts += [f"± {html.escape(shown.spread)}"] if shown.spread else []
    return " ".join([*parts, *map(html.escape, shown.marks)])


def _title(rows: Sequence[Row]) -> str:
    means = [row.tokens.mean for row in rows]
    low, high = f"{min(means):.1f}", f"{max(means):.1f}"
    span = low if low == high else f"{low} to {high}"
    share = f"{100 * sum(means) / len(means) / max(rows[0].tokens.prompt, 1):.0f} %"
    return f"T = {span} of {rows[0].tokens.prompt:g} visual tokens ({share})"
