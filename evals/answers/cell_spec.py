"""A cell to be: what a sweep's configuration comes to, and what one cell is run from."""

from __future__ import annotations

from dataclasses import dataclass

from ...methods import Method
from ...results.store.records import CellConfig


@dataclass(frozen=True)
class CellSpec:
    """One cell to be: its configuration, and the method that it names, built.

    ``dense``: the cell of the dense model on the same questions, which its answers are compared with.
    """

    config: CellConfig
    method: Method
    dense: CellConfig | None = None
