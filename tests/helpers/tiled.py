"""Images cut into tiles, by hand: which patch of which tile lies where in LLaVA-NeXT and LLaVA-OneVision."""

from itertools import chain

from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

SIDE, PATCHES = 4, 16
"""Patches of a tile in the miniatures: along a side, and in all."""


class Tiling:
    """An image of ``size`` (height, width) pixels: ``rows`` and ``columns`` of tiles behind the image as a whole.

    Without ``pinpoints`` it is not cut.
    """

    def __init__(self, size, pinpoints, tile):
        self.size = size
        self.rows, self.columns = get_anyres_image_grid_shape(size, pinpoints, tile) if pinpoints else (0, 0)
        self.units = 1 + self.rows * self.columns

    def lines(self, *, padding):
        """(tile, patch) of all tiles by rows of the whole, with or without those of padding; no lines without any."""
        (tall, wide), down, across = self.size, SIDE * self.rows, SIDE * self.columns
        above, left = 0, 0
        if self.units == 1:
            return []
        if not padding and wide / tall > across / down:
            above = (down - int(tall * (across / wide))) // 2
        elif not padding:
            left = (across - int(wide * (down / tall))) // 2
        return [
            [(1 + y // SIDE * self.columns + x // SIDE, y % SIDE * SIDE + x % SIDE) for x in range(left, across - left)]
            for y in range(above, down - above)
        ]

    def places(self, *, padding):
        """(tile, patch) of the whole image, then of its tiles."""
        return [(0, patch) for patch in range(PATCHES)] + [*chain.from_iterable(self.lines(padding=padding))]
