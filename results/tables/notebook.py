"""Tables of a run folder as Python shows them: text, and HTML in a notebook."""

from __future__ import annotations

from pathlib import Path

from ...errors import DataError
from ..store.store import Store
from . import columns
from .formats import STYLE, html_table
from .render import render
from .tables import ResultTable, build


class Tables(list[ResultTable]):
    """The tables of a run folder; several, where not all of its cells can be compared."""

    def __repr__(self) -> str:
        return render(self)

    def _repr_html_(self) -> str:
        parts = [
            html_table(table, columns.columns(table), place, len(self)) for place, table in enumerate(self, start=1)
        ]
        return "\n".join([f"<style>{STYLE}</style>", *parts])


def tables(folder: str | Path) -> Tables:
    """The tables of a run folder, as ``visibench table`` prints them. Raises :class:`DataError` where none is there."""
    cells = Store(Path(folder)).cells()
    if not cells:
        raise DataError(f"nothing is finished in {folder}: run a sweep into it")
    return Tables(build(cells))
