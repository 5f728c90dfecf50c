"""The contract between a pruning method and the engine.

A method is a frozen dataclass of hyperparameters. For each prefill the engine calls :meth:`Method.begin` and gets a
:class:`Forward`, which holds the state of that one forward pass and answers at up to three places: behind the
projector, at the input of every decoder layer, and inside its attention, or reads what its attention and MLP make of
their inputs; :meth:`Method.vision` answers in front of the projector, :meth:`Method.block` inside the vision tower,
:meth:`Method.image` in front of it. Methods never touch the model: they read the views that the engine hands them and
return :class:`Keep`, :class:`Ranking`, :class:`Merge`, :class:`Join` or a replaced attention output; inside the tower
:class:`BlockCut` or :class:`BlockMerge`, in front of it smaller images.

Shapes: B rows of the batch, V visual tokens present (the most over the rows; shorter rows are padded at the end and
``view.present`` says where), H heads, L tokens, D hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast, get_args, get_type_hints

import torch
from torch import Tensor

from ..errors import OptionError, suggest
from .decisions import BlockCut, BlockMerge, Join, Keep, Merge, Ranking
from .units.shapes import Grid, ImageShape

if TYPE_CHECKING:
    from ..models.adapters import Geometry, VisionGeometry
    from .attention import Contributions
    from .layout import TokenLayout, TokenSet
    from .trace import OnHost
    from .units.blocks import BlockView
    from .units.view import ImageView, VisionView
    from .views import AttentionView, LayerView, SublayerView

__all__ = [
    "AttentionView",
    "BlockCut",
    "BlockMerge",
    "BlockView",
    "Contributions",
    "Forward",
    "Geometry",
    "Grid",
    "HookPoint",
    "ImageShape",
    "ImageView",
    "Join",
    "Keep",
    "Knob",
    "LayerView",
    "Merge",
    "Method",
    "OnHost",
    "Positions",
    "Ranking",
    "SublayerView",
    "TokenLayout",
    "TokenSet",
    "VisionGeometry",
    "VisionView",
    "spell_value",
]

Positions = Literal["keep", "renumber"]
HookPoint = Literal["image", "tower", "vision", "projector", "decoder", "attention", "sublayers"]
VISION_SIDE = {"image", "tower", "vision", "projector"}


class Forward:
    """What a method does in one prefill. Every hook may return None: leave things as they are."""

    def projected(self, view: Any) -> Keep | Merge | None:
        """Behind the projector; contents are projected features.

        ``view``: an :class:`ImageView` of images that enter the decoder with as many tokens, once for each number; B
        counts them. For methods that act ``by_unit`` a :class:`VisionView`, once for each shape.
        """
        return None

    def layer_input(self, layer: int, view: LayerView) -> Keep | Ranking | Merge | Join | None:
        """Before decoder layer ``layer``."""
        return None

    def attention(self, layer: int, view: AttentionView) -> Tensor | None:
        """Inside decoder layer ``layer``: a returned (B, L, H, head size) tensor replaces the attention output."""
        return None

    def sublayer(self, layer: int, view: SublayerView) -> None:
        """Behind the attention and behind the MLP of decoder layer ``layer``: what went in and what came out."""


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

    ``positions`` is an option of every method: ``keep`` the original position ids of the tokens that stay, or
    ``renumber`` them from 0 after each cut. ``positions = "renumber"`` in a class makes that its default: the authors'
    policy.

    ``hook_points``: where the method acts. ``image``, ``tower`` and ``vision`` are answered by its own :meth:`image`,
    :meth:`block` and :meth:`vision`; ``projector``, ``decoder``, ``attention`` and ``sublayers`` by the
    :class:`Forward` of :meth:`begin`.

    ``examples``: options, as on the command line, with which the method runs on every supported model that has what it
    reads: one string for each way through its code, the plainest first. The tests put all of them through every
    invariant, and ``visibench methods`` prints them. ``everything``: options under which all tokens stay and nothing
    else changes, so that the output is the dense model's bit for bit; None where no options do that.

    ``knobs``: what sets how much is kept, the finest first; without one the method cannot be asked to meet a budget.

    ``block_part``: behind which part of a vision block :meth:`block` is asked.

    ``reorders``: whether tokens that stay may go on in another order than they had. ``holds_aside``: whether tokens
    that left may join a later layer. ``by_unit``: whether behind the projector, too, it is shown units, and not whole
    images as they enter the decoder.

    ``newlines`` and ``unpad``, options of methods of the vision side: whether tokens that are no feature, such as
    newlines behind rows of tiles, ``keep`` their places, ``drop`` out or ``compete`` with the others; and whether
    features of padding, which the model leaves out of the prompt, are left out of the choice as well, or only
    ``after`` it; false: those that are chosen enter the prompt.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str] = ""
    source: ClassVar[str] = ""
    hook_points: ClassVar[tuple[HookPoint, ...]] = ()
    adaptive: ClassVar[bool] = False
    reorders: ClassVar[bool] = False
    holds_aside: ClassVar[bool] = False
    vision_blocks: ClassVar[tuple[int, ...]] = (-1,)
    vision_cls: ClassVar[bool] = False
    block_part: ClassVar[Literal["attention", "mlp"]] = "attention"
    by_unit: ClassVar[bool] = False
    examples: ClassVar[tuple[str, ...]] = ("",)
    everything: ClassVar[str | None] = None
    knobs: ClassVar[tuple[Knob, ...]] = ()

    newlines = "keep"
    unpad = cast("bool | Literal['after']", True)  # unannotated: no option of all methods

    positions: Positions = dataclasses.field(default="keep", kw_only=True)

    def __init_subclass__(cls) -> None:
        """A bare value in a class changes the default of an option that it inherits."""
        super().__init_subclass__()
        own = vars(cls).get("__annotations__", {})
        for base in [base for base in cls.__mro__[:0:-1] if dataclasses.is_dataclass(base)]:
            for option in dataclasses.fields(base):
                if option.name in vars(cls) and option.name not in own:
                    cls.__annotations__ = {**own, option.name: get_type_hints(base)[option.name]}
                    changed: Any = dataclasses.field(
                        default=vars(cls)[option.name], kw_only=bool(option.kw_only), metadata=option.metadata
                    )
                    setattr(cls, option.name, changed)
                    own = cls.__annotations__

    def __post_init__(self) -> None:
        self.require(self.positions in get_args(Positions), "positions must be 'keep' or 'renumber'")

    def begin(self, layout: TokenLayout, geometry: Geometry) -> Forward:
        """State for one prefill of a batch with this ``layout``; by default one that leaves things as they are."""
        return Forward()

    def vision(self, view: VisionView) -> Keep | Merge | None:
        """Between vision tower and projector, once for each shape; contents are features, B counts units.

        A method of its own and not of :class:`Forward`, because images may be encoded before the prompt is known.
        """
        return None

    def image(self, pixels: Tensor, grid: Grid, vision: VisionGeometry) -> Tensor | None:
        """In front of the vision tower, once for each shape of image or tile: smaller ``pixels`` (N, C, h, w).

        ``grid``: frames, rows and columns of the tokens that the tower makes of each; those of :meth:`smaller` are what
        it makes then. The tower interpolates its position embeddings to another size.
        """
        return None

    def smaller(self, grid: Grid, vision: VisionGeometry) -> Grid:
        """Of a method that acts there: the grid of tokens of an image or tile that had ``grid``."""
        return grid

    def block(self, view: BlockView) -> BlockMerge | BlockCut | None:
        """In every block of the vision tower, behind its attention or its MLP, as ``block_part`` says.

        Asked once for each shape of unit. Budgets count the tokens of ``view.grid``. None behind the block whose output
        the model uses.
        """
        return None

    def blocks_read(self, vision: VisionGeometry) -> tuple[int, ...]:
        """Vision blocks whose keys and CLS attention the method reads, counted back as in :class:`VisionView`."""
        return self.vision_blocks

    def blocks_received(self, vision: VisionGeometry) -> tuple[int, ...]:
        """Vision blocks of which it reads the attention that each patch receives, counted back likewise."""
        return ()

    def tower_tokens(self, vision: VisionGeometry) -> Sequence[tuple[int, int]] | None:
        """For a method that acts there: patches of a unit, with CLS, at attention and MLP of each block of the tower.

        None: the inputs decide.
        """
        return None

    @property
    def biases_keys(self) -> bool:
        """Whether it puts a lasting bias on keys, which flash attention cannot take."""
        return False

    def check(self, geometry: Geometry) -> None:
        """Raise :class:`OptionError` if these hyperparameters cannot act on a model of this geometry."""

    def at(self, layer: int, geometry: Geometry) -> int:
        """The decoder layer of this model that an option means by the number ``layer``."""
        return layer

    def check_layers(self, option: str, layers: Sequence[int], geometry: Geometry, otherwise: str = "") -> None:
        """Raise :class:`OptionError` unless the ``layers`` that an ``option`` names exist and differ in this model.

        ``otherwise``: what else than choosing others would help.
        """
        used, depth, remedy = [self.at(layer, geometry) for layer in layers], geometry.layers, "choose other layers"
        scaled = "" if used == [*layers] else f", scaled to {spell_value(tuple(used))}"
        meant = f"{option}={spell_value(tuple(layers))}{scaled}"
        exist, differ = all(layer < depth for layer in used), len({*used}) == len(used)
        self.require(exist, f"{meant}, but the model has {depth} layers: {remedy}{otherwise}")
        self.require(differ, f"{meant} names a layer twice in a model of {depth} layers: {remedy}{otherwise}")

    def left(self, layout: TokenLayout, geometry: Geometry) -> dict[int, Tensor] | None:
        """Visual tokens left in each row, int (B,) on the host, by the decoder layer from whose input on.

        None: the inputs decide.

        Follows from the options and the prompt's ``layout`` alone, before anything runs. No host sync.
        """
        return None

    def keeps_all(self, layout: TokenLayout, geometry: Geometry) -> bool:
        """Whether the options say that every token stays: rows then stay padded, as in the model that nobody prunes."""
        left = self.left(layout, geometry)
        return left is not None and all(torch.equal(n, layout.visual.host_counts) for n in left.values())

    def visual_counts(self, layout: TokenLayout, geometry: Geometry) -> Tensor | None:
        """Int (B, layers): visual tokens at each layer's input, as the trace will find them; None: inputs decide."""
        left, counts = self.left(layout, geometry), [layout.visual.host_counts]
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
        """All hyperparameters with their values, JSON-ready.

        Options that came ``later`` are left out where they have their defaults: what was stored before is found again.
        """
        return {
            f.name: _plain(getattr(self, f.name))
            for f in dataclasses.fields(self)
            if not (f.metadata.get("later") and getattr(self, f.name) == f.default)
        }

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

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self}>"

    def __str__(self) -> str:
        changed = [
            f"{f.name}={spell_value(getattr(self, f.name))}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        ]
        return f"{self.name}:{','.join(changed)}" if changed else self.name


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def spell_value(value: Any) -> str:
    """An option's value as it is written on the command line; a list with plus signs."""
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)
