"""FastV: *An Image is Worth 1/2 Tokens After Layer 2* (arXiv 2403.06764).

Authors' code: pkunlp-icler/FastV, commit d165972, the KV-cache class for lmms-eval.

    at decoder layer K - 1:   s_j = mean over heads of the last prompt token's attention to visual token j
    at the input of layer K:  keep the floor(keep · V) tokens of highest s_j, in order, with their positions

The paper scores by the attention received from all other tokens; the code, followed here, uses the last one. The
authors' class runs layer K - 1 twice and appends its keys and values to the cache twice, which changes no output;
here every layer runs once and the cache of layer K - 1 holds each token once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..engine.contract import Forward, Keep
from .base import Budgeted, Layered, top
from .registry import register

if TYPE_CHECKING:
    from ..engine.contract import AttentionView, Geometry, LayerView, TokenLayout


@register
@dataclass(frozen=True)
class FastV(Layered, Budgeted):
    """Drop the visual tokens that the last prompt token attends to least, at the input of layer K (its ``layer``)."""

    name = "fastv"
    title = "FastV"
    paper = "2403.06764"
    source = "pkunlp-icler/FastV@d165972"
    hook_points = ("attention", "decoder")
    examples = ("keep=0.5,layers=scaled", "tokens=4,layer=4,positions=renumber")
    everything = "keep=1,layers=scaled"

    layer: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.layer >= 1, "layer must be >= 1 (the authors' K=0 draws at random: use random:layer=0)")

    def check(self, geometry: Geometry) -> None:
        self.check_layers("layer", (self.layer,), geometry)

    def left(self, layout: TokenLayout, geometry: Geometry) -> dict[int, Tensor]:
        return {self.at(self.layer, geometry): self.budget(layout.visual.total)}

    def begin(self, layout: TokenLayout, geometry: Geometry) -> Forward:
        return FastVForward(self, self.at(self.layer, geometry))


class FastVForward(Forward):
    """State of one prefill: the scores."""

    def __init__(self, method: FastV, layer: int) -> None:
        self.method, self.layer = method, layer
        self.scores: Tensor | None = None

    def attention(self, layer: int, view: AttentionView) -> None:
        if layer == self.layer - 1:
            self.scores = view.layout.visual.pick(view.weights(), 3).mean(1).squeeze(1)

    def layer_input(self, layer: int, view: LayerView) -> Keep | None:
        if layer != self.layer or self.scores is None:
            return None
        return Keep(top(self.scores, self.method.budget(view.layout.visual.total), view.present))
