"""Which settings of a method are searched: one grid a method.

All of a grid are asked in order of what they execute, which is known before (:mod:`.candidates`), until one keeps the
dense answers (:mod:`.calibrate`): nothing is taken to grow or fall with anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product

import numpy as np

from ..methods import load_method
from ..methods.pyramiddrop import by_factor
from .bench import Candidate
from .candidates import SearchPrompts, TakenUp, Unfiltered, contributed, left, taken
from .fit import schedules

KEEPS = (0.95, 0.85, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
FACTORS = (0.5, 0.75)
SPARED = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Shares of the decoder's compute on visual tokens."""
# |c_j|, least first: five a decade, over what models of widths 128 to 4096 show.
MAGNITUDES = tuple(float(f"{10 ** (step / 5):.2g}") for step in range(-15, 4))
LAYER_THRESHOLDS = (1.0, 0.99, 0.95, 0.9)
LAYERS = 12
"""In deeper models cuts are asked at about so many layers, at even distances; at all layers in others."""


def _places(prompts: SearchPrompts, first: int, end: int) -> range:
    return range(first, end, max(1, round(prompts.depth / LAYERS)))


def vtw(prompts: SearchPrompts) -> list[Candidate]:
    """Every layer."""
    return prompts.planned(load_method("vtw", layer=layer) for layer in range(prompts.depth))


def fastv(prompts: SearchPrompts) -> list[Candidate]:
    """Layer and share."""
    settings = product(_places(prompts, 1, prompts.depth), KEEPS)
    return prompts.planned(load_method("fastv", layer=layer, keep=keep) for layer, keep in settings)


def pyramiddrop(prompts: SearchPrompts) -> list[Candidate]:
    """Three cuts at even distances, with the authors' ratios and with gentler ones."""
    depth = prompts.depth
    distances = range(1, max((depth - 1) // 3, 1) + 1)
    cuts = [(at, at + apart, at + 2 * apart) for apart in distances for at in _places(prompts, 0, depth - 2 * apart)]
    ratios = [by_factor(factor, 3) for factor in FACTORS]
    return prompts.planned(load_method("pyramiddrop", cuts=at, ratios=by) for at, by in product(cuts, ratios))


def fitprune(prompts: SearchPrompts) -> list[Candidate]:
    """The authors' search for a schedule (:mod:`.fit`), for shares of compute to spare."""
    found = schedules(prompts.loaded.model, prompts.first, SPARED, tolerance=0.03)
    return prompts.planned(one.method for one in found if one is not None)


def visipruner(prompts: SearchPrompts) -> list[Candidate]:
    """Depth, thresholds and exit; the shallow phase at depths at which it alone keeps the answers, and left out.

    Without it the depth only says from where on layers may filter. Exits are numbers of layers behind the filter, all
    of which count at a threshold of -1.
    """
    depths = _places(prompts, 1, prompts.depth - 2)
    found, bench = [*_visipruner(prompts, depths)], prompts.bench
    for depth in depths:
        alone = load_method("visipruner", stages=("shallow",), shallow_layers=depth)
        if bench.passes(alone):
            found += _visipruner(prompts, [depth], ("shallow",), bench.measure(alone).macs - bench.dense.macs)
    return found


def _visipruner(
    prompts: SearchPrompts, depths: Sequence[int], stages: tuple[str, ...] = (), more: float = 0.0
) -> Iterator[Candidate]:
    """Settings with these depths; ``stages`` in front of the middle one, and ``more`` multiply-adds that they take."""
    first, end, asked = depths[0] + 1, prompts.depth, np.arange(len(prompts.visual))
    looked = prompts.look(Unfiltered(stages=(*stages, "middle"), shallow_layers=depths[0]), contributed)
    weakest, norms = looked[..., 0], looked[..., 1:]
    above = [(value, (norms > value).sum(-1)) for value in MAGNITUDES]
    for depth, threshold in product(depths, LAYER_THRESHOLDS):
        filters = (weakest < threshold) & (np.arange(first, end) > depth)
        at = np.where(filters.any(1), filters.argmax(1), -1)  # behind the last layer there is nothing to cut
        cut = np.arange(first + 1, end + 1)[at]
        for (value, numbers), wait in product(above, (0, *_places(prompts, 1, end - depth - 2))):
            kept = numbers[asked, at]
            leave = np.where((kept < prompts.visual) & (wait > 0), cut + wait, end)
            method = load_method(
                "visipruner",
                stages=(*stages, "middle", *(["deep"] if wait else [])),
                shallow_layers=depth,
                layer_threshold=threshold,
                token_threshold=value,
                **({"exit_layers": wait, "exit_threshold": -1.0} if wait else {}),
            )
            counts = left(prompts.whole, cut, kept, leave)
            scoring = prompts.contributions(counts, depth + 1) + more
            yield prompts.candidate(method, counts, scoring, f"{depth} shallow layers" if stages else "")


def readers(prompts: SearchPrompts) -> list[Candidate]:
    """Layer, threshold and exit."""
    norms, found = prompts.look(TakenUp(), taken), []
    scoring = prompts.scoring(load_method("readers", layer=1))  # whatever the layer: nothing has left before it
    for layer, value in product(_places(prompts, 1, prompts.depth), MAGNITUDES):
        kept = (norms[:, layer - 1] > value).sum(1)
        for leave in (*_places(prompts, layer + 1, prompts.depth), None):
            cut, gone = (np.full_like(kept, at) for at in (layer, leave or prompts.depth))
            method = load_method("readers", layer=layer, threshold=value, exit=leave)
            found.append(prompts.candidate(method, left(prompts.whole, cut, kept, gone), scoring))
    return found


GRIDS: dict[str, Callable[[SearchPrompts], list[Candidate]]] = {
    "visipruner": visipruner,
    "fastv": fastv,
    "pyramiddrop": pyramiddrop,
    "vtw": vtw,
    "fitprune": fitprune,
    "readers": readers,
}
"""By the name of the method."""
DEFAULT = tuple(name for name in GRIDS if name != "readers")
"""Papers' methods; ``readers`` is none, and is searched where it is named."""
