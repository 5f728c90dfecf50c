"""All invariants of a method class as one table: each of its examples against each of them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ...errors import FOREIGN, OptionError
from ...methods import Method
from ...models import load_model
from ...models.adapters import Adapter
from ..settings import method_spec
from . import counters, generation, prefills
from .prefills import Bench, hold

Invariant = Callable[[Bench, Method], Any]

INVARIANTS: tuple[Invariant, ...] = (
    prefills.row_alone,
    prefills.without_images,
    prefills.inputs_decide,
    prefills.eager_agrees,
    prefills.scores_are_numbers,
    prefills.counts_promised,
    prefills.caches_fit,
    prefills.layers_run_once,
    prefills.order_and_positions,
    generation.cache_changes_nothing,
    generation.batch_generates_alike,
    generation.chunks_are_alike,
    generation.model_is_as_before,
    counters.fvcore_agrees,
    counters.torch_agrees,
    counters.torch_agrees_on_batches,
)
"""What holds for every set of options; each returns a note, if anything."""


@dataclass(frozen=True)
class Result:
    """One invariant: ``what`` must hold, and by example of the method what broke and what is noted."""

    what: str
    broken: dict[str, str]
    noted: dict[str, str]

    @property
    def holds(self) -> bool:
        """Whether nothing broke."""
        return not self.broken


def table(cls: type[Method], bench: Bench | None = None) -> Iterator[Result]:
    """Every invariant in turn, over all examples of the method. Raises :class:`OptionError` for examples it refuses."""
    bench = bench or Bench()
    examples = [method_spec.of_class(cls, options) for options in cls.examples]
    everything = None if cls.everything is None else method_spec.of_class(cls, cls.everything)
    for method in examples:
        method.check(bench.geometry)
    for invariant in INVARIANTS:
        yield checked(invariant, bench, examples)
    yield checked(
        lambda bench, method: prefills.acts(bench, method, everything), bench, examples, prefills.acts.__doc__
    )
    if everything is not None:
        yield checked(generation.everything_is_dense, bench, [everything])
    yield checked(fits_published_sizes, bench, examples)
    yield checked(names_the_nearest_option, bench, examples[:1])


def checked(invariant: Invariant, bench: Bench, methods: list[Method], what: str | None = None) -> Result:
    """One invariant over methods. Whatever the method itself raises breaks it too."""
    broken, noted = {}, {}
    for method in methods:
        try:
            note = invariant(bench, method)
        except FOREIGN as error:  # the method may fail in any way
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            broken[str(method)] = kind + " ".join(str(error).split())
        else:
            if note:
                noted[str(method)] = note
    return Result((what or invariant.__doc__ or "").strip(), broken, noted)


def fits_published_sizes(bench: Bench, method: Method) -> None:
    """its examples act on LLaVA-1.5's sizes"""
    method.check(Adapter(load_model("llava-1.5-7b", weights="meta").model).geometry)


def names_the_nearest_option(bench: Bench, method: Method) -> None:
    """an unknown option is refused, and the nearest one named"""
    cls = type(method)
    for option in (field.name for field in dataclasses.fields(cls)):
        refusal = ""
        try:
            method_spec.of_class(cls, f"{option}_=1")
        except OptionError as error:
            refusal = str(error)
        expected = f"{cls.name}: unknown option '{option}_'; did you mean '{option}'"
        hold(re.match(re.escape(expected), refusal), f"option {option}_: {refusal or 'is taken'}")
