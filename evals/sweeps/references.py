"""The rows that a comparison is read against: chance, pooling and a smaller image, at the budgets that methods spent.

    groups = the finished methods in groups of similar T, as tables have them
    for each group, and each of random (five seeds), pooling and downsample that it lacks:
        the method with the options that come nearest to the group's mean T, unless it cannot spend as much or as little
        or cannot act on the model

They come behind all other cells, since T of adaptive methods is known only then; so every method gets them, and a
sweep that goes on finds the same ones again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean
from typing import Any

from ...errors import OptionError, UnsupportedModelError
from ...results.statistics.inference import BASELINES, DENSE, RANDOM, budget_groups
from ...results.store.records import CellConfig
from ...results.store.store import Cell
from ..answers.cell_spec import CellSpec
from ..settings.config import MethodEntry

REFERENCES = [method for method in BASELINES if method != DENSE]
SEEDS = 5
"""Of methods that draw."""


def references(
    cells: Sequence[Cell], seed: int, expand: Callable[[MethodEntry], list[CellSpec]], say: Callable[[str], Any]
) -> list[CellSpec]:
    """The cells to add to the finished ``cells`` of a sweep.

    ``seed``: the first of a method that draws. ``expand``: what a method comes to on the tasks of the sweep. ``say``
    hears of budgets that a reference cannot meet, and of models on which it cannot act.
    """
    present = {_setting(cell.config) for cell in cells}
    added: list[CellSpec] = []
    for name, tokens in lacking(cells):
        seeds = list(range(seed, seed + SEEDS)) if name == RANDOM else None
        try:
            specs = expand(MethodEntry(name=name, budget={"tokens": tokens}, seeds=seeds))
        except (OptionError, UnsupportedModelError) as error:
            say(f"No reference {error}")
            continue
        settings = {_setting(cell.config) for cell in specs}
        if not settings <= present:
            present |= settings
            added += specs
    return added


def _setting(config: CellConfig) -> tuple[str, str]:
    return config.role, repr(sorted(config.options.items()))


def lacking(cells: Sequence[Cell]) -> Iterator[tuple[str, float]]:
    """The references that groups of similar T lack, with the mean T of each group, which is the largest first."""
    rows = defaultdict(list)
    for cell in cells:
        if cell.config.method != DENSE and not cell.config.control:
            rows[cell.config.method, cell.config.label].append(cell.metrics.visual_tokens.mean)
    means = {row: fmean(counts) for row, counts in rows.items()}
    groups = dict(zip(means, budget_groups(list(means.values())), strict=True))
    for group in sorted(set(groups.values())):
        members = [row for row in means if groups[row] == group]
        tokens = float(f"{fmean(means[row] for row in members):.4g}")
        for name in REFERENCES:
            if name not in {method for method, _ in members}:
                yield name, tokens
