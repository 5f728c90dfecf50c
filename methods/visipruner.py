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

The shallow edits act on weights after the softmax, which are not normalised again; so by default the shallow stage
saves nothing: the weights stay, and text reads a value of zero, or the sink's, at visual tokens. ``skip=True`` masks
before the softmax instead, so that text (and in layer 0 each visual token) runs over fewer keys.

Where the paper's text differs from the code, the code is the default and an option gives the text:
``consecutive_exit`` (the code's count is never reset), ``visual_self_attention=False`` (the paper also removes
visual-to-visual attention in the shallow layers), ``sink`` (the paper merges onto any visual token; the code onto the
first). ``layer0`` chooses between the code's two rules for layer 0, by model size.

``forced=True`` is for timing where the thresholds find nothing, as with random weights. Everything is measured as ever,
but a plan decides: in each row the ``filter_tokens`` visual tokens of largest |c_j| stay from ``filter_layer`` on, and
none from ``exit_layer`` on. The plan's defaults are the averages that the paper reports on GQA: filtering around the
9th layer, 10.3 tokens, exit at layer 23.9.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..engine.contract import Forward, Keep, Knob
from .base import MAGNITUDES, REFERENCE_DEPTH, Layered, top
from .registry import register

if TYPE_CHECKING:
    from ..engine.contract import AttentionView, Geometry, LayerView, TokenLayout, TokenSet

STAGES = ("shallow", "middle", "deep")


@register("visipruner", "VisiPruner", paper="2510.17205", source="EIT-NLP/VisiPruner@d778622")
class VisiPruner(Layered):
    """Shallow visual attention off, a value-aware choice in the middle, no visual tokens in the deep layers."""

    hook_points = ("attention", "decoder")
    adaptive = True
    examples = (
        "layers=scaled",
        "layers=scaled,layer_threshold=0.9,token_threshold=3,exit_threshold=0.9",
        "layers=scaled,layer0=13b,consecutive_exit=true",
        "layers=scaled,visual_self_attention=false,sink=7",
        "layers=scaled,skip=true",
        "layers=scaled,skip=true,layer0=13b",
        "layers=scaled,skip=true,visual_self_attention=false",
        "layers=scaled,forced=true,filter_layer=14",
    )
    everything = "layers=scaled,stages=middle,layer_threshold=1,token_threshold=0"
    knobs = (
        Knob("token_threshold", lambda visual_tokens, geometry: MAGNITUDES),
        Knob("filter_tokens", lambda visual_tokens, geometry: range(visual_tokens + 1)),
        Knob("shallow_layers", lambda visual_tokens, geometry: range(1, max(geometry.layers, REFERENCE_DEPTH))),
    )

    stages: tuple[str, ...] = STAGES
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
    forced: bool = False
    filter_layer: int = 9
    filter_tokens: int = 10
    exit_layer: int = 24

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = sorted(set(self.stages) - set(STAGES))
        self.require(not unknown, f"unknown stages {unknown}; known: {', '.join(STAGES)}")
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
        self.require(self.filter_tokens >= 0, "filter_tokens must be >= 0")
        for option, (part, forced) in _BELONGS.items():
            if getattr(self, option) != type(self).__dataclass_fields__[option].default:
                self.require(part in self.stages, f"{option} has no effect without stage {part!r}")
                self.require(forced in (None, self.forced), f"{option} has no effect with forced={self.forced}")
        self.require(self.layer0 == "7b" or self.sink == 0, "sink has no effect with layer0='13b', which moves no mass")

    def check(self, geometry: Geometry) -> None:
        self.check_layers("shallow_layers", (self.shallow_layers,), geometry)
        if self.forced:
            shallow, (cut, leave) = self.at(self.shallow_layers, geometry), self.planned(geometry)
            scale = ", or give layers='scaled'" if self.layers == "given" else ""
            self.require(
                shallow + 2 <= cut < leave <= geometry.layers,
                f"the plan of {shallow} shallow layers, filtering at {cut} and exit at {leave} does not fit a model of "
                f"{geometry.layers}: keep shallow_layers + 2 <= filter_layer < exit_layer{scale}",
            )

    def planned(self, geometry: Geometry) -> tuple[int, int]:
        """The first layers with few and with no visual tokens in the forced plan.

        Scaled to few layers these would fall together: then each is as late as the one before it allows.
        """
        cut, scaled = self.at(self.filter_layer, geometry), self.layers == "scaled"
        cut = max(cut, self.at(self.shallow_layers, geometry) + 2) if scaled else cut
        leave = self.at(self.exit_layer, geometry) if "deep" in self.stages else geometry.layers
        return cut, max(leave, cut + 1) if scaled else leave

    def left(self, layout: TokenLayout, geometry: Geometry) -> dict[int, Tensor] | None:
        if "middle" not in self.stages:
            return {}
        if not self.forced:
            return None
        total, (cut, leave) = layout.visual.total, self.planned(geometry)
        return {cut: total.clamp(max=self.filter_tokens), leave: torch.zeros_like(total)}

    def begin(self, layout: TokenLayout, geometry: Geometry) -> Forward:
        return VisiPrunerForward(self, layout, geometry)


# The stage to which an option belongs, and whether thresholds (False) or the forced plan (True) must decide.
_BELONGS = {
    "layer0": ("shallow", None),
    "sink": ("shallow", None),
    "visual_self_attention": ("shallow", None),
    "skip": ("shallow", None),
    "layer_threshold": ("middle", False),
    "token_threshold": ("middle", False),
    "exit_threshold": ("deep", False),
    "exit_layers": ("deep", False),
    "consecutive_exit": ("deep", False),
    "forced": ("middle", None),
    "filter_layer": ("middle", True),
    "filter_tokens": ("middle", True),
    "exit_layer": ("deep", True),
}


class VisiPrunerForward(Forward):
    """State of one prefill: for each row, whether it has filtered and how many layers were without effect."""

    def __init__(self, method: VisiPruner, layout: TokenLayout, geometry: Geometry) -> None:
        self.method = method
        self.shallow_layers = method.at(method.shallow_layers, geometry)
        self.filter_layer, self.exit_layer = method.planned(geometry)
        self.total = layout.visual.total
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
        self.keep = self.plan(layer + 1, view, norm) if self.method.forced else self.rule(view, effect, norm)

    def rule(self, view: AttentionView, effect: Tensor, norm: Tensor) -> Tensor:
        """The visual tokens that stay by the thresholds, bool (B, V)."""
        visual = view.layout.visual
        weak = torch.where(view.present, effect, torch.inf).amin(1)
        chosen = (norm > self.method.token_threshold) & view.present
        trigger = ~self.filtered & (weak < self.method.layer_threshold)
        keep = torch.where(trigger[:, None], chosen, view.present)
        if "deep" in self.method.stages:
            # A row that kept everything still has its full length, and the authors' exit waits for a shorter one.
            shortened = self.filtered & (visual.total < self.total)
            idle = shortened & ~(weak < self.method.exit_threshold)
            if self.method.consecutive_exit:
                self.idle_layers = self.idle_layers.masked_fill(shortened & ~idle, 0)
            self.idle_layers = self.idle_layers + idle
            keep = keep & (self.idle_layers < self.method.exit_layers)[:, None]
        self.filtered = self.filtered | trigger
        return keep

    def plan(self, layer: int, view: AttentionView, norm: Tensor) -> Tensor:
        """The visual tokens that stay from ``layer`` on by the forced plan, bool (B, V)."""
        if layer == self.filter_layer:
            return top(norm, torch.full_like(self.total, self.method.filter_tokens), view.present)
        return view.present if layer < self.exit_layer else torch.zeros_like(view.present)


def contributions(view: AttentionView, visual: TokenSet) -> tuple[Tensor, Tensor]:
    """How much each visual token matters to the last token: cos(a - c_j, a) and |c_j|, both (B, V), fp32.

    a is the last token's attention output with its heads side by side, c_j the part of it that comes from token j.
    """
    weights = visual.pick(view.weights(), 3).squeeze(2)
    part = weights[..., None] * visual.pick(view.values, 2).float()
    part = part.transpose(1, 2).flatten(2)
    output = view.output[:, -1].float().flatten(1)[:, None]
    return cosine_similarity(output - part, output, dim=-1), part.norm(dim=-1)
