"""The record of one encoding: made anew for each batch of images that goes through the vision side."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..models.adapters import VisionGeometry
from .decisions import BlockMerge, Keep, Merge
from .layout import TokenSet


@dataclass
class Merging:
    """Where merging inside the tower stands: what the blocks so far leave to the next one."""

    size: Tensor | None = None
    bias: Tensor | None = None
    keys: Tensor | None = None
    merge: BlockMerge | None = None
    mlp_output: Tensor | None = None


@dataclass
class Encoding:
    """What the vision side computed of one batch of N images, and what the method decided about them.

    ``pixels``: what entered the tower; ``grids``: frames and patches (N, 3) where images differ in shape. ``cls``: the
    CLS feature (N, Dv). ``blocks``: query, key and scaling of the tower blocks that the method reads, by its names of
    them. ``received``: attention (N, patches and CLS) that the tokens of blocks receive, where it is shared.
    ``features`` (N, P, Dv) enter the projector, ``projected`` (N, P, D) leave it. ``macs``: multiply-adds an
    image that were spent on scoring. ``kept``: the features that were projected where others were dropped before;
    ``projected_tokens``: their number, int (N,), new ones included. ``projector_input``: tokens that entered the
    projector, images padded to the one with the most. ``block_tokens``: tokens of one image at the
    attention and at the MLP of each block, where a method merges inside the tower.
    """

    vision: VisionGeometry
    pixels: Tensor | None = None
    grids: Tensor | None = None
    cls: Tensor | None = None
    blocks: dict[int, tuple[Tensor, Tensor, float]] = field(default_factory=dict)
    received: dict[int, Tensor] = field(default_factory=dict)
    features: Tensor | None = None
    projected: Tensor | None = None
    macs: int = 0
    decision: Keep | Merge | None = None
    kept: TokenSet | None = None
    projected_tokens: Tensor | None = None
    projector_input: int = 0
    block_tokens: list[tuple[int, int]] = field(default_factory=list)
    merging: Merging = field(default_factory=Merging)
