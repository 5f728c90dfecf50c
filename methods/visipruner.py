"""VisiPruner: *Decoding Discontinuous Cross-Modal Dynamics for Efficient Multimodal LLMs* (arXiv 2510.17205).

Authors' code: EIT-NLP/VisiPruner, commit d778622. Decoder layers count from 0; K is ``shallow_layers``.

    shallow, layers 0 … K-1:  text does not read visual tokens; in layer 0 its visual attention mass goes to the value
                              of one visual token, the sink
    middle, layers > K:       c_j = last token's attention to visual token j times its value, heads side by side;
                              a   = last token's attention output
                              the first layer where any cos(a - c_j, a) < layer_threshold filters:
                              keep { j : |c_j| > token_threshold } from the next layer on
    deep, after filtering:    each layer where no cos(a - c_j, a) < exit_threshold counts;
                              after ``exit_layers`` of them all visual tokens leave

Everything happens in prefill. Generated tokens attend to whatever the KV caches hold: all visual tokens up to and
including the filtering layer, the kept ones until the exit, none after it.

The shallow edits act on weights after the softmax, which are not normalised again; so by default the shallow phase
saves nothing: the weights stay, and text reads a value of zero, or the sink's, at visual tokens. ``skip=True`` masks
before the softmax instead, so that text (and in layer 0 each visual token) runs over fewer keys.

Where the paper's text differs from the code, the code is the default and an option gives the text:
``consecutive_exit`` (the code's count is never reset), ``visual_self_attention=False`` (the paper also removes
visual-to-visual attention in the shallow layers), ``sink`` (the paper merges onto any visual token; the code onto the
first). ``layer0`` chooses between the code's two rules for layer 0, by model size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ..engine.contract import Forward, Keep, Knob, Ranking
from .base import MAGNITUDES, REFERENCE_DEPTH, Layered

if TYPE_CHECKING:
    from ..engine.contract import AttentionView, Contributions, Geometry, LayerView, OnHost, TokenLayout, TokenSet

PHASES = ("shallow", "middle", "deep")


@dataclass(frozen=True)
class VisiPruner(Layered):
    """Shallow visual attention off, a value-aware choice in the middle, no visual tokens in the deep layers."""

    name = "visipruner"  # registered with the plan of visipruner_forced, which can stand in for the rule
    title = "VisiPruner"
    paper = "2510.17205"
    source = "EIT-NLP/VisiPruner@d778622"
    hook_points = ("attention", "decoder")
    adaptive = True
    examples: ClassVar[tuple[str, ...]] = (
        "layers=scaled",
        "layers=scaled,layer_threshold=0.9,token_threshold=3,exit_threshold=0.9",
        "layers=scaled,layer0=13b,consecutive_exit=true",
        "layers=scaled,visual_self_attention=false,sink=7",
        "layers=scaled,skip=true",
        "layers=scaled,skip=true,layer0=13b",
        "layers=scaled,skip=true,visual_self_attention=false",
    )
    everything = "layers=scaled,stages=middle,layer_threshold=1,token_threshold=0"
    knobs: ClassVar[tuple[Knob, ...]] = (
        Knob("token_threshold", lambda visual_tokens, geometry: MAGNITUDES),
        Knob("shallow_layers", lambda visual_tokens, geometry: range(1, max(geometry.layers, REFERENCE_DEPTH))),
    )

    # The phase without which an option does nothing.
    belongs: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("layer0", "sink", "visual_self_attention", "skip"), "shallow"),
        **dict.fromkeys(("layer_threshold", "token_threshold"), "middle"),
        **dict.fromkeys(("exit_threshold", "exit_layers", "consecutive_exit"), "deep"),
    }

    stages: tuple[str, ...] = PHASES
    shallow_layers: int = 6
    layer_threshold: float = 0.995
    token_threshold: float = 0.2
    exit_threshold: float = 0.999
    exit_layers: int = 2
    layer0: Literal["7b", "13b"] = "7b"
    sink: int = 0
    visual_self_attention: bool = True
    consecutive_exit: bool = False
    skip: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = sorted(set(self.stages) - set(PHASES))
        self.require(not unknown, f"unknown stages {unknown}; known: {', '.join(PHASES)}")
        self.require(
            "deep" not in self.stages or "middle" in self.stages, "stage 'deep' does nothing without 'middle': add it"
        )
        self.require(self.shallow_layers >= 1, "shallow_layers must be >= 1")
        self.require(self.layer0 in ("7b", "13b"), f"layer0 must be '7b' or '13b', not {self.layer0!r}")
        self.require(self.sink >= 0, "sink must be >= 0")
        self.require(self.exit_layers >= 1, "exit_layers must be >= 1")
        for name in ("layer_threshold", "exit_threshold"):
            self.require(-1 <= getattr(self, name) <= 1, f"{name} is a cosine and must lie in [-1, 1]")
        self.require(self.token_threshold >= 0, "token_threshold is a norm and must be >= 0")
        for option, part in self.belongs.items():
            used = part in self.stages or not self.changed(option)
            self.require(used, f"{option} has no effect without stage {part!r}")
        self.require(self.layer0 == "7b" or self.sink == 0, "sink has no effect with layer0='13b', which moves no mass")

    def changed(self, option: str) -> bool:
        """Whether an option has another value than by default."""
        return bool(getattr(self, option) != type(self).__dataclass_fields__[option].default)

    def check(self, geometry: Geometry) -> None:
        self.check_layers("shallow_layers", (self.shallow_layers,), geometry)

    def left(self, layout: TokenLayout, geometry: Geometry) -> dict[int, Tensor] | None:
        return None if "middle" in self.stages else {}

    def keeps_all(self, layout: TokenLayout, geometry: Geometry) -> bool:
        nothing = self.token_threshold == 0 and "deep" not in self.stages
        return nothing or super().keeps_all(layout, geometry)

    def begin(self, layout: TokenLayout, geometry: Geometry) -> Forward:
        return VisiPrunerForward(self, layout, geometry)


class VisiPrunerForward(Forward):
    """State of one prefill: for each row, whether it has filtered and how many layers were without effect.

    ``unread``: contributions in layers that could not let any row lose tokens, whatever was found. ``coming``: these,
    and those of the last layer, on their way to the host.
    """

    def __init__(self, method: VisiPruner, layout: TokenLayout, geometry: Geometry) -> None:
        self.method = method
        self.shallow_layers = method.at(method.shallow_layers, geometry)
        self.total = layout.visual_counts
        self.filtered = [False] * layout.rows
        self.idle_layers = [0] * layout.rows
        self.unread: list[Contributions] = []
        self.coming: OnHost | None = None
        self.others: Tensor | None = None

    def attention(self, layer: int, view: AttentionView) -> Tensor | None:
        if layer < self.shallow_layers:
            return self.shallow(layer, view) if "shallow" in self.method.stages else None
        if layer > self.shallow_layers and "middle" in self.method.stages:
            self.middle(layer, view)
        return None

    def layer_input(self, layer: int, view: LayerView) -> Keep | Ranking | None:
        return None if self.coming is None else self.rule(view)

    # ---- shallow ----------------------------------------------------------------------------------------------

    def shallow(self, layer: int, view: AttentionView) -> Tensor:
        """The attention output of a shallow layer."""
        if self.method.skip:
            return self.skip(layer, view)
        if self.others is None:
            self.others = ~view.layout.visual.mask[:, None, :, None]
        others, first = self.others, layer == 0

        def without(values: Tensor) -> Tensor:
            return values * others

        def text_reads(values: Tensor) -> Tensor:
            if not first:
                return without(values)
            if self.method.layer0 == "13b":
                return values * ~self._first_half(view.layout)[:, None, :, None]
            return torch.where(others, values, self._sink(view.layout).pick(values, 2))

        blind = first or not self.method.visual_self_attention
        out = view.reread(without) if blind else view.output
        return view.reread(text_reads, view.layout.text, onto=out)

    def skip(self, layer: int, view: AttentionView) -> Tensor:
        """The same with masks before the softmax. The sink competes as a key."""
        layout = view.layout
        text_keys = layout.nonvisual
        if layer == 0 and self.method.layer0 == "7b":
            sink = self._sink(layout)
            text_keys = text_keys.union(sink.mask, sink.counts)
        elif layer == 0:
            rest = layout.visual.mask & ~self._first_half(layout)
            text_keys = text_keys.union(rest, [n - n // 2 for n in layout.visual_counts])
        if layer > 0 and self.method.visual_self_attention:
            return view.attend((layout.nonvisual, text_keys), onto=view.output)
        return view.attend((layout.nonvisual, text_keys), (layout.visual, layout.nonvisual))

    def _sink(self, layout: TokenLayout) -> TokenSet:
        return layout.visual.nth(self.method.sink)

    def _first_half(self, layout: TokenLayout) -> Tensor:
        return layout.visual.mask & (layout.visual_id < layout.visual.device_counts[:, None] // 2)

    # ---- middle and deep --------------------------------------------------------------------------------------

    def middle(self, layer: int, view: AttentionView) -> None:
        """Measure what each visual token contributes to the last token, for the next layer to decide."""
        self.unread.append(view.contributions())
        if not self._can_wait(view.layout.visual.counts):
            self.coming = view.on_host(*(measured.sums for measured in self.unread))

    def rule(self, view: LayerView) -> Keep | None:
        """What stays by the thresholds, None for everything."""
        method, visual = self.method, view.layout.visual
        assert self.coming is not None
        there = np.arange(visual.sizes[1]) < np.array(visual.counts)[:, None]
        found = [measured.of_visual(sums) for measured, sums in zip(self.unread, self.coming.read(), strict=True)]
        self.unread, self.coming = [], None
        with np.errstate(divide="ignore", invalid="ignore"):
            *before, weakest = [np.where(there, cosines(*parts), np.inf).min(1) for parts in found]
        for weak in before:
            self._count(visual.counts, weak)
        filters = ~np.array(self.filtered) & (weakest < method.layer_threshold)
        self._count(visual.counts, weakest)
        exits = np.array([idle >= method.exit_layers for idle in self.idle_layers])
        self.filtered = [*(filters | self.filtered)]
        if not filters.any() and not exits.any():
            return None
        _, norm, _ = found[-1]
        chosen = (norm > method.token_threshold) | ~filters[:, None]
        stay = there & chosen & ~exits[:, None]
        mask = torch.from_numpy(stay).to(view.present.device, non_blocking=True)
        return Keep(mask, counts=tuple(stay.sum(1).tolist()))

    def _can_wait(self, there: Sequence[int]) -> bool:
        """Whether nothing that a row has not read yet can make it lose tokens, of which so many are ``there``."""
        if not all(self.filtered):
            return False
        layers = zip(self.idle_layers, there, self.total, strict=True)
        most = max((idle for idle, now, total in layers if 0 < now < total), default=-len(self.unread))
        return "deep" not in self.method.stages or most + len(self.unread) < self.method.exit_layers

    def _count(self, there: Sequence[int], weakest: np.ndarray) -> None:
        """Count a layer without effect in the rows that have filtered; so many visual tokens were ``there``."""
        method = self.method
        if "deep" not in method.stages:
            return
        for row, weak in enumerate(weakest):
            # A row that kept everything still has its full length, and the authors' exit waits for a shorter one.
            if self.filtered[row] and there[row] < self.total[row]:
                idle = not weak < method.exit_threshold
                kept = 0 if method.consecutive_exit else self.idle_layers[row]
                self.idle_layers[row] = self.idle_layers[row] + 1 if idle else kept


def cosines(dot: Any, norm: Any, square: Any) -> Any:
    """cos(a - c_j, a) (B, V) of a · c_j (B, V), |c_j| (B, V) and |a|² (B, 1).

    |a - c_j|² = |a|² - 2 a·c_j + |c_j|²; what rounding leaves of it where c_j is nearly all of a counts as 0.
    """
    share, part = dot / square, norm * norm / square
    return (1 - share) / (1 - 2 * share + part).clip(min=1e-6) ** 0.5


def contributions(view: AttentionView) -> tuple[Tensor, Tensor]:
    """How much each visual token matters to the last token: cos(a - c_j, a) and |c_j|, both (B, V), fp32."""
    measured = view.contributions()
    dot, norm, square = measured.of_visual(measured.sums)
    return cosines(dot, norm, square), norm
