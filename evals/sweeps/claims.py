"""Processes that share a run folder: each takes the cells that nobody else has claimed."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

from ...errors import IncompleteError
from ...results.store.records import CellConfig
from ...results.store.store import Cell, Store
from ..answers.cell import described
from ..answers.cell_spec import CellSpec


def claimed(
    cells: Sequence[CellSpec], store: Store, say: Callable[[str], Any], check: Callable[[], None]
) -> Generator[CellSpec, None, None]:
    """Cells one after the other, each while this process holds its claim; those of other processes when they let go.

    ``cells`` hold the dense ones first. A cell comes only behind its dense one, so that it can be compared with it:
    while another process works on that, all cells that do not depend on it come first. ``check`` is called now and
    then, also while this waits, and may raise.
    """
    todo, wait = list(cells), 0.0
    while todo:
        later: list[CellSpec] = []
        held: set[str] = set()
        for cell in todo:
            check()
            if cell.dense is not None and cell.dense.folder in held:
                later.append(cell)
                continue
            with store.claim(cell.config, wait=wait) as mine:
                if mine:
                    yield cell
                else:
                    later.append(cell)
                    held.add(cell.config.folder)
        stuck = len(later) == len(todo)
        if stuck and not wait:
            say(f"Waiting for {len(held)} cells of {store.root} that another process works on.")
        todo, wait = later, 1.0 if stuck else 0.0


def done_elsewhere(config: CellConfig, size: int, store: Store, before: str | None) -> Cell | None:
    """The cell if another process has finished it by now; :class:`IncompleteError` if it has failed there.

    ``before``: the failed attempt that was there when this process began, which is to be tried again.
    """
    failures = store.failures(config, but=before)
    if failures:
        raise IncompleteError(described(failures, size, store.path(config)))
    return store.done(config)
