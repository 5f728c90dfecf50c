"""DART: *Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More* (arXiv 2502.11494).

Authors' code: ZichenWen1/DART, read from its mirror xqy1111111/DART, commit d6a5af6.

    pivots:         the visual tokens, and the text tokens behind the image, whose keys in layer K - 1 (after RoPE, all
                    heads side by side) have the largest L1 norm; 4 each
    features f:     output of layer K - 1 under the decoder's final norm
    for each pivot: move the floor(budget / pivots) visual tokens of lowest cos(f_pivot, f) from the pool to the picks;
                    the pool starts as all visual tokens but the pivots
    at the input of layer K: keep the visual pivots and the picks, in order, with their positions

The L1 norm of a rotated key depends on its position, so a padded batch needs position ids, which ``generate`` makes.
A budget of 128 keeps 4 + 8 · 16 = 132 tokens, as the authors' does (they take the ceiling of what is floored).

Picks leave the pool, so the order of the pivots matters. The authors' loop follows the iteration order of a Python set,
that is of a hash table, which depends on where in the prompt the pivots stand. Here ``order="position"`` goes from left
to right, and ``order="norm"`` takes visual pivots before text ones, the largest norm first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..engine.contract import Keep
from .base import Layered, Scored
from .pieces import cosine, pick
from .registry import register

if TYPE_CHECKING:
    from ..engine.contract import AttentionView, Geometry, LayerView, TokenLayout


@register("dart", "DART", paper="2502.11494", source="ZichenWen1/DART@d6a5af6")
class DART(Scored, Layered):
    """Keep a few pivots and the visual tokens least like them, once, at the input of layer K (option ``layer``)."""

    hook_points = ("attention", "decoder")
    examples = (
        "keep=0.5,layers=scaled",
        "tokens=17,text_pivots=20,layers=scaled",
        "keep=0.6,layer=16,layers=scaled,order=norm,visual_pivots=2,text_pivots=5,positions=renumber",
    )
    everything = "keep=1,visual_pivots=1,text_pivots=0,layers=scaled"

    layer: int = 2
    visual_pivots: int = 4
    text_pivots: int = 4
    order: Literal["position", "norm"] = "position"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(min(self.visual_pivots, self.text_pivots) >= 0, "numbers of pivots must be >= 0")
        self.require(self.visual_pivots + self.text_pivots > 0, "at least one pivot is needed")
        self.require(self.order in ("position", "norm"), f"order must be 'position' or 'norm', not {self.order!r}")

    def left(self, layout: TokenLayout, geometry: Geometry) -> dict[int, Tensor]:
        total, text = layout.visual.host_counts, layout.text.host_counts
        visual = total.clamp(max=self.visual_pivots)
        picks = self.share(total) * (visual + text.clamp(max=self.text_pivots))
        return {self.at(self.layer, geometry): visual + picks.minimum(total - visual)}

    def share(self, visual_tokens: Tensor) -> Tensor:
        """Int (B,): how many tokens each pivot picks."""
        return self.budget(visual_tokens) // (self.visual_pivots + self.text_pivots)

    def score(self, view: AttentionView) -> Tensor:
        """(B, L): the L1 norms of all keys."""
        return view.keys.float().abs().sum((1, 3))

    def choose(self, norms: Tensor, view: LayerView, count: Tensor) -> Keep:
        """The pivots, and the tokens that are least like them, ``count`` of each row in all."""
        visual, text = view.layout.visual, view.layout.text
        column, there = pivots(norms, view.layout, self.visual_pivots, self.text_pivots)
        if self.order == "position":
            column, there = left_to_right(column, there)
        likeness = cosine(view.final_norm(pick(view.tokens, column)), view.final_norm(view.hidden))
        counts = zip(visual.counts, text.counts, strict=True)
        pairs = [v * (min(v, self.visual_pivots) + min(t, self.text_pivots)) for v, t in counts]
        view.scored(torch.tensor(pairs) * view.hidden.shape[2])

        most = int(self.share(visual.host_counts).max())
        share = self.share(visual.device_counts)[:, None] * there
        picks = (torch.arange(most, device=share.device) < share[..., None]).to(torch.int8)  # (B, pivots, most)
        is_pivot = (visual.index[:, :, None] == column.masked_fill(~there, -1)[:, None]).any(2)
        taken = (is_pivot | ~view.present).to(torch.int8)
        for pivot in range(column.shape[1]):
            lowest = likeness[:, pivot].masked_fill(taken > 0, torch.inf).argsort(dim=1, stable=True)[:, :most]
            taken = taken.scatter_add(1, lowest, picks[:, pivot])
        return Keep((taken > 0) & view.present, counts=tuple(count.tolist()))


def pivots(norms: Tensor, layout: TokenLayout, visual: int, text: int) -> tuple[Tensor, Tensor]:
    """Columns, int (B, n), of the ``visual`` visual and then ``text`` text tokens of largest norm, and which exist.

    ``norms``: (B, L); n is smaller than ``visual`` + ``text`` only if no row has as many tokens.
    """
    chosen = []
    for tokens, count in ((layout.visual, visual), (layout.text, text)):
        scores = tokens.pick(norms, 1).masked_fill(~tokens.present, float("-inf"))
        best = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
        chosen.append((tokens.index.gather(1, best), tokens.present.gather(1, best)))
    column, there = (torch.cat(parts, dim=1) for parts in zip(*chosen, strict=True))
    return column, there


def left_to_right(column: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """The same pivots in the order of their columns; missing ones last."""
    order = column.masked_fill(~there, torch.iinfo(column.dtype).max).argsort(dim=1)
    return column.gather(1, order), there.gather(1, order)
