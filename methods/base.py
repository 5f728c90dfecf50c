"""What many methods share: one budget, a score, layers named on a model of 32, and the choice of the highest scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..engine.contract import Forward, HookPoint, ImageShape, Keep, Knob, Method, Ranking
from ..engine.decisions import top as top  # methods take it from here
from ..errors import VisibenchError
from .pieces import by_place, marked, per_image

if TYPE_CHECKING:
    from ..engine.contract import (
        AttentionView,
        Geometry,
        Grid,
        ImageView,
        LayerView,
        TokenLayout,
        VisionGeometry,
        VisionView,
    )

Layers = Literal["given", "scaled"]
Newlines = Literal["keep", "drop", "compete"]
Salience = Literal["cls", "received"]
LATER = {"later": True}
REFERENCE_DEPTH = 32
REFERENCE_BLOCKS = 24
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
        """The budget of each image, spent in front of the decoder; a method that acts inside it says so itself.

        None where images differ in size and the ``layout`` does not say how.
        """
        images = self.images(layout, geometry)
        if images is None:
            return None
        left = {image: self.image_left(image) for image in {image for row in images for image in row}}
        return {0: torch.tensor([sum(left[image] for image in row) for row in images])}

    def images(self, layout: TokenLayout, geometry: Geometry) -> Sequence[Sequence[ImageShape]] | None:
        """The images of each row; None where they differ in size and the ``layout`` does not say how."""
        vision = geometry.vision
        assert vision is not None
        if layout.images is not None:
            return layout.images
        if vision.tiled or not vision.tokens:
            return None
        return [[ImageShape((vision.shape,))] * (count // vision.tokens) for count in layout.visual_counts]

    def keeps_all(self, layout: TokenLayout, geometry: Geometry) -> bool:
        return self.keep == 1 or super().keeps_all(layout, geometry)

    def image_left(self, image: ImageShape) -> int:
        """Tokens of an image that enter the decoder."""
        loose = image.loose if self.newlines == "keep" else 0
        if "projector" in self.hook_points and not self.by_unit:
            competing = image.loose if self.newlines == "compete" else 0
            return self.unit_left((1, 1, sum(map(prod, image.units)) + competing)) + loose
        return sum(map(self.unit_left, self.shown(image))) + loose

    def shown(self, image: ImageShape) -> tuple[Grid, ...]:
        """The units of an image of which tokens are chosen, those of padding among them where they may be."""
        return image.units if self.unpad and not self.changes_tower else image.padded or image.units

    @property
    def changes_tower(self) -> bool:
        """Whether the tower itself makes fewer tokens, of whole units."""
        return bool({"image", "tower"} & set(self.hook_points))

    def unit_left(self, grid: Grid) -> int:
        """Tokens that stay of those on a ``grid`` of frames, rows and columns, which are shown together."""
        return int(self.budget(torch.tensor(prod(grid))))


@dataclass(frozen=True)
class Ranked(Method):
    """A method of the decoder that keeps the visual tokens of highest :meth:`score`, where and as many as :meth:`left`.

    :meth:`score` sees the first of ``hook_points``: with ``decoder`` the input of the layer where tokens leave, with
    ``attention`` the attention of the layer before it.
    """

    @property
    def scored_at(self) -> HookPoint:
        """The hook point at which the score is asked for."""
        return self.hook_points[0]

    def score(self, view: Any) -> Tensor:
        """Scores (B, V) of the visual tokens of ``view``; higher ones stay, of equal ones the earlier."""
        raise NotImplementedError

    def choose(self, scores: Tensor, view: LayerView, count: Tensor) -> Keep | Ranking:
        """Which tokens stay, ``count`` of each row, int (B,) on the host: by default those of highest score."""
        tokens = view.layout.visual
        self.check_scores(scores, tokens.sizes)
        return Ranking.of(scores, count.tolist(), tokens)

    def check_scores(self, scores: Tensor, shape: tuple[int, ...]) -> None:
        """Raise :class:`VisibenchError` unless there is one score a token: ``shape``."""
        if scores.shape != shape:
            wanted = "(N, P)" if self.scored_at in ("vision", "projector") else "(B, V)"
            raise VisibenchError(
                f"{self.name}.score: wants one score a token, {wanted} = {tuple(shape)}, got {tuple(scores.shape)}"
            )

    def begin(self, layout: TokenLayout, geometry: Geometry) -> Forward:
        return RankedForward(self, self.left(layout, geometry) or {})


class RankedForward(Forward):
    """State of one prefill: visual tokens ``left``, as in the method, where others leave, and waiting scores."""

    def __init__(self, method: Ranked, left: dict[int, Tensor]) -> None:
        self.method, self.left = method, left
        self.scores: Tensor | None = None

    def attention(self, layer: int, view: AttentionView) -> None:
        if self.method.scored_at == "attention" and layer + 1 in self.left:
            self.scores = self.method.score(view)

    def layer_input(self, layer: int, view: LayerView) -> Keep | Ranking | None:
        if layer not in self.left:
            return None
        decision = self.method.choose(self.scored(layer, view), view, self.left[layer])
        self.scores = None
        return decision

    def scored(self, layer: int, view: LayerView) -> Tensor:
        """Scores (B, V) of the visual tokens at the input of a layer where some leave."""
        scores = self.method.score(view) if self.method.scored_at == "decoder" else self.scores
        if scores is None:
            raise VisibenchError(f"{self.method.name}: no scores for layer {layer}: nobody saw the attention before it")
        return scores


@dataclass(frozen=True)
class Scored(Ranked, Budgeted):
    """A method that is its :meth:`score`: the visual tokens of highest score stay, as many as its budget.

    The first of ``hook_points`` says what is scored: with ``vision`` or ``projector`` the tokens of each image, with
    ``attention`` or ``decoder`` those of each row, at the input of ``layer``, an option of methods that declare it
    (``layer: int = 2``).
    """

    layer = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.layer >= 0, "layer must be >= 0")
        behind = self.layer > 0 or self.scored_at != "attention"
        self.require(behind, "layer must be >= 1: the attention of the layer before it is read")

    @property
    def on_images(self) -> bool:
        """Whether images are scored, in front of the decoder."""
        return self.scored_at in ("vision", "projector")

    def check(self, geometry: Geometry) -> None:
        if not self.on_images:
            self.check_layers("layer", (self.layer,), geometry)

    def left(self, layout: TokenLayout, geometry: Geometry) -> dict[int, Tensor] | None:
        if self.on_images:
            return super().left(layout, geometry)
        return {self.at(self.layer, geometry): self.budget(layout.visual.host_counts)}

    def begin(self, layout: TokenLayout, geometry: Geometry) -> Forward:
        return ScoredImages(self) if self.on_images else super().begin(layout, geometry)

    def vision(self, view: VisionView) -> Keep | None:
        return self.image_tokens(view) if self.scored_at == "vision" else None

    def image_tokens(self, view: VisionView) -> Keep:
        """The tokens of each image that stay."""
        scores = self.score(view)
        self.check_scores(scores, view.sizes)
        return chosen(scores.argsort(dim=1, descending=True, stable=True)[:, : per_image(self, view.sizes[1])], view)


@dataclass(frozen=True)
class Picking(Scored):
    """A method that chooses the tokens of each image one by one, as many as its budget, by :meth:`picked`."""

    def picked(self, view: Any) -> Tensor:
        """Int (N, n): the tokens of each image of ``view`` that stay, the first choice first."""
        raise NotImplementedError

    def score(self, view: Any) -> Tensor:
        return by_place(self.picked(view), view.sizes[1])

    def image_tokens(self, view: VisionView) -> Keep:
        return chosen(self.picked(view), view)


def chosen(picked: Tensor, view: VisionView) -> Keep:
    """Keep of each image the tokens ``picked``, int (N, n), no two of them the same."""
    images, patches = view.sizes
    return Keep(marked(picked, patches), counts=(int(picked.shape[1]),) * images)


class ScoredImages(Forward):
    """One prefill of a method that scores images."""

    def __init__(self, method: Scored) -> None:
        self.method = method

    def projected(self, view: VisionView) -> Keep | None:
        return self.method.image_tokens(view) if self.method.scored_at == "projector" else None


@dataclass(frozen=True)
class OnImages(Method):
    """A method of the vision side.

    ``newlines``: whether tokens that are no patch, such as newlines behind rows of tiles, ``keep`` their places or
    ``drop`` out; behind the projector they may also ``compete`` with the others.
    """

    newlines: Newlines = dataclasses.field(default="keep", kw_only=True, metadata=LATER)

    def __post_init__(self) -> None:
        super().__post_init__()
        images = "projector" in self.hook_points and not self.by_unit
        known = get_args(Newlines) if images else get_args(Newlines)[:2]
        self.require(self.newlines in known, f"newlines must be {' or '.join(map(repr, known))}")


@dataclass(frozen=True)
class OnPatches(OnImages):
    """A method that chooses among the patches of a unit.

    ``unpad=false``: those of padding, which some models leave out of the prompt, are chosen from as well, and enter the
    prompt where they are chosen.
    """

    unpad: bool = dataclasses.field(default=True, kw_only=True, metadata=LATER)

    def check(self, geometry: Geometry) -> None:
        super().check(geometry)
        self.require(
            self.unpad or self.positions == "renumber" or geometry.vision is None or not geometry.vision.tiled,
            "patches of padding have no position in the prompt to keep: use positions='renumber' or unpad=true",
        )


@dataclass(frozen=True)
class Salient(Method):
    """A method that reads how much attention each patch gets.

    ``attention``: that of the ``cls`` token, or, in towers without one, what a patch has ``received`` from all of them,
    mean over heads and queries, in the last block in which they all see one another.
    """

    attention: Salience = dataclasses.field(default="cls", kw_only=True, metadata=LATER)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.attention in get_args(Salience), "attention must be 'cls' or 'received'")

    def check(self, geometry: Geometry) -> None:
        super().check(geometry)
        self.require(
            geometry.vision is None or geometry.vision.has_cls or self.attention == "received",
            "scores patches by the attention of the CLS token, and this model's vision tower has none: "
            "use attention='received', or a method without it, such as divprune or pooling",
        )

    def blocks_read(self, vision: VisionGeometry) -> tuple[int, ...]:
        return super().blocks_read(vision) if self.attention == "cls" else ()

    def blocks_received(self, vision: VisionGeometry) -> tuple[int, ...]:
        return (vision.last_full,) if self.attention == "received" else super().blocks_received(vision)

    def salience(self, view: VisionView | ImageView, block: int | None = None) -> Tensor:
        """(N, P): the attention that each patch gets in a ``block``, mean over heads; by default in the last one."""
        if self.attention == "received":
            return view.received(block)
        return view.cls_weights(-1 if block is None else block).mean(1)


@dataclass(frozen=True)
class Layered(Method):
    """A method whose options name decoder layers or vision blocks, in numbers that its authors chose on 32 and 24.

    ``layers="given"`` takes the numbers as they are and raises where the model has fewer; ``layers="scaled"`` scales
    them, defaults and given ones alike, to the depth of the model at hand.
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

    def check_layers(self, option: str, layers: Sequence[int], geometry: Geometry, otherwise: str = "") -> None:
        super().check_layers(option, layers, geometry, otherwise or " or layers='scaled'" * (self.layers == "given"))

    def block_at(self, block: int, vision: VisionGeometry) -> int:
        """The vision block for which the number ``block`` stands, counted back from the features' as in views."""
        if self.layers == "scaled":
            block = min(int(block * vision.layers / REFERENCE_BLOCKS + 0.5), vision.feature_block)
        return block - vision.feature_block - 1

    def check_block(self, option: str, block: int, geometry: Geometry) -> None:
        """Raise :class:`OptionError` unless the vision block that an ``option`` names is one up to the features'."""
        if geometry.vision is None:
            return
        self.require(
            self.block_at(block, geometry.vision) < 0,
            f"{option}={block}, but the features are those of vision block {geometry.vision.feature_block}: choose "
            "another block or layers='scaled'",
        )

    def check_full_block(self, option: str, block: int, geometry: Geometry, otherwise: str = "") -> None:
        """Raise :class:`OptionError` if the patches of the vision block that an ``option`` names attend in windows."""
        vision = geometry.vision
        if vision is None or vision.window is None:
            return
        used = self.block_at(block, vision) + vision.feature_block + 1
        self.require(
            used in vision.full_blocks,
            f"{option}={block} names vision block {used}, in which patches attend within windows: choose one "
            f"of {', '.join(map(str, vision.full_blocks))} with layers='given'{otherwise}",
        )


def floored(count: Tensor, fraction: float | Tensor) -> Tensor:
    """``fraction`` of int ``count`` (any shapes, fp64), floored."""
    # The small term undoes binary fractions just below an integer (0.29 of 100 is 28.999…).
    return (count.double() * fraction + 1e-9).floor().long()
