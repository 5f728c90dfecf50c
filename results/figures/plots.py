"""The figures of a table, each one object: its name, its title, how it is drawn, and the numbers behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from ...errors import OptionError, suggest
from ..tables.tables import ResultTable
from .components import by_component, component_figures
from .layers import by_layer, layer_figures
from .scores import against_compute, against_prefill, point_figures, prefill_ms
from .style import SCREEN, Look, styled


@dataclass(frozen=True)
class Plot:
    """``painter``: how it is drawn; ``numbers``: its numbers, a row for each thing that is drawn."""

    name: str
    title: str
    painter: Callable[[ResultTable, Look], Figure]
    numbers: Callable[[ResultTable], list[dict[str, Any]]]

    def draw(self, table: ResultTable, look: Look = SCREEN) -> Figure:
        """The figure. Raises :class:`DataError` if the table does not hold its numbers."""
        with styled(look):
            return self.painter(table, look)


PLOTS = (
    Plot(
        "pareto",
        "Scores against compute",
        against_compute,
        lambda table: point_figures(table, "tflops", lambda row: row.macs * 1e-12),
    ),
    Plot(
        "prefill",
        "Scores against prefill time",
        against_prefill,
        lambda table: point_figures(table, "prefill_ms", prefill_ms),
    ),
    Plot("tokens", "Visual tokens by decoder layer", by_layer, layer_figures),
    Plot("components", "Compute and prefill time by component", by_component, component_figures),
)
KINDS = {plot.name: plot for plot in PLOTS}


def draw(table: ResultTable, kind: str, look: Look = SCREEN) -> Figure:
    """The figure ``kind`` (one of :data:`KINDS`). Raises :class:`DataError` if the table does not hold its numbers."""
    if kind not in KINDS:
        raise OptionError(f"unknown kind of plot {kind!r}; {suggest(kind, KINDS)}")
    return KINDS[kind].draw(table, look)
