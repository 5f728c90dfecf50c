"""What captions say of a table's numbers."""

from __future__ import annotations

from ..tables.columns.times import IN_TURN
from ..tables.tables import ResultTable


def counted(table: ResultTable) -> str:
    """What compute is."""
    over = f" and {len(table.questions)} tasks" if len(table.questions) > 1 else ""
    return (
        f"Compute: all that a prefill of each question alone executes, one multiply-add = 1, mean over questions{over}."
    )


def timed(table: ResultTable) -> str:
    """How prefill was timed; empty where it was not."""
    timing, missing = table.facts["timing"], [row.label for row in table.rows if not row.prefill]
    if not timing or len(missing) == len(table.rows):
        return ""
    without = f" Not timed: {', '.join(missing)}." if missing else ""
    return f"Prefill: batch {timing['batch_size']}, {timing['repeats']} runs a task and seed; {IN_TURN}.{without}"
