"""Rows of text for a terminal: a table whose lines break between words, or records below one another."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Sequence
from itertools import zip_longest

_GAP, _INDENT = "  ", "  "
_NOTHING = ("", "–")


def laid_out(
    header: Sequence[str], rows: Sequence[Sequence[str]], width: int | None, right: Collection[str] = ()
) -> str:
    """The rows under their ``header`` in so many columns of a terminal; None: as wide as they are.

    Where not even the longest words of all columns stand beside each other, a row becomes a record: its first entry,
    and below it a line for each other one that says something. ``right``: titles of columns that stand on the right.
    """
    lines = [header, *rows]
    natural = [max(len(part) for line in lines for part in line[place].split("\n")) for place in range(len(header))]
    least = [
        max((len(word) for line in lines for word in line[place].split()), default=0) for place in range(len(header))
    ]
    spare = None if width is None else width - len(_GAP) * (len(header) - 1)
    if spare is not None and sum(least) > spare:
        return "\n".join(_record(header, row, width or 0) for row in rows)
    widths = natural
    while spare is not None and sum(widths) > spare:
        widest = max((place for place in range(len(widths)) if widths[place] > least[place]), key=lambda p: widths[p])
        widths[widest] -= 1
    return "\n".join(_line(line, widths, [title in right for title in header]) for line in lines)


def _line(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    """A row, in as many lines as its longest cell takes."""
    columns = [_wrapped(cell, room) for cell, room in zip(cells, widths, strict=True)]
    lines = [
        _GAP.join(
            part.rjust(room) if to_right else part.ljust(room)
            for part, room, to_right in zip(parts, widths, right, strict=True)
        )
        for parts in zip_longest(*columns, fillvalue="")
    ]
    return "\n".join(line.rstrip() for line in lines)


def _record(header: Sequence[str], row: Sequence[str], width: int) -> str:
    titles = [" ".join(title.split()) for title in header]
    room = max(map(len, titles[1:]), default=0)
    lines = textwrap.wrap(" ".join(row[0].split()), width) or [""]
    for title, cell in zip(titles[1:], row[1:], strict=True):
        if cell.strip() not in _NOTHING:
            head = f"{_INDENT}{title.ljust(room)}{_GAP}"
            told = " ".join(cell.split())
            wrapper = textwrap.TextWrapper(width, head, " " * len(head), break_long_words=False, break_on_hyphens=False)
            lines += wrapper.wrap(told)
    return "\n".join(lines)


def _wrapped(cell: str, room: int) -> list[str]:
    return [line for part in cell.split("\n") for line in textwrap.wrap(part, room, break_on_hyphens=False) or [""]]
