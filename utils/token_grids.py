"""Where the visual tokens of a prompt lie in its images, so that what stayed can be drawn later without the model.

``places`` of a question are, for each image in the prompt's order, the views that the model has of the whole of it, in
the order of their tokens. A view is ``[rows, columns, down, across, newline]``: tiles, ``down`` × ``across``, row by
row; in each of them ``rows`` × ``columns`` tokens, row by row; and ``newline`` tokens that end each row and are no
patch. A view without columns is a newline that ends an image, and nothing to draw.
"""

from __future__ import annotations

import base64
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

    Of other values than these, ``cells`` are the values of the tokens there.

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


def views(kept: Any, places: Places) -> Iterator[View]:
    """What stayed, view by view; ``kept`` has one entry for each of :func:`size` tokens: a bool, or any other value."""
    bits, start = np.asarray(kept), 0
    for image, shapes in enumerate(places):
        for view in shapes:
            rows, columns, down, across, newline = view
            block = bits[start : start + _tokens(view)].reshape(down, across, rows, columns + newline)
            start += block.size
            cells = block[..., :columns].transpose(0, 2, 1, 3).reshape(down * rows, across * columns)
            ends = block[..., columns:]
            if columns:
                yield View(image, cells, ends.size, int(ends.sum()))


def read(column: Any) -> Places:
    """The column ``places`` of one question; empty where the run did not record it."""
    return json.loads(column) if isinstance(column, str) else []


def drawable(kept: Sequence[bool] | None, left: int, places: Places) -> bool:
    """Whether tokens ``kept``, of ``left`` at the last layer, can be shown at ``places``.

    Where merging left none of the prompt's own tokens, a dark image would say that nothing was seen.
    """
    return bool(places) and kept is not None and len(kept) == size(places) and (any(kept) or not left)


def placed(places: Places, tokens: int, grids: Sequence[int], whole: bool) -> Places:
    """Where ``tokens`` can be drawn on pictures: as recorded, or in a run of old on its only square ``grids``."""
    if not whole:
        return []
    if not places and len(grids) == 1 and grids[0] and grids[0] ** 2 == tokens:
        return [[[grids[0], grids[0], 1, 1, 0]]]
    return places if len(places) == len(grids) and size(places) == tokens else []


def kept_tokens(packed: Any, count: int) -> list[bool] | None:
    """The column ``kept`` (:class:`~visibench.results.store.samples.Answer`), one bool a visual token of the prompt."""
    if not isinstance(packed, str):
        return None
    bits = np.unpackbits(np.frombuffer(base64.b64decode(packed), np.uint8))
    return [bool(bit) for bit in bits[:count]] if len(bits) >= count else None


def _tokens(view: Sequence[int]) -> int:
    rows, columns, down, across, newline = view
    return down * across * rows * (columns + newline)
