"""Hyperparameters that a method's authors fit to a model on a few prompts, once: the searches, by method.

``fit("fitprune", model, samples, target=0.5)`` gives the method with what was found; ``FITS`` lists the searches. Their
keyword-only parameters are what a user may set. Samples are inputs of the model, as dictionaries; answers play no part.

FitPrune, as in the authors' code (ywh187/FitPrune@d28e418, ``statistical_analysis.py``), knows two masses of a layer:
the mean attention that visual tokens get from visual queries, and that from text queries, each weight the largest over
heads::

    dense masses = those of the unpruned model, by layer
    for alpha, by bisection:
        layer by layer, for each mass: the lightest visual tokens that leave 1 - alpha of the dense mass
        delete those that both can spare, and go on without them
        stop deleting where the mean compute, if no more were deleted, meets the target
    the smallest alpha that meets it; its deletions, mean over samples

What must remain is measured by the dense model, also where earlier deletions have changed the layer. When the schedule
is used (``methods.fitprune``), the product of the masses says which tokens go instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ..engine import prune
from ..engine.contract import Forward, Keep
from ..engine.layout import TokenLayout
from ..engine.trace import Trace
from ..engine.views import AttentionView, LayerView
from ..errors import InputError, OptionError, VisibenchError
from ..methods import Method, load_method
from ..methods.registry import get
from ..models.adapters import Adapter, Geometry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Samples = Sequence[dict[str, Any]]
Plan = TypeVar("Plan")


@dataclass(frozen=True)
class Fitted:
    """A ``method`` with its hyperparameters found, the numbers of the search, and one line that says what they mean."""

    method: Method
    outcome: dict[str, float]
    summary: str


# ---- FitPrune -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def fitprune_deletions(
    model: PreTrainedModel,
    samples: Samples,
    layout: TokenLayout | None = None,
    *,
    target: float,
    tolerance: float = 0.01,
) -> Fitted:
    """The schedule of FitPrune that spares ``target`` of the decoder's compute on visual tokens.

    The search is in the module's description.

    Parameters
    ----------
    samples
        Batches of prompts, left padded, with any numbers of visual tokens but at least one, and text behind them. The
        authors take about 0.01 % of LLaVA's 665k instructions; which ones is not known: their repository shows five.
    layout
        Which tokens are visual, for a bare decoder; the same for all samples.
    target
        Share, in (0, 1), of the multiply-adds on visual tokens alone to be spared. A layer counts with the tokens at
        its input, as the engine runs it; the authors count what layer l deletes as gone before its output projection.
    tolerance
        Width of the last interval of alpha; the authors' is 0.01.

    The result has ``deletions`` out of ``out_of``, the most visual tokens of a prompt here; prompts with fewer lose
    equal shares. The tokens left at each layer are the mean over samples, rounded once, so that the schedule is within
    half a token a layer of what was fitted; the authors floor each layer's mean instead, and print the schedule tried
    last, which may miss the target. ``found``: ``alpha``; ``reduction``, the share of compute that the schedule spares;
    ``visual_tokens``, mean over layer inputs, out of ``out_of``.

    Raises :class:`OptionError` for a target out of reach and :class:`InputError` for samples that cannot be used.
    """
    (found,) = schedules(model, samples, [target], layout, tolerance=tolerance)
    if found is None:
        layers = Adapter(model).geometry.layers
        raise OptionError(
            f"fitprune: target {target:g} is out of reach: layer 0 always sees all visual tokens, and "
            f"{layers} layers can spare {1 - 1 / layers:g} at most; give a lower target"
        )
    return found


@torch.no_grad()
def schedules(
    model: PreTrainedModel,
    samples: Samples,
    targets: Sequence[float],
    layout: TokenLayout | None = None,
    *,
    tolerance: float = 0.01,
) -> list[Fitted | None]:
    """The same for several targets, with each alpha tried once; None for those out of reach."""
    for target in targets:
        _require(0 < target < 1, f"target must lie between 0 and 1, not {target}")
    _require(tolerance > 0, f"tolerance must be positive, not {tolerance}")
    _need(samples)
    geometry = Adapter(model).geometry
    dense = [_masses_by_layer(model, sample, layout) for sample in samples]

    @cache
    def left(alpha: float) -> Tensor:
        masses = zip(samples, dense, strict=True)
        return torch.cat([_counts(model, sample, layout, _Spare(alpha, mass)) for sample, mass in masses])

    def schedule(target: float) -> Fitted | None:
        alpha, counts = smallest(lambda alpha: enough(left(alpha), target, geometry), tolerance)
        return None if counts is None else _scheduled(counts, alpha, target, geometry)

    return [schedule(target) for target in targets]


def _scheduled(counts: Tensor, alpha: float, target: float, geometry: Geometry) -> Fitted:
    """FitPrune with the deletions that turn every prompt's visual tokens into the mean of ``counts``."""
    out_of = int(counts[:, 0].max())
    left = (out_of * counts.sum(0) / counts[:, 0].sum()).round().long()
    deletions = (left[:-1] - left[1:]).tolist()
    reduction = 1 - float(decoder_macs(left, geometry) / decoder_macs(left[:1].expand_as(left), geometry))
    mean = float(left.double().mean())
    return Fitted(
        load_method("fitprune", deletions=deletions, out_of=out_of),
        {"alpha": alpha, "reduction": reduction, "visual_tokens": mean},
        f"each layer may lose {alpha:.3g} of either mass of attention; spares {reduction:.1%} of the decoder's compute "
        f"on visual tokens ({target:.1%} asked) and leaves {mean:.1f} of {out_of} of them, mean over layers",
    )


def smallest(reached: Callable[[float], Plan | None], tolerance: float) -> tuple[float, Plan | None]:
    """Bisection: an alpha in (0, 1], less than ``tolerance`` above one that fails, and its plan; None if all fail."""
    low, high, plan = 0.0, 1.0, reached(1.0)
    while plan is not None and high - low > tolerance:
        middle = (low + high) / 2
        better = reached(middle)
        low, high, plan = (middle, high, plan) if better is None else (low, middle, better)
    return high, plan


def enough(counts: Tensor, target: float, geometry: Geometry) -> Tensor | None:
    """``counts`` with all deletions after the first layer at which they meet ``target`` undone; None if they never do.

    ``counts``: int (samples, layers), visual tokens at each layer's input, never growing.
    """
    goal = (1 - target) * decoder_macs(counts[:, :1].expand_as(counts), geometry).mean()
    stopped = (counts.maximum(counts[:, layer, None]) for layer in range(geometry.layers))
    return next((plan for plan in stopped if decoder_macs(plan, geometry).mean() <= goal), None)


def decoder_macs(counts: Tensor, geometry: Geometry) -> Tensor:
    """Multiply-adds of the decoder on tokens that are alone, fp64; ``counts``: (…, layers), at each layer's input."""
    g, n = geometry, counts.double()
    heads, kv_heads = g.heads * g.head_size, g.kv_heads * g.head_size
    each = 2 * g.hidden * (heads + kv_heads) + 3 * g.hidden * g.intermediate
    return (n * each + 2 * n.square() * heads).sum(-1)


def spared(mass: Tensor, least: Tensor) -> Tensor:
    """Bool (…, V): as many tokens of lowest ``mass`` (…, V) as leave at least ``least`` (…) in the others."""
    ascending, order = mass.sort(dim=-1, stable=True)
    # Summed from the heaviest token on, so that exactly 0 is left without any.
    left = ascending.flip(-1).cumsum(-1).flip(-1).roll(-1, -1)
    left[..., -1] = 0
    return torch.zeros_like(mass, dtype=torch.bool).scatter(-1, order, left >= least[..., None])


def masses(view: AttentionView) -> Tensor:
    """(2, B, V), fp64: attention to each visual token, mean over visual queries and over text behind the image."""
    queries = (view.layout.visual, view.layout.text)
    sums = zip(view.received(), queries, strict=True)
    means = [received.double() / rows.device_counts.clamp(min=1)[:, None] for received, rows in sums]
    return torch.stack(means) * view.present


class _Measure(Forward):
    """Records both masses, (2, B), by layer."""

    def __init__(self) -> None:
        self.masses: list[Tensor] = []

    def attention(self, layer: int, view: AttentionView) -> None:
        self.masses.append(masses(view).sum(-1))


class _Spare(Forward):
    """Deletes behind each layer what leaves 1 - ``alpha`` of both ``dense`` masses, (2, B) by layer."""

    def __init__(self, alpha: float, dense: list[Tensor]) -> None:
        self.alpha, self.dense = alpha, dense

    def attention(self, layer: int, view: AttentionView) -> None:
        self.gone = spared(masses(view), (1 - self.alpha) * self.dense[layer]).all(0)

    def layer_input(self, layer: int, view: LayerView) -> Keep | None:
        return Keep(~self.gone) if layer else None


@dataclass(frozen=True)
class _Probe(Method):
    """Lets ``forward`` act in one prefill."""

    name = "probe"
    title = "Probe"
    hook_points = ("attention", "decoder")

    forward: Forward

    def begin(self, layout: TokenLayout, geometry: Geometry) -> Forward:
        return self.forward


def _masses_by_layer(model: PreTrainedModel, sample: dict[str, Any], layout: TokenLayout | None) -> list[Tensor]:
    measure = _Measure()
    _counts(model, sample, layout, measure)
    return measure.masses


def _counts(model: PreTrainedModel, sample: dict[str, Any], layout: TokenLayout | None, forward: Forward) -> Tensor:
    """Int (B, layers): visual tokens at each layer's input."""
    ((_, trace),) = _prefills(model, _Probe(forward), [sample], layout)
    return trace.visual_counts()


# ---- VTW ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def vtw_layer(
    model: PreTrainedModel,
    samples: Samples,
    layout: TokenLayout | None = None,
    *,
    threshold: float = 0.003,
    first: int = 5,
) -> Fitted:
    """The ``layer`` of VTW for ``model``: the first, from ``first`` on, at which withdrawal changes little.

    Parameters
    ----------
    samples
        Batches of prompts, left padded, each with an image and text behind it; the authors take 20 prompts.
    layout
        Which tokens are visual, for a bare decoder; the same for all samples.
    threshold
        Largest mean over samples of KL(dense ‖ withdrawn), in nats, between next-token distributions. The authors take
        0.003 for LLaVA-1.5-7B and 0.0005 for 13B.

    ``found``: ``divergence``, that mean at the layer, in nats.
    Raises :class:`~visibench.errors.VisibenchError` if no layer is good enough.
    """
    _require(threshold >= 0, f"threshold must be >= 0, not {threshold}")
    _require(first >= 0, f"first must be >= 0, not {first}")
    _need(samples)
    dense = torch.cat([_next_token(output) for output, _ in _prefills(model, load_method("none"), samples, layout)])
    divergences = {}
    for layer in range(first, Adapter(model).geometry.layers):
        method = load_method("vtw", layer=layer)
        withdrawn = torch.cat([_next_token(output) for output, _ in _prefills(model, method, samples, layout)])
        divergences[layer] = divergence = float((dense.exp() * (dense - withdrawn)).sum(-1).mean())
        if divergence <= threshold:
            return Fitted(
                method,
                {"divergence": divergence},
                f"withdrawal at layer {layer} changes the next token by a KL divergence of {divergence:.3g} nats "
                f"(at most {threshold:g} asked), mean over prompts",
            )
    best = min(divergences, key=divergences.__getitem__, default=None)
    nearest = (
        "the model has no such layer" if best is None else f"layer {best} comes nearest, with {divergences[best]:.3g}"
    )
    raise VisibenchError(f"vtw: no layer from {first} on reaches a divergence of {threshold:g}; {nearest}")


def _next_token(output: Any) -> Tensor:
    """Log-probabilities (B, vocabulary) of the token behind each prompt, fp64."""
    return output.logits[:, -1].double().log_softmax(-1)


# ---- by name --------------------------------------------------------------------------------------------------------

FITS: dict[str, Callable[..., Fitted]] = {"fitprune": fitprune_deletions, "vtw": vtw_layer}


def fit(
    name: str, model: PreTrainedModel, samples: Samples, layout: TokenLayout | None = None, **settings: Any
) -> Fitted:
    """Fit the method called ``name``; ``settings`` are the keyword-only parameters of its search in ``FITS``.

    Raises what :func:`check` raises, and what the search does.
    """
    check(name, settings)
    return FITS[name](model, samples, layout, **settings)


def check(name: str, settings: dict[str, Any]) -> None:
    """Raise :class:`OptionError` for a method that is not fitted, and for settings that it does not take or lacks."""
    get(name)
    if name not in FITS:
        raise OptionError(f"{name} has nothing to fit: choose one of {', '.join(FITS)}")
    parameters = inspect.signature(FITS[name]).parameters.values()
    takes = {p.name: p.default is p.empty for p in parameters if p.kind is p.KEYWORD_ONLY}
    for setting in settings:
        if setting not in takes:
            raise OptionError(f"{name}: the fit takes no {setting}; it takes {', '.join(takes)}")
    for setting, needed in takes.items():
        if needed and setting not in settings:
            raise OptionError(f"{name}: the fit needs a {setting}")


def _prefills(model: Any, method: Method, samples: Samples, layout: TokenLayout | None) -> Iterator[tuple[Any, Trace]]:
    """Output and trace of each sample's prefill under ``method``."""
    with prune(model, method, layout=layout) as session:
        for sample in samples:
            output, prompt = model(**sample, use_cache=False, logits_to_keep=1), session.trace.prompt
            if min(*prompt.visual_counts, *prompt.text_counts) == 0:
                raise InputError("cannot fit to a prompt without an image or without text behind it: leave it out")
            yield output, session.trace


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise OptionError(message)


def _need(samples: Samples) -> None:
    if not samples:
        raise InputError("no samples to fit to: give at least one prompt")
