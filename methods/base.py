"""What many methods share: one budget, layers named on a model of 32, and the choice of the highest scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..engine.contract import Knob, Method, spell_value

if TYPE_CHECKING:
    from ..engine.contract import Geometry, TokenLayout

Layers = Literal["given", "scaled"]
REFERENCE_DEPTH = 32
# Values of an option without a scale of its own: 0, and six decades in steps of 2.3 %.
MAGNITUDES = (0.0, *(float(f"{10 ** (k / 100):.4g}") for k in range(-300, 301)))


@dataclass(frozen=True)
class Budgeted(Method):
    """A method with one budget: ``keep``, the fraction of a row's visual tokens kept, or ``tokens``, their number.

    Methods that act on the vision side spend it on each image. An adaptive method may go without.
    """

    examples: ClassVar[tuple[str, ...]] = ("keep=0.5",)
    everything: ClassVar[str | None] = "keep=1"
    knobs: ClassVar = (Knob("tokens", lambda visual_tokens, geometry: range(visual_tokens + 1), replaces=("keep",)),)

    keep: float | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        given = (self.keep is not None) + (self.tokens is not None)
        wanted = "at most" if self.adaptive else "exactly"
        self.require(
            given == 1 or (self.adaptive and not given), f"give {wanted} one of keep=FRACTION or tokens=NUMBER"
        )
        self.require(self.keep is None or 0 <= self.keep <= 1, f"keep must lie in [0, 1], not {self.keep}")
        self.require(
            self.tokens is None or (isinstance(self.tokens, int) and self.tokens >= 0), "tokens must be an integer >= 0"
        )

    def budget(self, visual_tokens: Tensor) -> Tensor:
        """Tokens to keep, int (B,), from each row's number of visual tokens, int (B,); fractions are floored."""
        if self.keep is None:
            return visual_tokens.clamp(max=self.tokens)
        return floored(visual_tokens, self.keep)

    def left(self, layout: TokenLayout, geometry: Geometry) -> dict[int, Tensor] | None:
        """The budget of each image, spent in front of the decoder; a method that acts inside it says so itself."""
        assert geometry.vision is not None
        patches = geometry.vision.tokens
        return {0: layout.visual.total // patches * self.budget(torch.tensor(patches))}


@dataclass(frozen=True)
class Layered(Method):
    """A method whose options name decoder layers, in numbers that its authors chose on a model of 32.

    ``layers="given"`` takes the numbers as they are and raises where the model has fewer layers; ``layers="scaled"``
    scales them, defaults and given ones alike, to the depth of the model at hand.
    """

    examples: ClassVar[tuple[str, ...]] = ("layers=scaled",)

    layers: Layers = dataclasses.field(default="given", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.layers in get_args(Layers), "layers must be 'given' or 'scaled'")

    def at(self, layer: int, geometry: Geometry) -> int:
        """The layer of this model for which the number ``layer`` stands; only 0 is ever scaled to 0."""
        if self.layers == "given":
            return layer
        last = geometry.layers - (layer < REFERENCE_DEPTH)
        return min(max(int(layer * geometry.layers / REFERENCE_DEPTH + 0.5), min(layer, 1)), last)

    def check_layers(self, option: str, layers: Sequence[int], geometry: Geometry) -> None:
        """Raise :class:`OptionError` unless the layers of ``option`` exist and differ in this model."""
        used, depth = [self.at(layer, geometry) for layer in layers], geometry.layers
        scaled = f", scaled to {spell_value(tuple(used))}" if self.layers == "scaled" else ""
        meant = f"{option}={spell_value(tuple(layers))}{scaled}"
        remedy = "choose other layers" + (" or layers='scaled'" if self.layers == "given" else "")
        self.require(all(layer < depth for layer in used), f"{meant}, but the model has {depth} layers: {remedy}")
        self.require(len({*used}) == len(used), f"{meant} names a layer twice in a model of {depth} layers: {remedy}")


def floored(count: Tensor, fraction: float) -> Tensor:
    """``fraction`` of int ``count`` (any shape), floored."""
    # The small term undoes binary fractions just below an integer (0.29 of 100 is 28.999…).
    return (count.double() * fraction + 1e-9).floor().long()


def top(scores: Tensor, count: Tensor, present: Tensor) -> Tensor:
    """Mask of the ``count`` highest scores of each row; ties go to the earlier token.

    ``scores``: (B, V), ``count``: int (B,), ``present``: bool (B, V). Returns bool (B, V). No host sync.
    """
    ordered = scores.masked_fill(~present, float("-inf")).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(ordered).scatter_(
        1, ordered, torch.arange(scores.shape[1], device=scores.device).expand_as(ordered)
    )
    return (rank < count[:, None]) & present
