"""What was computed: tokens, KV lengths and attention work of one prefill, per sample and layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor

from .layout import TokenLayout

# Entered around work of the method and what carries it out, and inside that around work that the model does anyway.
Watch = Callable[[Literal["method", "model"]], AbstractContextManager[None]]
_nobody: AbstractContextManager[None] = nullcontext()


def unwatched(part: Literal["method", "model"]) -> AbstractContextManager[None]:
    """The default: nobody watches."""
    return _nobody


class Trace:
    """Record of one prefill. Layer numbers count decoder layers from 0; work is in multiply-adds (MACs).

    Attention work is kept as *pairs*, query-key products a head: a layer that attends fully over n tokens has n²
    (kernels and papers count the masked half as well).
    """

    def __init__(self, prompt: TokenLayout, layers: int, watch: Watch = unwatched) -> None:
        self.prompt, self.watch = prompt, watch
        self.layers = layers
        self.layouts: list[TokenLayout] = []
        self.host_syncs = 0
        # Visual tokens that went through the projector, int (B,).
        self.projected = torch.tensor(prompt.visual_counts)
        # Tokens of one image at the attention and at the MLP of each vision block; None: all of them in every block.
        self.tower: tuple[tuple[int, int], ...] | None = None
        # Frames and patches, int (N, 3), of all images or tiles of the batch; None: images are of one size.
        self.grids: Tensor | None = None
        self._pairs: dict[int, Tensor] = {}
        self._scoring: defaultdict[int, Tensor] = defaultdict(self._zeros)

    def _zeros(self) -> Tensor:
        return torch.zeros(self.prompt.rows, dtype=torch.int64)

    # ---- written by the engine -------------------------------------------------------------------------------

    def enter(self, layout: TokenLayout) -> None:
        """The next decoder layer starts with this layout, and will attend fully unless it says otherwise."""
        self.layouts.append(layout)

    def attended(self, layer: int, pairs: Tensor, *, instead: bool = False) -> None:
        """Attention over ``pairs`` int (B,) ran in ``layer``, in addition to or instead of the full one."""
        self._pairs[layer] = pairs if instead else self._attention(layer) + pairs

    def scored(self, layer: int, macs: Tensor) -> None:
        """Scoring work, int (B,) MACs, was done for ``layer``."""
        self._scoring[layer] = self._scoring[layer] + macs

    # ---- read by everybody ------------------------------------------------------------------------------------

    def kept(self, layer: int) -> Tensor:
        """Bool (B, V): which visual tokens of the prompt, in their order there, are at the input of ``layer``.

        False where a row has fewer visual tokens than the row with the most. Tokens added by a merge do not show.
        """
        layout = self.layouts[layer]
        width = max(self.prompt.visual_counts)
        kept = torch.zeros(layout.rows, width + 1, dtype=torch.bool, device=layout.device)
        index = layout.visual_id.masked_fill(layout.visual_id < 0, width)
        return kept.scatter_(1, index, torch.ones_like(kept[:, :1]).expand_as(index))[:, :width]

    def visual_counts(self) -> Tensor:
        """Int (B, layers): visual tokens at each layer's input, merged ones included."""
        return torch.tensor([layout.visual_counts for layout in self.layouts]).T

    def kv_lengths(self) -> Tensor:
        """Int (B, layers): entries of each layer's KV cache right after prefill."""
        return torch.tensor([layout.lengths for layout in self.layouts]).T

    def attention_pairs(self) -> Tensor:
        """Int (B, layers): query-key pairs a head that attention really computed."""
        return torch.stack([self._attention(layer) for layer in range(len(self.layouts))]).T

    def _attention(self, layer: int) -> Tensor:
        full = self.layouts[layer].everything.numbers
        return self._pairs.get(layer, full * full)

    def scoring_macs(self) -> Tensor:
        """Int (B, layers): matrix multiply-adds spent on scoring tokens."""
        return torch.stack([self._scoring[layer] for layer in range(len(self.layouts))]).T
