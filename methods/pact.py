"""PACT: *Pruning and Clustering-Based Token Reduction for Faster Visual Language Models* (arXiv 2504.08966).

Authors' code: orailix/PACT, commit cf9a0c9. At the input of decoder layer ``layer``, with h_j the state of token j
there, q_j and k_j what the layer would make of it in front of the rotary embedding, and r_j its key behind that:

    prune     i_j = |h_j| · softmax_j(mean of q · k_j), mean over heads; mean and softmax over all tokens up to the last
              visual one; of the visual tokens the floor(``keep`` · V) of highest i_j go on
    density   ρ_j = Σ over these, j too, of exp(-(d/2)²), d_jl = max(0, 1 - cos(r_j, r_l))
    centres   from dense to thin, each token that is farther than ``cutoff`` from all centres so far
    cluster   every other token goes to the nearest centre, and so does a pruned one within ``retrieve`` · ``cutoff``
    merge     each centre becomes the mean of h over its cluster, at its own position; all else leaves
    from this layer on, in decoding too, log(size of its cluster) is added to the logits of each centre as a key

How many tokens stay follows from the inputs: none before, all behind ``layer``. The logarithm is rounded to half
precision, as in the code. ``keep=1`` clusters without pruning, ``cluster=False`` prunes without clustering,
``retrieve=0`` drops what was pruned, ``proportional=False`` leaves the last line out, and ``mean_positions`` puts each
centre at the mean position of its cluster, half to even, where the code cannot retrieve as well.

Which tokens are centres is found by repeating a rule on all pairs at once until nothing changes, a few times; whether
anything did is read back after every four. The authors' code takes one prompt at a time, and one without an image fails
or is given the bias of the prompt before it; with new positions it goes on decoding at the old ones. Not here. Behind
what a cache holds, means and softmax are over the new tokens alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..engine.contract import Forward, Keep, Knob, Merge, Method
from .base import floored, top
from .clusters import centres, placed, pooled, totals
from .pieces import columns, mean_query_attention, pick, precise, up_to_visual
from .registry import register

if TYPE_CHECKING:
    from ..engine.contract import Geometry, LayerView, TokenLayout


@register("pact", "PACT", paper="2504.08966", source="orailix/PACT@cf9a0c9")
class PACT(Method):
    """Prune visual tokens that few queries want, and merge those that are left by the density of their keys."""

    hook_points = ("decoder",)
    adaptive = True
    examples = (
        "layer=2,keep=0.8,cutoff=0.5",
        "cutoff=0.6,retrieve=0,proportional=false,positions=renumber",
        "keep=1,layer=3,cutoff=0.7",
        "keep=0.4,cluster=false",
    )
    everything = "keep=1,cluster=false"
    knobs = (
        Knob("cutoff", lambda visual_tokens, geometry: [step / 100 for step in range(201)]),
        Knob("keep", lambda visual_tokens, geometry: [step / 1000 for step in range(1001)]),
    )

    layer: int = 4
    keep: float = 0.55
    cutoff: float = 0.21
    retrieve: float = 1.5
    cluster: bool = True
    proportional: bool = True
    mean_positions: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.layer >= 0, "layer must be >= 0")
        self.require(0 <= self.keep <= 1, f"keep must lie in [0, 1], not {self.keep}")
        self.require(self.cutoff >= 0 and self.retrieve >= 0, "cutoff and retrieve must be >= 0")
        moves = self.mean_positions and self.positions == "renumber"
        self.require(not moves, "mean_positions and positions='renumber' exclude each other: leave one out")

    @property
    def biases_keys(self) -> bool:
        return self.cluster and self.proportional

    def check(self, geometry: Geometry) -> None:
        self.check_layers("layer", (self.layer,), geometry)

    def left(self, layout: TokenLayout, geometry: Geometry) -> dict[int, Tensor] | None:
        return None if self.cluster else {self.layer: floored(layout.visual.host_counts, self.keep)}

    def begin(self, layout: TokenLayout, geometry: Geometry) -> Forward:
        return PACTForward(self)


class PACTForward(Forward):
    """One prefill."""

    def __init__(self, method: PACT) -> None:
        self.method = method

    def layer_input(self, layer: int, view: LayerView) -> Keep | Merge | None:
        method = self.method
        if layer != method.layer:
            return None
        counts = floored(view.layout.visual.host_counts, method.keep)
        kept = view.present
        if method.keep < 1:
            kept = top(self.importance(view), counts.to(kept.device), kept)
        if not method.cluster:
            return Keep(kept)
        return self.merged(view, columns(kept, int(counts.max())), counts)

    def importance(self, view: LayerView) -> Tensor:
        """(B, V): what is wanted of each visual token, times the length of its state."""
        query, key, scaling = view.projected(rotated=False)
        size = query.shape[1] * query.shape[3]
        view.scored(size * view.layout.everything.host_counts)
        share = mean_query_attention(query, key, scaling, up_to_visual(view.layout))
        return view.layout.visual.pick(share, 1) * precise(view.hidden).norm(dim=2)

    def merged(self, view: LayerView, kept: Tensor, counts: Tensor) -> Merge:
        """The ``kept`` tokens, int (B, K), ``counts`` of each row, in clusters, with others that are retrieved."""
        _, key, _ = view.projected()
        keys = view.layout.visual.pick(key.transpose(1, 2).flatten(2), 1)
        view.scored(view.layout.visual.host_counts * counts * (keys.shape[2] + view.hidden.shape[2]))
        unit = normalize(precise(keys), dim=2)
        distance = (1 - unit @ pick(unit, kept).transpose(1, 2)).clamp(min=0)
        there = torch.arange(kept.shape[1], device=kept.device) < counts[:, None].to(kept.device)
        cutoff, retrieve = self.method.cutoff, self.method.retrieve * self.method.cutoff
        centre = centres(pick(distance, kept), there, cutoff, view.ask)
        nearest, cluster = distance.masked_fill(~centre[:, None], torch.inf).min(2)
        member = torch.zeros_like(view.present).scatter(1, kept, there)
        if retrieve > 0:
            member = member | (nearest <= retrieve) & view.present
        return self.means(view, kept, centre, cluster.masked_fill(~member, kept.shape[1]))

    def means(self, view: LayerView, kept: Tensor, centre: Tensor, cluster: Tensor) -> Merge:
        """The ``kept`` tokens, int (B, K), that are a ``centre``, as means of clusters, int (B, V), K: none."""
        states, method = precise(view.hidden), self.method
        size = totals(torch.ones_like(cluster), cluster, kept.shape[1]).clamp(min=1)
        mean = pooled(states, cluster, kept.shape[1], mean=False) / size[..., None]
        bias = positions = None
        if method.proportional:
            bias = placed(kept, size.to(states.dtype).log().half().to(states.dtype), torch.zeros_like(states[..., 0]))
        if method.mean_positions:
            given = view.positions
            middle = totals(given, cluster, kept.shape[1]) / size.view(*size.shape, *[1] * (given.ndim - 2))
            positions = placed(kept, middle.round().to(given.dtype), given)
        mask = torch.zeros_like(view.present).scatter(1, kept, centre)
        return Merge(
            mask, replaced=placed(kept, mean.to(view.hidden.dtype), view.hidden), bias=bias, positions=positions
        )
