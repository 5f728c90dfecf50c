"""Which layers are made blind, or lose all visual tokens: windows of decoder layers, half open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..engine.contract import Method
from ..methods import load_method
from .probes import Blind

Kind = Literal["masked", "moved", "dropped"]


@dataclass(frozen=True)
class Window:
    """Layers ``first`` … ``end`` - 1 without vision; ``kind``: see :class:`~.probes.Blind`, or visual tokens dropped.

    Visual tokens that were dropped do not come back: such windows reach to the last layer.
    """

    kind: Kind
    first: int
    end: int

    @property
    def name(self) -> str:
        """What it is called in files."""
        return f"{self.kind} {self.first}-{self.end}"

    @property
    def method(self) -> Method:
        """What takes vision away."""
        if self.kind == "dropped":
            return load_method("vtw", layer=self.first)
        return Blind(blind_layers=tuple(range(self.first, self.end)), how=self.kind)


def windows(layers: Sequence[int], depth: int) -> list[Window]:
    """Every one of ``layers`` alone, all before and including it, and it and all behind it; dropped from it on."""
    found = [Window("dropped", layer, depth) for layer in layers]
    for kind in ("moved", "masked"):
        for layer in layers:
            found += [Window(kind, 0, layer + 1), Window(kind, layer, layer + 1), Window(kind, layer, depth)]
        found.append(Window(kind, 0, depth))
    return list(dict.fromkeys(found))
