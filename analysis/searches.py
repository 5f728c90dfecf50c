"""Which settings of a method are worth measuring, by what was measured before: one search a method.

Each proposes settings to a :class:`~.bench.SettingBench`, which asks all of them the same questions; the cheapest that
keeps the dense answers is chosen from all that were measured (:mod:`.calibrate`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from ..errors import OptionError
from ..methods import Method, load_method
from ..methods.pyramiddrop import by_factor
from .bench import SettingBench, given
from .fit import fit

Value = TypeVar("Value")
Inputs = Callable[[], Sequence[dict[str, Any]]]
KEEPS = (0.95, 0.85, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
SPARED = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Shares of the decoder's compute on visual tokens."""
# |c_j|, least first: five a decade, over what models of widths 128 to 4096 show.
MAGNITUDES = tuple(float(f"{10 ** (step / 5):.2g}") for step in range(-15, 4))
LAYER_THRESHOLDS = (1.0, 0.99, 0.95, 0.9)
EXITS = (0.999, 0.99, 0.97, 0.95, 0.9, 0.8, 0.5, 0.0)


def last_that(passes: Callable[[Value], bool], values: Sequence[Value]) -> Value | None:
    """The last of ``values`` that passes, where all before it do too, by bisection; None if the first does not."""
    low, high = -1, len(values)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if passes(values[middle]) else (low, middle)
    return values[low] if low >= 0 else None


def vtw(bench: SettingBench, depth: int, inputs: Inputs) -> None:
    """The layer: the first from which all visual tokens can leave."""
    last_that(lambda layer: bench.passes(load_method("vtw", layer=layer)), range(depth - 1, -1, -1))


def further(passes: Callable[[Value], bool], values: Sequence[Value], step: int) -> int:
    """How many of ``values`` pass, ``step`` of them known to; where the next one does not, it is the only one asked."""
    if step == len(values) or not passes(values[step]):
        return step
    low, high = step + 1, len(values)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if passes(values[middle - 1]) else (low, middle - 1)
    return low


def fastv(bench: SettingBench, depth: int, inputs: Inputs) -> None:
    """Layer and share: at each later layer as few tokens as can be, and at least one step fewer than before."""
    step = 0
    for layer in range(1, depth):
        methods = [load_method("fastv", layer=layer, keep=keep) for keep in KEEPS]
        step = further(bench.passes, methods, step)


def pyramiddrop(bench: SettingBench, depth: int, inputs: Inputs) -> None:
    """Three cuts at even distances, for each distance as early as can be; gentler ratios where the authors' fail."""
    for factor in (0.5, 0.75):
        for apart in range(1, max((depth - 1) // 3, 1) + 1):
            starts = [(at, at + apart, at + 2 * apart) for at in range(depth - 1 - 2 * apart, -1, -1)]
            methods = [load_method("pyramiddrop", cuts=cuts, ratios=by_factor(factor, 3)) for cuts in starts]
            last_that(bench.passes, methods)


def fitprune(bench: SettingBench, depth: int, inputs: Inputs) -> None:
    """The authors' search for a schedule (:mod:`.fit`), for as much spared compute as can be."""
    samples = inputs()

    def keeps(share: float) -> bool:
        try:
            return bench.passes(fit("fitprune", bench.asker.loaded.model, samples, target=share, tolerance=0.03).method)
        except OptionError:  # out of reach: layer 0 sees all visual tokens
            return False

    last_that(keeps, SPARED)


def visipruner(bench: SettingBench, depth: int, inputs: Inputs) -> None:
    """Shallow depth, thresholds and exit, each measured with what was found before.

    shallow: the most layers in which the shallow rule alone keeps the answers; without any, the phase is left out, as
             by the authors' command line, and the depth only says from where on layers may filter
    middle: for each depth, filtering at once, the largest token threshold, which only grows with depth; at the
            cheapest depth also with lower layer thresholds, under which questions filter later, when a layer matters
    deep: of the cheapest setting, the exit rule that leaves earliest
    """

    def shallow_alone(layers: int) -> Method:
        return load_method("visipruner", stages=("shallow",), shallow_layers=layers)

    deepest = last_that(lambda layers: bench.passes(shallow_alone(layers)), range(1, depth - 2))
    stages = ("middle",) if deepest is None else ("shallow", "middle")
    found: list[Method] = []

    def filtering(layers: int, threshold: float, step: int) -> int:
        """The number of token thresholds that pass, from ``step`` on; the last of them is found."""
        options = {"stages": stages, "shallow_layers": layers, "layer_threshold": threshold}
        methods = [load_method("visipruner", **options, token_threshold=value) for value in MAGNITUDES]
        step = further(bench.passes, methods, step)
        if step and bench.passes(methods[step - 1]):
            found.append(methods[step - 1])
        return step

    step, steps = 0, {}
    for layers in range(1, (deepest or depth - 3) + 1):
        step = steps[layers] = filtering(layers, LAYER_THRESHOLDS[0], step)
    for method in bench.cheapest(found)[:1]:
        layers = method.hyperparameters()["shallow_layers"]
        step = steps[layers]
        for threshold in LAYER_THRESHOLDS[1:]:
            step = filtering(layers, threshold, step)
    for method in bench.cheapest(found)[:1]:
        for earlier in _exits(method):
            last_that(bench.passes, earlier)


def readers(bench: SettingBench, depth: int, inputs: Inputs) -> None:
    """Layer and threshold: at each later layer the largest threshold, which only grows with depth; then the exit."""
    step, found = 0, []
    for layer in range(1, depth):
        methods = [load_method("readers", layer=layer, threshold=value) for value in MAGNITUDES]
        step = further(bench.passes, methods, step)
        found += [one for one in methods[step - 1 : step] if bench.passes(one)]
    for method in bench.cheapest(found)[:1]:
        layers = range(depth - 1, method.hyperparameters()["layer"], -1)
        last_that(bench.passes, [load_method("readers", **given(method), exit=layer) for layer in layers])


def _exits(method: Method) -> Iterator[list[Method]]:
    """The setting with the third phase, by the number of layers without effect, earlier and earlier exits."""
    options = given(method) | {"stages": (*method.hyperparameters()["stages"], "deep")}
    for layers in (2, 1):
        yield [load_method("visipruner", **options, exit_layers=layers, exit_threshold=value) for value in EXITS]


SEARCHES: dict[str, Callable[[SettingBench, int, Inputs], None]] = {
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
