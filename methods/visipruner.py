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

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..engine.contract import Forward, Keep, Knob
from .base import MAGNITUDES, REFERENCE_DEPTH, Layered

if TYPE_CHECKING:
    from ..engine.contract import AttentionView, Geometry, LayerView, TokenLayout, TokenSet

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

    def begin(self, layout: TokenLayout, geometry: Geometry) -> Forward:
        return VisiPrunerForward(self, layout, geometry)


class VisiPrunerForward(Forward):
    """State of one prefill: for each row, whether it has filtered and how many layers were without effect."""

    def __init__(self, method: VisiPruner, layout: TokenLayout, geometry: Geometry) -> None:
        self.method = method
        self.shallow_layers = method.at(method.shallow_layers, geometry)
        self.total = layout.visual.device_counts
        self.filtered = torch.zeros_like(self.total, dtype=torch.bool)
        self.idle_layers = torch.zeros_like(self.total)
        self.keep: Tensor | None = None

    def attention(self, layer: int, view: AttentionView) -> Tensor | None:
        if layer < self.shallow_layers:
            return self.shallow(layer, view) if "shallow" in self.method.stages else None
        if layer > self.shallow_layers and "middle" in self.method.stages:
            self.middle(layer, view)
        return None

    def layer_input(self, layer: int, view: LayerView) -> Keep | None:
        keep, self.keep = self.keep, None
        return None if keep is None else Keep(keep)

    # ---- shallow ----------------------------------------------------------------------------------------------

    def shallow(self, layer: int, view: AttentionView) -> Tensor:
        """The attention output of a shallow layer."""
        if self.method.skip:
            return self.skip(layer, view)
        layout, first = view.layout, layer == 0
        visual = layout.visual.mask[:, None, :, None]
        half, sink = self._first_half(layout)[:, None, :, None], self._sink(layout)[:, None, :, None]

        def text_reads(values: Tensor) -> Tensor:
            if first and self.method.layer0 == "13b":
                return values * ~half
            return torch.where(visual, (values * sink).sum(2, keepdim=True) * first, values)

        blind = first or not self.method.visual_self_attention
        out = view.reread(lambda values: values * ~visual) if blind else view.output
        return view.reread(text_reads, layout.text, onto=out)

    def skip(self, layer: int, view: AttentionView) -> Tensor:
        """The same with masks before the softmax. The sink competes as a key."""
        layout = view.layout
        text_keys = layout.nonvisual
        if layer == 0 and self.method.layer0 == "7b":
            text_keys = text_keys.union(self._sink(layout), [min(n, 1) for n in layout.visual_counts])
        elif layer == 0:
            rest = layout.visual.mask & ~self._first_half(layout)
            text_keys = text_keys.union(rest, [n - n // 2 for n in layout.visual_counts])
        if layer > 0 and self.method.visual_self_attention:
            return view.attend((layout.nonvisual, text_keys), onto=view.output)
        return view.attend((layout.nonvisual, text_keys), (layout.visual, layout.nonvisual))

    def _sink(self, layout: TokenLayout) -> Tensor:
        index = torch.full_like(self.total, self.method.sink).clamp(max=self.total - 1)
        return layout.visual.mask & (layout.visual_id == index[:, None])

    def _first_half(self, layout: TokenLayout) -> Tensor:
        return layout.visual.mask & (layout.visual_id < (self.total // 2)[:, None])

    # ---- middle and deep --------------------------------------------------------------------------------------

    def middle(self, layer: int, view: AttentionView) -> None:
        """Measure what each visual token contributes to the last token, and decide for the next layer."""
        effect, norm = contributions(view, view.layout.visual)
        self.keep = self.rule(view, effect, norm)

    def rule(self, view: AttentionView, effect: Tensor, norm: Tensor) -> Tensor:
        """The visual tokens that stay by the thresholds, bool (B, V)."""
        visual = view.layout.visual
        weak = torch.where(view.present, effect, torch.inf).amin(1)
        chosen = (norm > self.method.token_threshold) & view.present
        trigger = ~self.filtered & (weak < self.method.layer_threshold)
        keep = torch.where(trigger[:, None], chosen, view.present)
        if "deep" in self.method.stages:
            # A row that kept everything still has its full length, and the authors' exit waits for a shorter one.
            shortened = self.filtered & (visual.device_counts < self.total)
            idle = shortened & ~(weak < self.method.exit_threshold)
            if self.method.consecutive_exit:
                self.idle_layers = self.idle_layers.masked_fill(shortened & ~idle, 0)
            self.idle_layers = self.idle_layers + idle
            keep = keep & (self.idle_layers < self.method.exit_layers)[:, None]
        self.filtered = self.filtered | trigger
        return keep


def contributions(view: AttentionView, visual: TokenSet) -> tuple[Tensor, Tensor]:
    """How much each visual token matters to the last token: cos(a - c_j, a) and |c_j|, both (B, V), fp32.

    a is the last token's attention output with its heads side by side, c_j the part of it that comes from token j.
    """
    weights = visual.pick(view.weights(), 3).squeeze(2)
    part = weights[..., None] * visual.pick(view.values, 2).float()
    part = part.transpose(1, 2).flatten(2)
    output = view.output[:, -1].float().flatten(1)[:, None]
    return cosine_similarity(output - part, output, dim=-1), part.norm(dim=-1)
