"""The contract between a pruning method and the engine.

A method is a frozen dataclass of hyperparameters. For each prefill the engine calls :meth:`Method.begin` and gets a
:class:`Forward`, which holds the state of that one forward pass and answers at up to three places: behind the
projector, at the input of every decoder layer, and inside its attention; :meth:`Method.vision` answers in front of the
projector. Methods never touch the model: they read the views that the engine hands them and return :class:`Keep`,
:class:`Merge` or a replaced attention output.

Shapes: B rows of the batch, V visual tokens present (the most over the rows; shorter rows are padded at the end and
``view.present`` says where), H heads, L tokens, D hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..errors import OptionError, suggest

if TYPE_CHECKING:
    from ..engine.layout import TokenLayout
    from ..engine.views import AttentionView, BlockView, LayerView, VisionView
    from ..models.adapters import Geometry, VisionGeometry

Positions = Literal["keep", "renumber"]
Layers = Literal["given", "scaled"]
Stage = Literal["image", "tower", "vision", "projector", "decoder", "attention"]
REFERENCE_DEPTH = 32
# Values of an option without a scale of its own: 0, and six decades in steps of 2.3 %.
MAGNITUDES = (0.0, *(float(f"{10 ** (k / 100):.4g}") for k in range(-300, 301)))


@dataclass(frozen=True)
class Keep:
    """Keep the visual tokens where ``mask`` (bool, (B, V)) is true and drop the others, in order."""

    mask: Tensor


@dataclass(frozen=True)
class Merge:
    """Keep, replace and add visual tokens.

    ``mask``: bool (B, V), the tokens that stay. ``replaced``: (B, V, D) or None, new contents for all present tokens
    (only those that stay matter). ``added``: (B, M, D) or None, new tokens, placed behind the last kept visual token
    of the row; ``added_present``: bool (B, M), where None means that all are. ``added_positions``: int (B, M), the
    positions of the new tokens, needed under the ``keep`` policy only. ``anchors``: int (B, M), for each new token the
    visual token (it need not stay) by which it goes: j for behind token j, -1 - j for in front of it; None: behind the
    last one.
    """

    mask: Tensor
    replaced: Tensor | None = None
    added: Tensor | None = None
    added_present: Tensor | None = None
    added_positions: Tensor | None = None
    anchors: Tensor | None = None

    def added_mask(self) -> Tensor:
        """Bool (B, M): the new tokens that exist."""
        assert self.added is not None
        if self.added_present is not None:
            return self.added_present
        return torch.ones(self.added.shape[:2], dtype=torch.bool, device=self.added.device)


@dataclass(frozen=True)
class BlockMerge:
    """Go on in the vision tower with fewer tokens.

    ``tokens``: (N, t, Dv), CLS first where there is one. ``size``: (N, t), how many of the image's tokens each stands
    for. ``bias``: (N, t) or None, added to the attention logits of these tokens as keys in the blocks that follow.
    """

    tokens: Tensor
    size: Tensor
    bias: Tensor | None = None


class Forward:
    """What a method does in one prefill. Every hook may return None: leave things as they are."""

    def projected(self, view: VisionView) -> Keep | Merge | None:
        """Once, behind the projector; B counts images, contents are projected features."""
        return None

    def layer_input(self, layer: int, view: LayerView) -> Keep | Merge | None:
        """Before decoder layer ``layer``."""
        return None

    def attention(self, layer: int, view: AttentionView) -> Tensor | None:
        """Inside decoder layer ``layer``: a returned (B, L, H, head size) tensor replaces the attention output."""
        return None


@dataclass(frozen=True)
class Knob:
    """What sets how much a method keeps; :mod:`visibench.evals.compute.budget` turns it until a target is met.

    ``values(visual_tokens, geometry)``: what to choose from for prompts of so many visual tokens, in an order in which
    the number of visual tokens left only rises or only falls. Values that the method refuses may stand at both ends.
    ``options(value, given)``: what a value means beside the options ``given``; by default the option ``name`` itself.
    ``replaces``: options that must not be given besides.
    """

    name: str
    values: Callable[[int, Geometry], Sequence[float]]
    replaces: tuple[str, ...] = ()
    options: Callable[[Any, Mapping[str, Any]], dict[str, Any]] | None = None

    def at(self, value: float, given: Mapping[str, Any]) -> dict[str, Any]:
        """All options with the knob at ``value``."""
        return {**given, **({self.name: value} if self.options is None else self.options(value, given))}


@dataclass(frozen=True)
class Method:
    """Base of all methods: hyperparameters as fields, facts about the method as class attributes.

    ``positions`` is a field of every method, with the authors' policy as its default: ``keep`` the original position
    ids of the tokens that stay, or ``renumber`` them from 0 after each cut.

    ``examples``: options, as on the command line, with which the method runs on every supported model that has what it
    reads: one string for each way through its code, the plainest first. The tests put all of them through every
    invariant, and ``visibench methods`` prints them. ``everything``: options under which all tokens stay and nothing
    else changes, so that the output is the dense model's bit for bit; None where no options do that.

    ``knobs``: what sets how much is kept, the finest first; without one the method cannot be asked to meet a budget.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str] = ""
    source: ClassVar[str] = ""
    stage: ClassVar[tuple[Stage, ...]] = ()
    adaptive: ClassVar[bool] = False
    vision_blocks: ClassVar[tuple[int, ...]] = (-1,)
    vision_cls: ClassVar[bool] = False
    examples: ClassVar[tuple[str, ...]] = ("",)
    everything: ClassVar[str | None] = None
    knobs: ClassVar[tuple[Knob, ...]] = ()

    positions: Positions = dataclasses.field(default="keep", kw_only=True)

    def __post_init__(self) -> None:
        self.require(self.positions in get_args(Positions), "positions must be 'keep' or 'renumber'")

    def begin(self, layout: TokenLayout, geometry: Geometry) -> Forward:
        """State for one prefill of a batch with this ``layout``."""
        raise NotImplementedError

    def vision(self, view: VisionView) -> Keep | Merge | None:
        """Once for each batch of images, between vision tower and projector; contents are features, B counts images.

        A method of its own and not of :class:`Forward`, because images may be encoded before the prompt is known.
        """
        return None

    def image(self, pixels: Tensor, vision: VisionGeometry) -> Tensor | None:
        """Once for each batch of images, in front of the vision tower: pixels (N, 3, h, w) for ``pixels``.

        The tower interpolates its position embeddings to another size.
        """
        return None

    def block(self, view: BlockView) -> BlockMerge | None:
        """In every block of the vision tower, between attention and MLP."""
        return None

    def check(self, geometry: Geometry) -> None:
        """Raise :class:`OptionError` if these hyperparameters cannot act on a model of this geometry."""

    def left(self, layout: TokenLayout, geometry: Geometry) -> dict[int, Tensor] | None:
        """Visual tokens left in each row, int (B,), by the decoder layer from whose input on; None: the inputs decide.

        Follows from the options and the prompt's ``layout`` alone, before anything runs. No host sync.
        """
        return None

    def visual_counts(self, layout: TokenLayout, geometry: Geometry) -> Tensor | None:
        """Int (B, layers): visual tokens at each layer's input, as the trace will find them; None: inputs decide."""
        left, counts = self.left(layout, geometry), [layout.visual.total]
        if left is None:
            return None
        for layer in range(geometry.layers):
            counts.append(left.get(layer, counts[-1]))
        return torch.stack(counts[1:], dim=1)

    def require(self, condition: bool, message: str) -> None:
        """Raise :class:`OptionError` naming the method unless ``condition`` holds."""
        if not condition:
            raise OptionError(f"{self.name}: {message}")

    def hyperparameters(self) -> dict[str, Any]:
        """All hyperparameters with their values, JSON-ready."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_options(cls, **options: Any) -> Method:
        """Build the method; an unknown option raises :class:`OptionError` with the known ones."""
        cls.check_names(options)
        frozen: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
        return cls(**frozen)

    @classmethod
    def check_names(cls, options: Iterable[str]) -> None:
        """Raise :class:`OptionError` for an option that the method does not have."""
        known = {f.name for f in dataclasses.fields(cls) if f.init}
        for key in options:
            if key not in known:
                raise OptionError(f"{cls.name}: unknown option {key!r}; {suggest(key, known)}")

    def __str__(self) -> str:
        changed = [
            f"{f.name}={_spell(getattr(self, f.name))}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        ]
        return f"{self.name}:{','.join(changed)}" if changed else self.name


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
        scaled = f", scaled to {_spell(tuple(used))}" if self.layers == "scaled" else ""
        meant = f"{option}={_spell(tuple(layers))}{scaled}"
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


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _spell(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)
