"""Tables for papers and pages: LaTeX and HTML, with the rows in groups of similar budget."""

from __future__ import annotations

import html
from collections.abc import Sequence
from itertools import zip_longest

from .columns import Column, TableEntry, TableLook
from .notes import heading, notes
from .tables import MethodRow, ResultTable

_ARROWS = {"↑": r"\uparrow", "↓": r"\downarrow", "↗": r"\nearrow", "↘": r"\searrow", "·": r"\cdot", "≈": r"\approx"}
_LATEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        # At the start of a row, \\ of the row before would take these for its own.
        "[": "{[}",
        "*": "{*}",
        "±": r"$\pm$",
        **{arrow: f"${command}$" for arrow, command in _ARROWS.items()},
        "α": r"$\alpha$",
        "×": r"$\times$",
        "–": "--",
        "−": "$-$",
        "…": r"\dots{}",
        "\n": " ",
    }
)


BOLD = TableLook("Bold")
STYLE = """\
.results { font: 14px/1.4 system-ui, sans-serif; color: #1b1b1b; overflow-x: auto; margin-bottom: 2em; }
.results table { border-collapse: collapse; border-top: 2px solid; border-bottom: 2px solid; }
.results caption { text-align: left; font-weight: 600; padding-bottom: 0.5em; }
.results th, .results td { padding: 0.2em 0.7em; text-align: right; white-space: nowrap; font-weight: 400; }
.results thead th { vertical-align: bottom; font-weight: 600; }
.results th:first-child { text-align: left; }
.results tbody { border-top: 1px solid; }
.results th[scope="rowgroup"] { font-style: italic; }
.results small { color: #555; }
.results p { margin: 0.4em 0; max-width: 75em; font-size: 13px; }
"""
"""What :func:`html_table` needs of a page's style sheet."""


def latex(tables: Sequence[ResultTable], chosen: Sequence[Sequence[Column]], shown: TableLook = BOLD) -> str:
    """A floating table each, for a document that uses ``booktabs`` and ``graphicx``; wide ones shrink to the page."""
    parts = [
        _latex_table(table, columns, place, len(tables), shown)
        for place, (table, columns) in enumerate(zip(tables, chosen, strict=True), 1)
    ]
    return "\n\n".join([r"% \usepackage{booktabs,graphicx}", *parts])


def _latex_table(table: ResultTable, chosen: Sequence[Column], place: int, tables: int, shown: TableLook) -> str:
    body = []
    for title, rows in table.grouped():
        body += [r"\midrule"]
        if title:
            body += [rf"\multicolumn{{{len(chosen)}}}{{l}}{{\emph{{{escaped(title)}}}}} \\"]
        body += [" & ".join(_latex_entry(column.show(row)) for column in chosen) + r" \\" for row in rows]
    titles = zip_longest(*(column.title.split("\n") for column in chosen), fillvalue="")
    lines = [*(f"{line}." for line in heading(table, place, tables)), *notes(table, chosen, shown)]
    return "\n".join(
        [
            r"\begin{table*}",
            r"\centering",
            rf"\caption{{{escaped(_caption(table))}}}",
            rf"\label{{tab:visibench{f'-{place}' if tables > 1 else ''}}}",
            r"\smallskip\setlength{\tabcolsep}{4pt}\renewcommand{\arraystretch}{1.2}",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{{''.join('l' if column.words else 'r' for column in chosen)}}}",
            r"\toprule",
            *(" & ".join(map(escaped, line)) + r" \\" for line in titles),
            *body,
            r"\bottomrule",
            r"\end{tabular}}",
            *([r"\begin{flushleft}\footnotesize", escaped(" ".join(lines)), r"\end{flushleft}"] if lines else []),
            r"\end{table*}",
        ]
    )


def _latex_entry(entry: TableEntry) -> str:
    """The marks stand above what follows the value, so that columns stay narrow."""
    value = escaped(entry.value)
    above = r"\,".join(rf"{{{_ARROWS[mark.arrow]}}}\mathrm{{{escaped(mark.reference[0])}}}" for mark in entry.marks)
    spread = entry.spread.replace("± ", r"\pm ").replace(" −", r"\,-")
    below = spread + rf"\,(\mathrm{{sd}}\,{entry.sd})" * bool(entry.sd)
    behind = "".join([f"^{{{above}}}"] * bool(above) + [f"_{{{below}}}"] * bool(below))
    return (rf"\textbf{{{value}}}" if entry.best else value) + (f"${behind}$" if behind else "")


def _caption(table: ResultTable) -> str:
    return f"Visual-token pruning on {table.facts['model']}: scores, visual tokens and executed compute."


def escaped(text: str) -> str:
    return text.translate(_LATEX)


def page(tables: Sequence[ResultTable], chosen: Sequence[Sequence[Column]], shown: TableLook = BOLD) -> str:
    """A page of HTML that stands alone: no script, nothing to load."""
    body = [
        html_table(table, columns, place, len(tables), shown)
        for place, (table, columns) in enumerate(zip(tables, chosen, strict=True), 1)
    ]
    head = f'<meta charset="utf-8">\n<title>visibench</title>\n<style>\n{STYLE}</style>'
    return "\n".join([f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>', *body, "</body>\n</html>"])


def html_table(
    table: ResultTable, chosen: Sequence[Column], place: int = 1, tables: int = 1, shown: TableLook = BOLD
) -> str:
    """One table of so many ``tables`` with its notes as an HTML fragment, for pages that include :data:`STYLE`.

    ``chosen``: the columns to show, as :func:`~visibench.results.tables.columns.columns` gives them.
    """
    titles = ("<br>".join(map(html.escape, column.title.split("\n"))) for column in chosen)
    caption = " ".join([_caption(table), *(f"{line}." for line in heading(table, place, tables))])
    lines = ['<div class="results">', "<table>", f"<caption>{html.escape(caption)}</caption>"]
    lines += ["<thead>", "<tr>" + "".join(f'<th scope="col">{title}</th>' for title in titles) + "</tr>", "</thead>"]
    for title, rows in table.grouped():
        lines += ["<tbody>"]
        if title:
            lines += [f'<tr><th scope="rowgroup" colspan="{len(chosen)}">{html.escape(title)}</th></tr>']
        lines += ["<tr>" + "".join(_html_entry(column, row) for column in chosen) + "</tr>" for row in rows]
        lines += ["</tbody>"]
    return "\n".join(
        [*lines, "</table>", *(f"<p>{html.escape(note)}</p>" for note in notes(table, chosen, shown)), "</div>"]
    )


def _html_entry(column: Column, row: MethodRow) -> str:
    entry = column.show(row)
    value = html.escape(entry.value)
    parts = [f"<strong>{value}</strong>" if entry.best else value]
    behind = " ".join([*entry.behind, *map(str, entry.marks)])
    parts += [f"<small>{html.escape(behind)}</small>"] * bool(behind)
    inner = " ".join(parts)
    return f'<th scope="row">{inner}</th>' if column.words else f"<td>{inner}</td>"
