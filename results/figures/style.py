"""How figures look and how they are written: palette, layout, captions, files.

Told apart by shape and line style as well as colour, in the palette of Okabe and Ito (2008). The same table gives the
same file, byte for byte.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...errors import DataError, OptionError

FORMATS = ("png", "svg")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
SMALL: dict[str, Any] = {"fontsize": 7.5}
BESIDE: dict[str, Any] = {"xytext": (3, 0), "textcoords": "offset points", "va": "center"}
_STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
    "svg.hashsalt": "visibench",
    "text.parse_math": False,  # a label may hold a $
}


def styled() -> AbstractContextManager[None]:
    """Within: figures are drawn and written in the style of this module."""
    return matplotlib.style.context(["default", _STYLE])


def check(file: Path) -> str:
    """The format of a figure's file. Raises :class:`OptionError` for a name that says none."""
    form = file.suffix[1:].lower()
    if form not in FORMATS:
        raise OptionError(f"cannot write {str(file)!r}: its name must end in .png or .svg")
    return form


def save(figure: Figure, file: Path) -> None:
    """Write the figure as PNG or SVG, by the file's name, without a date."""
    form = check(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with styled():
            figure.savefig(file, format=form, dpi=200, metadata={"Date": None} if form == "svg" else None)
    except OSError as error:
        raise DataError(f"cannot write {file}: {error.strerror or error}") from error


def grid(
    places: int, most: int, size: tuple[float, float], beside: float = 0.0, least: float = 0.0
) -> tuple[Figure, list[Axes]]:
    """A figure with so many ``places`` of ``size`` inches, ``most`` a row, room ``beside``, and ``least`` high."""
    columns = min(places, most)
    rows = -(-places // columns)
    figure = Figure(
        figsize=(max(columns * size[0] + beside, 5.6), max(rows * size[1], least) + 1.0), layout="constrained"
    )
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for unused in axes[places:]:
        unused.remove()
    return figure, list(axes[:places])


def caption(figure: Figure, parts: Iterable[str]) -> None:
    """Notes below the figure, as wide as it is."""
    lines = [line for part in parts if part for line in textwrap.wrap(part, int(15.5 * figure.get_figwidth()))]
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=7.5, color="#333333")


def wrap(text: str, width: int) -> str:
    """The text in lines of so many characters; a dash if there is none."""
    return "\n".join(textwrap.wrap(text, width, break_on_hyphens=False)) or "–"
