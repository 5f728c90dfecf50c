"""The record of one encoding: made anew for each batch of images that goes through the vision side."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..models.adapters import VisionGeometry
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
    MLP of each block; ``block_widths``: places that they took.
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
