"""Pictures of the visual tokens that stay: the image, dark where tokens left, a panel for each group of layers."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .token_grids import Places, views

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

Bools = NDArray[np.bool_]
MOST = 8
"""Panels of a strip; of more groups of layers the first and last ones and some between are shown."""
INCH = 12
"""Characters of a title."""
_DARK, _HEAT = (0.07, 0.07, 0.1), (0.9, 0.1, 0.1)


@dataclass(frozen=True)
class Strip:
    """One method: ``kept``, bool (layers, V), which visual tokens of the prompt are at the input of each layer.

    ``title``: what stands above it. ``made``: tokens at each layer that merging made, which have no place.
    """

    title: str
    kept: Bools
    made: Sequence[int] = ()

    def steps(self) -> list[tuple[str, Bools]]:
        """Layers that hold the same tokens, together, and which these are."""
        made = self.made or [0] * len(self.kept)
        found = []
        for _, group in groupby(range(len(self.kept)), key=lambda layer: (self.kept[layer].tobytes(), made[layer])):
            layers = list(group)
            first, last = layers[0], layers[-1]
            span = f"layer {first}" if first == last else f"layers {first}–{last}"
            added = f" + {made[first]} merged" if made[first] else ""
            found.append((f"{span}: {int(self.kept[first].sum())}{added}", self.kept[first]))
        if len(found) <= MOST:
            return found
        return [found[place] for place in np.linspace(0, len(found) - 1, MOST).round().astype(int)]


@dataclass(frozen=True)
class Overlay:
    """What is drawn: ``images``, ``places`` of their tokens (:mod:`.token_grids`), and a strip for each method.

    ``attention``: of the last prompt token on each visual token, float (V,), for a strip of its own. In a notebook it
    shows itself.
    """

    images: Sequence[Image]
    places: Places
    strips: Sequence[Strip]
    attention: NDArray[np.float64] | None = None
    title: str = ""

    @property
    def figure(self) -> Figure:
        """The picture, drawn anew."""
        from matplotlib.figure import Figure

        rows = [(strip.title, strip.steps()) for strip in self.strips]
        shapes = [(image, shape) for image, of_image in enumerate(self.places) for shape in of_image]
        lead = [] if self.attention is None else [len(shapes)]
        most = max([len(steps) * len(shapes) for _, steps in rows] + lead)
        lines = len(rows) + bool(lead)
        width, height = self.images[0].size
        rows = [(_wrapped(title, round(INCH * 2.1 * most)), steps) for title, steps in rows]
        tall = 2.1 * height / width + 0.6 + 0.15 * max(1 + title.count("\n") for title, _ in rows)
        figure = Figure(figsize=(2.1 * most + 0.2, lines * tall + 0.3), layout="constrained")
        if self.title:
            figure.suptitle(self.title, fontsize=10)
        parts = figure.subfigures(lines, 1, squeeze=False).ravel()
        if self.attention is not None:
            said = "Attention of the last prompt token, mean over heads and layers"
            parts[0].suptitle(said, fontsize=9, x=0.01, ha="left")
            self._panels(parts[0], most, [("", self.attention)])
        for part, (title, steps) in zip(parts[len(parts) - len(rows) :], rows, strict=True):
            part.suptitle(title, fontsize=9, x=0.01, ha="left")
            self._panels(part, most, steps)
        return figure

    def _panels(self, part: Any, most: int, steps: Sequence[tuple[str, NDArray[Any]]]) -> None:
        axes = list(part.subplots(1, most, squeeze=False).ravel())
        for said, values in steps:
            for view in _spread(values, self.places):
                place = axes.pop(0)
                place.set_title(said, fontsize=7.5)
                self._panel(place, *view)
        for unused in axes:
            unused.set_axis_off()

    def _panel(self, place: Axes, image: int, cells: NDArray[Any]) -> None:
        picture = self.images[image].convert("RGB")
        place.imshow(picture)
        veil = np.empty((*cells.shape, 4))
        if cells.dtype == bool:
            veil[..., :3], veil[..., 3] = _DARK, np.where(cells, 0.0, 0.78)
        else:
            veil[..., :3], veil[..., 3] = _HEAT, 0.85 * cells / max(float(cells.max()), 1e-12)
        extent = (-0.5, picture.width - 0.5, picture.height - 0.5, -0.5)
        place.imshow(veil, extent=extent, interpolation="nearest")
        place.set_xticks([])
        place.set_yticks([])

    def _repr_html_(self) -> str:
        stream = io.BytesIO()
        self.figure.savefig(stream, format="png", dpi=110)
        data = base64.b64encode(stream.getvalue()).decode()
        return f'<img alt="visual tokens that stay" src="data:image/png;base64,{data}">'


def _wrapped(text: str, width: int) -> str:
    """In lines of so many characters, broken behind spaces and commas."""
    lines = [""]
    for piece in re.split(r"(?<=[ ,])", text):
        lines = [*lines, piece] if lines[-1] and len(lines[-1] + piece) > width else [*lines[:-1], lines[-1] + piece]
    return "\n".join(lines)


def _spread(values: NDArray[Any], places: Places) -> list[tuple[int, NDArray[Any]]]:
    """Values of tokens as grids, view by view, with the number of the image."""
    return [(view.image, view.cells) for view in views(values, places)]
