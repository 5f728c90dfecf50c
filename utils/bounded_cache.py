"""What cells of a sweep have in common on the host: they go over the same questions one after the other."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")
GIB = 2**30


class BoundedCache(Generic[T]):
    """Things by key, each made once as long as it fits.

    What fits into ``limit`` bytes stays, the rest is made each time: making room for it would throw out just what the
    next round starts with. ``size``: bytes of a thing.
    """

    def __init__(self, size: Callable[[T], int], limit: int = GIB) -> None:
        self.size, self.room = size, limit
        self._kept: dict[Hashable, T] = {}

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """What is kept under ``key``, or what ``make`` makes of it now."""
        thing = self._kept.get(key)
        if thing is None:
            thing = make()
            size = self.size(thing)
            if size <= self.room:
                self.room -= size
                self._kept[key] = thing
        return thing
