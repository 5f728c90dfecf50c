"""How figures look and how they are written: palette, layout, captions, files.

Told apart by shape and line style as well as colour, in the palette of Okabe and Ito (2008). The same table gives the
same file, byte for byte.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...errors import DataError, OptionError
from ..store import disk
from ..tables.titles import method_title, task_title

FORMATS = ("png", "svg", "pdf")
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
    "pdf.fonttype": 42,  # outlines that journals take
    "text.parse_math": False,  # a label may hold a $
}


@dataclass(frozen=True)
class Look:
    """``width`` in inches, for a place in a paper, with small type; None: as wide as the figure likes.

    ``notes``: a caption says below the figure what its numbers are; else they are its label alone. ``titled``: methods
    and tasks have their display names; those that a run gives them otherwise.
    """

    width: float | None = None
    notes: bool = True
    titled: bool = False

    @property
    def narrow(self) -> bool:
        """Whether there is room for one of two things that else stand beside each other."""
        return self.width is not None and self.width < 5

    def task(self, name: str) -> str:
        """What a task is called."""
        return task_title(name) if self.titled else name

    def axis(self, text: str) -> str:
        """What stands along an axis."""
        return text if self.width is None else wrap(text, 24)

    def method(self, label: str, name: str, told: str) -> str:
        """What a series of a method is called; ``label`` and ``told``: what the run calls series and method."""
        if not self.titled:
            return label
        title = method_title(name, told)
        return title if label in (name, "dense") else label.replace(name, title, 1)


SCREEN = Look()


def styled(look: Look = SCREEN) -> AbstractContextManager[None]:
    """Within: figures are drawn and written in the style of this module."""
    small = {"font.size": 7, "axes.titlesize": 7.5, "axes.linewidth": 0.6, "lines.markersize": 4}
    return matplotlib.style.context(["default", _STYLE | (small if look.width else {})])


def check(file: Path) -> str:
    """The format of a figure's file. Raises :class:`OptionError` for a name that says none."""
    form = file.suffix[1:].lower()
    if form not in FORMATS:
        raise OptionError(f"cannot write {str(file)!r}: its name must end in .png, .svg or .pdf")
    return form


def save(figure: Figure, file: Path) -> None:
    """Write the figure as PNG, SVG or PDF, by the file's name, without a date."""
    form = check(file)
    dates: dict[str, dict[str, None]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with styled(), disk.whole(file) as partial:
            figure.savefig(partial, format=form, dpi=200, metadata=dates.get(form))
    except OSError as error:
        raise DataError(f"cannot write {file}: {error.strerror or error}") from error


def grid(
    places: int, most: int, size: tuple[float, float], look: Look, beside: float = 0.0, least: float = 0.0
) -> tuple[Figure, list[Axes]]:
    """A figure with so many ``places`` of ``size`` inches, ``most`` a row, room ``beside``, and ``least`` high.

    A look with a width has smaller places, from 0.45 of the size on, as many a row as fit, and nothing beside them.
    """
    columns = min(places, most)
    if look.width is not None:
        columns = min(places, max(int(look.width / (0.45 * size[0])), 1))
        columns = -(-places // -(-places // columns))  # no fuller a row than it must be
        size, beside, least = (look.width / columns, 0.62 * size[1]), 0.0, 0.0
    rows = -(-places // columns)
    wide = look.width or max(columns * size[0] + beside, 5.6)
    figure = Figure(
        figsize=(wide, max(rows * size[1], least) + (1.0 if look.width is None else 0.5)), layout="constrained"
    )
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for unused in axes[places:]:
        unused.remove()
    return figure, list(axes[:places])


def caption(figure: Figure, parts: Iterable[str], look: Look = SCREEN) -> None:
    """Notes below the figure, as wide as it is, where its ``look`` has some."""
    parts = [part for part in parts if part]
    figure.set_label(" ".join(parts))
    if not look.notes:
        return
    lines = [line for part in parts for line in textwrap.wrap(part, int(15.5 * figure.get_figwidth()))]
    if look.width is not None:  # a narrow figure grows by its caption, which would take the place of the axes
        figure.set_figheight(figure.get_figheight() + 0.13 * len(lines))
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=7.5, color="#333333")


def wrap(text: str, width: int) -> str:
    """The text in lines of so many characters; a dash if there is none."""
    return "\n".join(textwrap.wrap(text, width, break_on_hyphens=False)) or "–"
