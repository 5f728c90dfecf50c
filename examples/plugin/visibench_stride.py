"""Every n-th visual token of each image, a method in a package of its own.

    in front of the projector:  keep the patches 0, n, 2n, … of an image in row-major order; they keep their positions

A reference beside ``pooling`` and ``downsample``: regular like them, but nothing is averaged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from visibench.methods import Forward, Keep, Method

if TYPE_CHECKING:
    from visibench.engine import TokenLayout
    from visibench.engine.contract import VisionView
    from visibench.models.adapters import Geometry


@dataclass(frozen=True)
class Stride(Method):
    """Keep every ``n``-th patch of each image."""

    name = "stride"
    title = "Every n-th token"
    hook_points = ("vision",)
    vision_blocks = ()
    examples = ("n=3", "n=2,positions=renumber")
    everything = "n=1"

    n: int = 2
    """Of the patches of an image, in row-major order, the first of each ``n`` stays."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.n >= 1, f"n must be >= 1, not {self.n}")

    def left(self, layout: TokenLayout, geometry: Geometry) -> dict[int, Tensor]:
        assert geometry.vision is not None
        patches = geometry.vision.tokens
        return {0: layout.visual.host_counts // patches * -(-patches // self.n)}

    def begin(self, layout: TokenLayout, geometry: Geometry) -> Forward:
        return Forward()

    def vision(self, view: VisionView) -> Keep:
        place = torch.arange(view.present.shape[1], device=view.present.device)
        return Keep(view.present & (place % self.n == 0))
