"""FastV: *An Image is Worth 1/2 Tokens After Layer 2* (arXiv 2403.06764).

Authors' code: pkunlp-icler/FastV, commit d165972, the KV-cache class for lmms-eval.

    at decoder layer K - 1:   s_j = mean over heads of the last prompt token's attention to visual token j
    at the input of layer K:  keep the floor(keep · V) tokens of highest s_j, in order, with their positions

The paper scores by the attention received from all other tokens; the code, followed here, uses the last one. The
authors' class runs layer K - 1 twice and appends its keys and values to the cache twice, which changes no output;
here every layer runs once and the cache of layer K - 1 holds each token once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .base import Layered, Scored
from .pieces import last_token_attention
from .registry import register

if TYPE_CHECKING:
    from ..engine.contract import AttentionView


@register("fastv", "FastV", paper="2403.06764", source="pkunlp-icler/FastV@d165972")
class FastV(Layered, Scored):
    """Drop the visual tokens that the last prompt token attends to least, at the input of layer K (its ``layer``)."""

    hook_points = ("attention", "decoder")
    examples = ("keep=0.5,layers=scaled", "tokens=4,layer=4,positions=renumber")
    everything = "keep=1,layers=scaled"

    layer: int = 2

    def __post_init__(self) -> None:
        self.require(self.layer >= 1, "layer must be >= 1 (the authors' K=0 draws at random: use random:layer=0)")
        super().__post_init__()

    def score(self, view: AttentionView) -> Tensor:
        return last_token_attention(view, view.weights())
