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
        # At the start of a row, \\ of the row before would take these for its own.
        "[": "{[}",
        "*": "{*}",
        "±": r"$\pm$",
        "↑": r"$\uparrow$",
        "↓": r"$\downarrow$",
        "α": r"$\alpha$",
        "×": r"$\times$",
        "–": "--",
        "−": "$-$",
        "·": r"$\cdot$",
        "…": r"\dots{}",
        "\n": " ",
    }
)


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
_MATHS = {"↑": r"{\uparrow}", "↓": r"{\downarrow}", "=": "{=}"}


def grouped(table: Table) -> list[tuple[str, list[Row]]]:
    """The dense row without a title, then the others by budget, the largest first, each group with its title."""
    groups: dict[int, list[Row]] = defaultdict(list)
    for row in table.rows:
        groups[-1 if row.evidence.budget is None else row.evidence.budget].append(row)
    return [("" if budget < 0 else _title(rows), rows) for budget, rows in sorted(groups.items())]


def latex(tables: Sequence[Table], chosen: Sequence[Sequence[Column]]) -> str:
    """A floating table each, for a document that uses ``booktabs`` and ``graphicx``; wide ones shrink to the page."""
    count = len(tables)
    parts = [
        _latex_table(table, own, number, count)
        for number, (table, own) in enumerate(zip(tables, chosen, strict=True), 1)
    ]
    return "\n\n".join([r"% \usepackage{booktabs,graphicx}", *parts])


def _latex_table(table: Table, chosen: Sequence[Column], number: int, count: int) -> str:
    body = []
    for title, rows in grouped(table):
        body += [r"\midrule"]
        if title:
            body += [rf"\multicolumn{{{len(chosen)}}}{{l}}{{\emph{{{_escape(title)}}}}} \\"]
        body += [" & ".join(_latex_entry(column.show(row)) for column in chosen) + r" \\" for row in rows]
    titles = zip_longest(*(column.title.split("\n") for column in chosen), fillvalue="")
    lines = [*(f"{line}." for line in heading(table, number, count)), *notes(table, chosen, "Bold")]
    return "\n".join(
        [
            r"\begin{table*}",
            r"\centering",
            rf"\caption{{{_escape(_caption(table))}}}",
            rf"\label{{tab:visibench{f'-{number}' if count > 1 else ''}}}",
            r"\smallskip\setlength{\tabcolsep}{4pt}\renewcommand{\arraystretch}{1.2}",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{{''.join('l' if column.name == 'method' else 'r' for column in chosen)}}}",
            r"\toprule",
            *(" & ".join(map(_escape, line)) + r" \\" for line in titles),
            *body,
            r"\bottomrule",
            r"\end{tabular}}",
            r"\begin{flushleft}\footnotesize",
            _escape(" ".join(lines)),
            r"\end{flushleft}",
            r"\end{table*}",
        ]
    )


def _latex_entry(shown: Shown) -> str:
    """The marks stand above what follows the value, so that columns stay narrow."""
    value = _escape(shown.value)
    above = r"\,".join(rf"{_MATHS[mark[0]]}\mathrm{{{_escape(mark[1:])}}}" for mark in shown.marks)
    spread = shown.spread.replace("± ", r"\pm ").replace(" −", r"\,-")
    below = spread + rf"\,(\mathrm{{sd}}\,{shown.sd})" * bool(shown.sd)
    behind = "".join([f"^{{{above}}}"] * bool(above) + [f"_{{{below}}}"] * bool(below))
    return (rf"\textbf{{{value}}}" if shown.best else value) + (f"${behind}$" if behind else "")


def _caption(table: Table) -> str:
    return f"Visual-token pruning on {table.facts['model']}: scores, visual tokens and executed compute."


def _escape(text: str) -> str:
    return text.translate(_LATEX)


def page(tables: Sequence[Table], chosen: Sequence[Sequence[Column]]) -> str:
    """A page of HTML that stands alone: no script, nothing to load."""
    body = [
        html_table(table, own, number, len(tables))
        for number, (table, own) in enumerate(zip(tables, chosen, strict=True), 1)
    ]
    head = f'<meta charset="utf-8">\n<title>visibench</title>\n<style>\n{STYLE}</style>'
    return "\n".join([f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>', *body, "</body>\n</html>"])


def html_table(table: Table, chosen: Sequence[Column], number: int = 1, count: int = 1) -> str:
    """One table of ``count`` with its notes as an HTML fragment, for pages that include :data:`STYLE`.

    ``chosen``: the columns to show, as :func:`~visibench.results.tables.columns.columns` gives them.
    """
    titles = ("<br>".join(map(html.escape, column.title.split("\n"))) for column in chosen)
    caption = " ".join([_caption(table), *(f"{line}." for line in heading(table, number, count))])
    lines = ['<div class="results">', "<table>", f"<caption>{html.escape(caption)}</caption>"]
    lines += ["<thead>", "<tr>" + "".join(f'<th scope="col">{title}</th>' for title in titles) + "</tr>", "</thead>"]
    for title, rows in grouped(table):
        lines += ["<tbody>"]
        if title:
            lines += [f'<tr><th scope="rowgroup" colspan="{len(chosen)}">{html.escape(title)}</th></tr>']
        lines += ["<tr>" + "".join(_html_entry(column, row) for column in chosen) + "</tr>" for row in rows]
        lines += ["</tbody>"]
    return "\n".join(
        [*lines, "</table>", *(f"<p>{html.escape(note)}</p>" for note in notes(table, chosen, "Bold")), "</div>"]
    )


def _html_entry(column: Column, row: Row) -> str:
    shown = column.show(row)
    value = html.escape(shown.value)
    parts = [f"<strong>{value}</strong>" if shown.best else value]
    parts += [f"<small>{html.escape(' '.join([*shown.behind, *shown.marks]))}</small>"] * bool(
        shown.behind or shown.marks
    )
    entry = " ".join(parts)
    return f'<th scope="row">{entry}</th>' if column.name == "method" else f"<td>{entry}</td>"


def _title(rows: Sequence[Row]) -> str:
    means = [row.tokens.mean for row in rows]
    low, high = f"{min(means):.1f}", f"{max(means):.1f}"
    span = low if low == high else f"{low} to {high}"
    share = f"{100 * sum(means) / len(means) / max(rows[0].tokens.prompt, 1):.0f} %"
    return f"T = {span} of {rows[0].tokens.prompt:g} visual tokens ({share})"
