"""Results: what is stored of a run, and the tables made of it."""

from .records import CellConfig, CellMetrics
from .store import Cell, Store

__all__ = ["Cell", "CellConfig", "CellMetrics", "Store"]
