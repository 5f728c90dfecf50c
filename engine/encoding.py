"""The record of one encoding, made anew for each batch of images, and what methods may read of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..models.adapters import VisionGeometry
from . import attention
from .decisions import Keep, Merge
from .layout import TokenSet

Attended = tuple[Tensor, Tensor, Tensor, float]
"""Query of the first token (N, heads, 1, d), keys and values (N, heads, t, d) of a block, and its scaling."""


@dataclass
class Inside:
    """Where a tower stands in which a method acts: what the blocks so far leave to the next one, N images of t tokens.

    ``counts``: tokens of each image, on the host. ``present``: bool (N, t), which of the t places hold one; None: all.
    ``patches``: int (N, t), the place that each token had at first, None while all are there or where tokens are new.
    ``size``: (N, t) and ``bias``: (N, t), as in :class:`BlockMerge`. ``memory``: (N, P), what the method remembers of
    each patch. ``attended``: of the block at hand. ``width``: t when the block began; ``going_on``: the tokens that
    enter its MLP in place of those given; ``mlp_output``: what that makes of them.
    """

    counts: tuple[int, ...] = ()
    present: Tensor | None = None
    patches: Tensor | None = None
    size: Tensor | None = None
    bias: Tensor | None = None
    memory: Tensor | None = None
    attended: Attended | None = None
    width: int = 0
    going_on: Tensor | None = None
    mlp_output: Tensor | None = None


@dataclass
class Encoding:
    """What the vision side computed of one batch of N images, and what the method decided about them.

    ``pixels``: what entered the tower; ``grids``: frames and patches (N, 3) where images differ in shape. ``cls``: the
    CLS feature (N, Dv). ``blocks``: query, key and scaling of the tower blocks that the method reads, by its names of
    them. ``received``: attention (N, patches and CLS) that the tokens of blocks receive, where it is shared.
    ``features`` (N, P, Dv) enter the projector, ``projected`` (N, P, D) leave it. ``macs``: multiply-adds that were
    spent on scoring each image, N or one for all; ``padded_macs``: on each as if all were as the largest.
    ``kept``: the features that were projected where others were dropped before; ``projected_tokens``: their number, int
    (N,), new ones included. ``projector_input``: tokens that entered the projector, images padded to the one with the
    most. ``block_tokens``: where a method acts inside the tower, tokens of each image (N,) at the attention and at the
    MLP of each block; ``block_widths``: places that they took. ``host_syncs``: how often the method read numbers there.
    """

    vision: VisionGeometry
    pixels: Tensor | None = None
    grids: Tensor | None = None
    cls: Tensor | None = None
    blocks: dict[int, tuple[Tensor, Tensor, float]] = field(default_factory=dict)
    received: dict[int, Tensor] = field(default_factory=dict)
    features: Tensor | None = None
    projected: Tensor | None = None
    macs: list[int] = field(default_factory=lambda: [0])
    padded_macs: int = 0
    host_syncs: int = 0
    decision: Keep | Merge | None = None
    kept: TokenSet | None = None
    projected_tokens: Tensor | None = None
    projector_input: int = 0
    block_tokens: list[tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    block_widths: list[tuple[int, int]] = field(default_factory=list)
    inside: Inside = field(default_factory=Inside)

    def scored(self, macs: int | tuple[int, ...]) -> None:
        """Multiply-adds were spent on scoring each image: an int, or N of them where images differ."""
        more = [int(work) for work in (macs if isinstance(macs, tuple) else (macs,))]  # a tracer's sizes are tensors
        images = max(len(self.macs), len(more))
        before, more = (one * (images // len(one)) for one in (self.macs, more))
        self.macs = [sum(both) for both in zip(before, more, strict=True)]
        self.padded_macs += max(more)


class VisionView:
    """The output of the vision tower: N images (of all rows, in order), P patches each."""

    def __init__(self, encoding: Encoding) -> None:
        self._encoding = encoding

    @property
    def features(self) -> Tensor:
        """(N, P, Dv): what enters the projector."""
        assert self._encoding.features is not None
        return self._encoding.features

    @property
    def projected(self) -> Tensor:
        """(N, P, D): what leaves the projector; only in :meth:`~visibench.methods.Forward.projected`."""
        assert self._encoding.projected is not None
        return self._encoding.projected

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self._encoding.vision.grid

    @property
    def vision(self) -> VisionGeometry:
        """Sizes of the vision side."""
        return self._encoding.vision

    @property
    def cls(self) -> Tensor:
        """The feature (N, Dv) of the CLS token, for methods with ``vision_cls``."""
        assert self._encoding.cls is not None
        return self._encoding.cls

    @property
    def present(self) -> Tensor:
        """Bool (N, P): all true, images have no padding."""
        return torch.ones(self.features.shape[:2], dtype=torch.bool, device=self.features.device)

    def cls_weights(self, block: int = -1, *, single_head: bool = False) -> Tensor:
        """Attention weights (N, heads, P), fp32, from CLS to the patches in a vision block.

        ``block`` counts back from the block whose output the model uses as features (-1: that block itself, 0: the
        one after it). ``single_head``: weights (N, 1, P) as if the block had one head of the full width.
        """
        query, key, scaling = self._encoding.blocks[block]
        self._encoding.scored(key.shape[1] * key.shape[2] * key.shape[3])
        query = query[:, :, :1]
        if single_head:
            query, key = (t.transpose(1, 2).flatten(2)[:, None] for t in (query, key))
            scaling = query.shape[3] ** -0.5
        logits = attention.fine(query @ key.transpose(-1, -2)).squeeze(2)
        return (logits * scaling).softmax(-1)[:, :, 1:]

    def received(self, block: int = -1) -> Tensor:
        """Attention (N, P), fp32, that each patch receives in a vision block: mean over heads and all queries.

        CLS is one of the queries. For blocks that the method names in ``blocks_received``; rows are taken in blocks.
        """
        encoding = self._encoding
        got = encoding.received.get(block)
        got = attention.received(*encoding.blocks[block]) if got is None else got
        encoding.scored(encoding.vision.hidden * got.shape[1] ** 2)
        return got[:, int(encoding.vision.has_cls) :]

    def keys(self, block: int = -1) -> Tensor:
        """Keys (N, heads, P, d) of the patches in a vision block."""
        return self._encoding.blocks[block][1][:, :, 1:]

    def scored(self, macs: int) -> None:
        """Count ``macs`` multiply-adds an image that the method itself spent on matrix products."""
        self._encoding.scored(macs)


class BlockView:
    """A block of the vision tower, behind its attention or its MLP as the method says: N images, P patches each.

    ``block``: its number. ``tokens``: hidden states (N, t, Dv) of all tokens, CLS first where there is one. ``vision``:
    sizes of the tower. ``counts``: the patches of each image, on the host.
    """

    def __init__(self, block: int, tokens: Tensor, encoding: Encoding) -> None:
        assert encoding.inside.attended is not None
        self._query, self.keys, self.values, self._scaling = encoding.inside.attended
        self.block, self.tokens, self.vision = block, tokens, encoding.vision
        self.counts = tuple(count - int(self.vision.has_cls) for count in encoding.inside.counts)
        self._encoding, self._inside = encoding, encoding.inside

    @property
    def size(self) -> Tensor:
        """(N, t), fp32: how many of the image's tokens each token stands for."""
        size = self._inside.size
        return self.tokens.new_ones(self.tokens.shape[:2], dtype=torch.float32) if size is None else size

    @property
    def memory(self) -> Tensor | None:
        """(N, P): what the method set here in an earlier block, of the patches that are left; None if nothing."""
        return self._inside.memory

    @memory.setter
    def memory(self, values: Tensor) -> None:
        self._inside.memory = values

    def cls_logits(self, of: Literal["keys", "values"] = "keys") -> Tensor:
        """Logits (N, heads, t), fp32, of CLS's attention; with ``of="values"`` products of its value and each token's.

        Minus infinity where there is no token, so that a softmax over all is one over those that are there.
        """
        if of == "keys":
            logits = attention.fine(self._query @ self.keys.transpose(-1, -2)) * self._scaling
        else:
            logits = attention.fine(self.values[:, :, :1] @ self.values.transpose(-1, -2))
        width = self.keys.shape[1] * self.keys.shape[3]
        self.scored(tuple((count + 1) * width for count in self.counts))
        if self._inside.present is not None:
            logits = logits.masked_fill(~self._inside.present[:, None, None], float("-inf"))
        return logits.squeeze(2)

    def read(self, values: Tensor) -> list[float]:
        """One number of each image (N,) on the host, which waits for the device; counted like the reads of cuts."""
        self._encoding.host_syncs += 1
        return values.tolist()

    def scored(self, macs: int | tuple[int, ...]) -> None:
        """Count ``macs`` multiply-adds that the method itself spent on matrix products: an int, or one of each image.

        Where images differ each is taken to be padded to the largest.
        """
        self._encoding.scored(macs)
