"""Which settings of a method are worth measuring, by what was measured before: one search a method.

Settings stand in columns: along a column each drops what the one before it drops, and more. The search of all of them
is one (:func:`least`): what a setting would cost is known before it is asked anything (:mod:`.prices`), and of each
column only settings are asked that would cost less than the cheapest that passed, the gentlest of them first. Where
that one fails, so does the rest of its column: that a rougher setting of a column keeps no more answers than a gentler
one is all that is assumed. By that assumption no setting of any column that passes costs less than what is found, by
more than ``GAIN`` of the dense compute.

A search gives its cheapest setting that costs at least the ``floor`` of its :class:`~.bench.SettingBench`, or None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from typing import Any, TypeVar

from ..errors import OptionError
from ..methods import Method, load_method
from ..methods.pyramiddrop import by_factor
from .bench import SettingBench, given
from .fit import fit
from .prices import MAGNITUDES, Priced, last_reads, text_reads

Value = TypeVar("Value")
Inputs = Callable[[], Sequence[dict[str, Any]]]
KEEPS = (0.95, 0.85, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
SPARED = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Shares of the decoder's compute on visual tokens."""
LAYER_THRESHOLDS = (1.0, 0.99, 0.95, 0.9)
GAIN = 0.01
"""Of the dense compute: what saves less than this over the best that is known is not asked."""
EXITS = (0.999, 0.99, 0.97, 0.95, 0.9, 0.8, 0.5, 0.0)


def last_that(passes: Callable[[Value], bool], values: Sequence[Value]) -> Value | None:
    """The last of ``values`` that passes, where all before it do too; None if the first does not.

    Where the first does not pass, it is the only one asked; the others by bisection. What fails is given up after a
    few questions and what passes is asked all of them, so the cut is nearer to the rough end.
    """
    if not values or not passes(values[0]):
        return None
    low, high = 0, len(values)
    while high - low > 1:
        middle = min(low + max(3 * (high - low) // 4, 1), high - 1)
        low, high = (middle, high) if passes(values[middle]) else (low, middle)
    return values[low]


def least(bench: SettingBench, columns: Iterable[Sequence[Priced]]) -> Method | None:
    """The cheapest setting of ``columns``, each from gentle to rough, that passes and costs the bench's floor or more.

    Settings of one price drop the same tokens: one of them is asked.
    """
    best: Priced | None = None
    known: dict[float, bool] = {}

    def passes(one: Priced) -> bool:
        if one.price not in known:
            known[one.price] = bench.passes(one.method)
        return known[one.price]

    for column in columns:
        below = float("inf") if best is None else best.price - GAIN * bench.dense.macs
        distinct = {one.price: one for one in column if bench.floor <= one.price < below}
        best = last_that(passes, sorted(distinct.values(), key=lambda one: -one.price)) or best
    return None if best is None else best.method


def vtw(bench: SettingBench, depth: int, inputs: Inputs) -> Method | None:
    """The layer from which all visual tokens leave."""
    return least(bench, [bench.prices.planned(load_method("vtw", layer=layer) for layer in range(depth - 1, -1, -1))])


def fastv(bench: SettingBench, depth: int, inputs: Inputs) -> Method | None:
    """Layer and share: a column a layer."""
    column = lambda layer: bench.prices.planned(load_method("fastv", layer=layer, keep=keep) for keep in KEEPS)  # noqa: E731
    return least(bench, map(column, range(1, depth)))


def pyramiddrop(bench: SettingBench, depth: int, inputs: Inputs) -> Method | None:
    """Three cuts at even distances, the authors' ratios or gentler ones: a column for each distance and factor."""

    def columns() -> Iterator[list[Priced]]:
        for factor in (0.5, 0.75):
            ratios = by_factor(factor, 3)
            for apart in range(1, max((depth - 1) // 3, 1) + 1):
                starts = range(depth - 1 - 2 * apart, -1, -1)
                cuts = [(at, at + apart, at + 2 * apart) for at in starts]
                yield bench.prices.planned(load_method("pyramiddrop", cuts=of, ratios=ratios) for of in cuts)

    return least(bench, columns())


def fitprune(bench: SettingBench, depth: int, inputs: Inputs) -> Method | None:
    """The authors' search for a schedule (:mod:`.fit`), for as much spared compute as can be: one column."""
    model, samples = bench.asker.loaded.model, inputs()

    @cache
    def scheduled(share: float) -> Method | None:
        try:
            return fit("fitprune", model, samples, target=share, tolerance=0.03).method
        except OptionError:  # out of reach: layer 0 sees all visual tokens
            return None

    def passes(share: float) -> bool:
        method = scheduled(share)
        return method is not None and bench.passes(method)

    share = last_that(passes, [share for share in SPARED if bench.prices.spared(share) >= bench.floor])
    return None if share is None else scheduled(share)


def visipruner(bench: SettingBench, depth: int, inputs: Inputs) -> Method | None:
    """Shallow depth, thresholds and exit.

    shallow: the most layers in which the shallow rule alone keeps the answers; without any, the phase is left out, as
             by the authors' command line, and the depth only says from where on layers may filter
    middle:  a column for each depth up to there and layer threshold, its token thresholds from small to large; what
             the dense model's |c_j| and cosines cut is known from one pass
    deep:    of the cheapest setting, the exit rule that leaves earliest
    """
    shallow = partial(load_method, "visipruner", stages=("shallow",))
    deepest = last_that(lambda layers: bench.passes(shallow(shallow_layers=layers)), range(1, depth - 2))
    stages = ("middle",) if deepest is None else ("shallow", "middle")

    def columns() -> Iterator[list[Priced]]:
        for layers in range(1, (deepest or depth - 3) + 1):
            under = load_method("none") if deepest is None else shallow(shallow_layers=layers)
            for threshold in LAYER_THRESHOLDS:
                options = {"stages": stages, "shallow_layers": layers, "layer_threshold": threshold}
                methods = [load_method("visipruner", **options, token_threshold=value) for value in MAGNITUDES]
                costs = bench.prices.thresholds(last_reads, under, layers + 1, threshold)
                yield [Priced(*one) for one in zip(costs, methods, strict=True)]

    found = least(bench, columns())
    return None if found is None else _left_earlier(bench, found, _exits(found))


def readers(bench: SettingBench, depth: int, inputs: Inputs) -> Method | None:
    """Layer and threshold: a column a layer; then the exit."""

    def columns() -> Iterator[list[Priced]]:
        for layer in range(1, depth):
            methods = [load_method("readers", layer=layer, threshold=value) for value in MAGNITUDES]
            costs = bench.prices.thresholds(text_reads, load_method("none"), layer - 1)
            yield [Priced(*one) for one in zip(costs, methods, strict=True)]

    found = least(bench, columns())
    if found is None:
        return None
    layers = range(depth - 1, found.hyperparameters()["layer"], -1)
    return _left_earlier(bench, found, [[load_method("readers", **given(found), exit=layer) for layer in layers]])


def _left_earlier(bench: SettingBench, found: Method, columns: Iterable[Sequence[Method]]) -> Method:
    """Of ``found`` and what leaves earlier and earlier in each column, the cheapest that passes, as measured."""
    left = [last_that(bench.passes, column) for column in columns]
    macs = lambda one: bench.measure(one).macs  # noqa: E731
    return min([found, *(one for one in left if one is not None and macs(one) >= bench.floor)], key=macs)


def _exits(method: Method) -> Iterator[list[Method]]:
    """The setting with the third phase, by the number of layers without effect, earlier and earlier exits."""
    options = given(method) | {"stages": (*method.hyperparameters()["stages"], "deep")}
    for layers in (2, 1):
        yield [load_method("visipruner", **options, exit_layers=layers, exit_threshold=value) for value in EXITS]


SEARCHES: dict[str, Callable[[SettingBench, int, Inputs], Method | None]] = {
    "visipruner": visipruner,
    "fastv": fastv,
    "pyramiddrop": pyramiddrop,
    "vtw": vtw,
    "fitprune": fitprune,
    "readers": readers,
}
"""By the name of the method."""
DEFAULT = tuple(name for name in SEARCHES if name != "readers")
"""Papers' methods; ``readers`` is none, and is searched where it is named."""
