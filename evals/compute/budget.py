"""The options with which a method meets a compute target.

    for each knob of the method:
        settings  = the method at all values of the knob that it accepts, from fewest visual tokens to most
        if the target lies between what the first and the last of them cost:
            bisect, and take the nearer one of the two settings around the target
    refuse, and say how far each knob goes

A target is T, the mean number of visual tokens over decoder-layer inputs; or executed TFLOPs or measured milliseconds
of a prefill. T comes from the method's plan where the options decide it, otherwise, as all compute, from prefills of
the prompts at hand. On a model without weights all comes from plans.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from statistics import fmean
from typing import Any

import torch

from ...engine import prune
from ...engine.contract import Knob
from ...engine.session import PruningSession
from ...engine.trace import Trace
from ...errors import OptionError
from ...methods import Method, load_method
from ...models import LoadedModel
from ...results.store.records import VisualTokens
from ..settings.method_spec import MethodSpec
from ..settings.target import Kind, Target
from ..tasks.tasks import Task
from . import flops
from .prefill_plan import planned_prefill
from .timing import Timing, time_prefill

SAMPLES = 16
DENSE = load_method("none")


@dataclass(frozen=True)
class Cost:
    """Of a prefill, mean over prompts: visual tokens, as traced, and executed TFLOPs."""

    tokens: VisualTokens
    tflops: float


@dataclass(frozen=True)
class Solution:
    """The ``method`` whose ``knob`` comes nearest to the target, and what it costs.

    ``timing`` is a measurement of its own, beside those on which the choice rests; None unless the target is a time.
    """

    method: Method
    knob: str
    target: Target
    cost: Cost
    timing: Timing | None


class Prompts:
    """Prompts on which methods are measured: ``batches`` of model inputs, and the one that is ``timed``."""

    def __init__(self, loaded: LoadedModel, batches: Sequence[Mapping[str, Any]], timed: Mapping[str, Any]) -> None:
        self.loaded, self.batches, self.timed = loaded, batches, timed
        dense = self._traces(DENSE)
        self.layouts = [trace.prompt for trace in dense]
        self.dense = self._mean(dense)
        self.cost = cache(lambda method: self._mean(self._traces(method)))
        self.timing = cache(self.time)

    @classmethod
    def of(cls, loaded: LoadedModel, tasks: Sequence[Task], samples: int = SAMPLES, batch_size: int = 8) -> Prompts:
        """The first ``samples`` questions of each task; the first of all is timed, alone."""
        questions = [task.question(i) for task in tasks for i in range(min(samples, len(task.docs)))]
        parts = [questions[i : i + batch_size] for i in range(0, len(questions), batch_size)]
        batches = [loaded.inputs([text for text, _ in part], [images for _, images in part]) for part in parts]
        return cls(loaded, batches, loaded.inputs([questions[0][0]], [questions[0][1]]))

    @property
    def count(self) -> int:
        """Number of prompts."""
        return sum(layout.rows for layout in self.layouts)

    def tokens(self, method: Method) -> float:
        """T by the method's plan, or traced where it has none."""
        plans = [method.visual_counts(layout, self.loaded.geometry) for layout in self.layouts]
        known = [plan for plan in plans if plan is not None]
        return float(torch.cat(known).double().mean()) if len(known) == len(plans) else self.cost(method).tokens.mean

    def price(self, kind: Kind, method: Method) -> float:
        """What the method costs, in the unit of a target of this ``kind``."""
        if kind == "tokens":
            return self.tokens(method)
        return self.cost(method).tflops if kind == "tflops" else self.timing(method).median_ms

    def time(self, method: Method) -> Timing:
        """A new measurement of the prefill of the timed prompt."""
        return time_prefill(self.loaded, method, self.timed)

    def _traces(self, method: Method) -> list[Trace]:
        with torch.inference_mode(), prune(self.loaded.model, method) as session:
            return [self._trace(session, batch) for batch in self.batches]

    def _trace(self, session: PruningSession, batch: Mapping[str, Any]) -> Trace:
        self.loaded.model(**batch, use_cache=False, logits_to_keep=1)
        return session.trace

    def _mean(self, traces: Sequence[Trace]) -> Cost:
        layers = torch.cat([trace.visual_counts() for trace in traces]).double().mean(0)
        macs = [one for trace in traces for one in flops.executed(trace, self.loaded.geometry).total()]
        prompt = fmean(count for trace in traces for count in trace.prompt.visual_counts)
        return Cost(VisualTokens(prompt=prompt, per_layer=layers.tolist()), fmean(macs) * 1e-12)


class Planned(Prompts):
    """A prompt of ``text`` and ``visual_tokens`` of which nothing runs, on a model that needs no weights.

    Costs follow from sizes and options, without what the method itself computes. Methods whose cost shows only when
    they run raise :class:`OptionError`.
    """

    def __init__(self, loaded: LoadedModel, text: int, visual_tokens: int) -> None:
        def trace(method: Method) -> Trace:
            return planned_prefill(loaded, method, text, visual_tokens)

        self.loaded = loaded
        self.layouts = [trace(DENSE).prompt]
        self.cost = cache(lambda method: self._mean([trace(method)]))
        self.dense = self.cost(DENSE)
        self.timing = cache(self.time)

    def time(self, method: Method) -> Timing:
        """Raises :class:`OptionError`."""
        raise OptionError("a model on meta cannot run: for a time give --weights random")


# ---- solving --------------------------------------------------------------------------------------------------------


def solve(name: str, options: Mapping[str, Any], target: Target, prompts: Prompts) -> Solution:
    """The method ``name`` with ``options``, its knob turned to where it comes nearest to ``target``.

    Raises :class:`OptionError` with the reason if no setting costs as much, or as little, or if there is no knob, and
    :class:`UnsupportedModelError` if the method cannot act on this architecture.
    """
    limits, refusals = [], []
    spec = MethodSpec.of(name, options)
    for knob in spec.knobs():
        try:
            settings, refusal = accepted(spec, knob, prompts)
        except OptionError as error:
            refusals.append(error)
            continue
        limit = beyond(target, knob, settings, refusal, prompts)
        if limit is None:
            method = nearest(settings, target, prompts)
            timing = prompts.time(method) if target.kind == "ms" else None
            return Solution(method, knob.name, target, prompts.cost(method), timing)
        limits.append(limit)
    if not limits:
        raise refusals[0]
    raise OptionError(f"{spec.name}: {target} is out of reach: {'; '.join(limits)}")


def accepted(spec: MethodSpec, knob: Knob, prompts: Prompts) -> tuple[list[Method], OptionError | None]:
    """The method at all values of ``knob`` that it takes on this model, fewest visual tokens first; a refusal, if any.

    Raises the refusal where fewer than two are left, or refused values lie between accepted ones, and
    :class:`UnsupportedModelError` where the method cannot act on this architecture.
    """
    geometry = prompts.loaded.geometry
    most = max(count for layout in prompts.layouts for count in layout.visual_counts)
    usable: dict[int, Method] = {}
    refusal = None
    for number, value in enumerate(knob.values(most, geometry)):
        try:
            method = spec.cls.from_options(**knob.at(value, spec.options))
            method.check(geometry)
            usable[number] = method
        except OptionError as error:
            refusal = error
    if refusal and (len(usable) < 2 or max(usable) - min(usable) >= len(usable)):
        raise refusal
    settings = list(usable.values())
    prune(prompts.loaded.model, settings[0])
    if prompts.tokens(settings[0]) > prompts.tokens(settings[-1]):
        settings.reverse()
    return settings, refusal


def beyond(
    target: Target, knob: Knob, settings: Sequence[Method], refusal: OptionError | None, prompts: Prompts
) -> str | None:
    """How far the knob goes and why not further, if the target lies beyond its ``settings``; None if it does not."""
    least, most = (prompts.price(target.kind, method) for method in (settings[0], settings[-1]))
    reach = f"{knob.name} gives {target.spell(least)} to {target.spell(most)}"
    if target.kind == "ms":
        noise = max(prompts.timing(method).iqr_ms for method in (settings[0], settings[-1]))
        if most - least <= noise:
            return f"{reach}, no further apart than one measurement spreads (interquartile range {noise:.2g} ms)"
    slack = 1e-9 * most  # of means of many numbers
    if least - slack <= target.value <= most + slack:
        return None
    if target.value > most:
        return reach
    tokens = prompts.cost(settings[0]).tokens
    whole = next((i for i, count in enumerate(tokens.per_layer) if count < tokens.prompt), len(tokens.per_layer))
    if whole:
        all_of_them = f"all {tokens.prompt:.4g} visual tokens of a prompt"
        return f"{reach}, since {all_of_them} reach the first {whole} of {len(tokens.per_layer)} layers"
    return f"{reach}: {str(refusal).removeprefix(f'{settings[0].name}: ')}" if refusal else reach


def nearest(settings: Sequence[Method], target: Target, prompts: Prompts) -> Method:
    """The setting that costs nearest to the target, of ``settings`` whose cost rises; of equals the first."""
    price = partial(prompts.price, target.kind)
    place = bisect_left(settings, target.value, key=price)
    best = min(settings[max(place - 1, 0) : place + 1], key=lambda method: abs(price(method) - target.value))
    first = settings[bisect_left(settings, price(best), key=price)]
    return first if price(first) == price(best) else best
