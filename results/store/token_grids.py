"""Where the visual tokens of a prompt lie in its images, so that what stayed can be drawn later without the model.

``places`` of a question are, for each image in the prompt's order, the views that the model has of the whole of it, in
the order of their tokens. A view is ``[rows, columns, down, across, newline]``: tiles, ``down`` × ``across``, row by
row; in each of them ``rows`` × ``columns`` tokens, row by row; and ``newline`` tokens that end each row and are no
patch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Places = list[list[list[int]]]


@dataclass(frozen=True)
class View:
    """What stayed of one view of image number ``image``: bool ``cells`` (rows, columns) over all of the image.

    ``loose`` of its tokens are no patch; ``loose_kept`` of them stayed.
    """

    image: int
    cells: NDArray[np.bool_]
    loose: int
    loose_kept: int

    @property
    def about(self) -> str:
        """The grid, and the tokens that are no patch."""
        rows, columns = self.cells.shape
        grid = f"{rows} × {columns} tokens"
        return f"{grid}; of {self.loose} that are no patch {self.loose_kept} stayed" if self.loose else grid


def size(places: Places) -> int:
    """Visual tokens in all views."""
    return sum(_tokens(view) for views in places for view in views)


def views(kept: Sequence[bool], places: Places) -> Iterator[View]:
    """What stayed, view by view; ``kept`` has one entry for each of :func:`size` tokens."""
    bits, start = np.asarray(kept, bool), 0
    for image, shapes in enumerate(places):
        for view in shapes:
            rows, columns, down, across, newline = view
            own = bits[start : start + _tokens(view)].reshape(down, across, rows, columns + newline)
            start += own.size
            cells = own[..., :columns].transpose(0, 2, 1, 3).reshape(down * rows, across * columns)
            ends = own[..., columns:]
            yield View(image, cells, ends.size, int(ends.sum()))


def read(column: Any) -> Places:
    """The column ``places`` of one question; empty where the run did not record it."""
    return json.loads(column) if isinstance(column, str) else []


def _tokens(view: Sequence[int]) -> int:
    rows, columns, down, across, newline = view
    return down * across * rows * (columns + newline)
