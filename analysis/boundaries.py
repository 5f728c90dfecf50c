"""Where the stages of a model begin and end, by a rule.

Of each question::

    unchanged(window) = KL(dense ‖ without vision there) of the next token is at most TOLERANCE
    it needs its image unless text that is blind in all layers (masked before the softmax) leaves it unchanged
    fusion begins at the most leading layers that can be blind, their mass moved, with all shorter windows unchanged
    fusion ends at the first layer from which all visual tokens can be dropped, and from every later one too

The stages are the medians over the questions that need their image: shallow layers before, middle ones between, deep
ones behind. No stages are found where fewer than half of the questions need their image, or where fusion begins in
layer 0 and ends with the last one. The same with "the whole answer is the dense model's" in place of the KL.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .windows import Window

TOLERANCE = 0.1
"""Nats: a token that had all probability keeps 90 % of it."""
Unchanged = Mapping[Window, NDArray[np.bool_]]


@dataclass(frozen=True)
class Found:
    """Boundaries of those of ``asked`` questions that need their image, int (n,), in a decoder of ``depth`` layers."""

    begins: NDArray[np.int64]
    ends: NDArray[np.int64]
    asked: int
    depth: int

    @property
    def begin(self) -> int:
        """The first layer of the middle stage."""
        return int(np.quantile(self.begins, 0.5, method="lower"))

    @property
    def end(self) -> int:
        """The first layer of the deep stage."""
        return int(np.quantile(self.ends, 0.5, method="higher"))

    @property
    def none_because(self) -> str:
        """Why no stages are found; empty where they are."""
        if 2 * len(self.begins) < self.asked:
            return f"only {len(self.begins)} of {self.asked} questions need their image"
        if self.begin == 0 and self.end == self.depth:
            return "fusion begins in layer 0 and goes on to the last layer"
        if self.begin >= self.end:
            return (
                f"the first {self.begin} layers can do without the image, and so can all from layer {self.end} on: "
                "what one part does not read the other does"
            )
        return ""


def find(unchanged: Unchanged, depth: int) -> Found:
    """Boundaries from what is unchanged in each window; see the module."""
    needs = ~unchanged[Window("masked", 0, depth)]
    blind = {w.end: same for w, same in unchanged.items() if w.kind == "moved" and w.first == 0}
    gone = {w.first: same for w, same in unchanged.items() if w.kind == "dropped"}
    begins, ends = np.zeros(len(needs), np.int64), np.full(len(needs), depth, np.int64)
    still = np.ones(len(needs), bool)
    for end in sorted(blind):
        still = still & blind[end]
        begins[still] = end
    still = np.ones(len(needs), bool)
    for first in sorted(gone, reverse=True):
        still = still & gone[first]
        ends[still] = first
    return Found(begins[needs], ends[needs], len(needs), depth)
