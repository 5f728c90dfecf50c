"""HiRED: *Attention-Guided Token Dropping for Efficient Inference of High-Resolution Vision-Language Models*.

Authors' code: hasanar1f/HiRED, commit 42be984 (arXiv 2408.10945).

    s_j      = attention of CLS to patch j in the vision block whose output the model uses, all heads together
    budget:  T for an image and its M tiles together, of which the image as a whole gets floor(alpha · T)
    shares:  take the floor((1 - alpha) · P) of its P patches to which CLS attends most in block 0, and cut the patches,
             row by row, into M parts: of the rest, tile m gets the share of those that lie in part m, floored
    in front of the projector:  keep the patches of highest s_j, of each as many as its budget, but no more than it has

What a tile cannot use is lost. Patches of padding that were chosen leave then, as the model leaves them out, and so do
newlines (``newlines=drop``). The tokens that stay get new positions. An image without tiles keeps T patches.

So the code reads a tile's share from a stripe of the image as a whole, not from the place where the tile lies. Its
copy of the model took rows for columns where there are not as many of both; here tiles lie as the model has them.
Towers without CLS need ``attention=received`` in place of what CLS attends to, which is not in the authors' code.
``alpha`` is the authors' 0.5 of their scripts.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..engine.contract import Keep
from .base import Budgeted, OnImages, Salient, floored, top
from .registry import register

if TYPE_CHECKING:
    from ..engine.contract import Geometry, TokenLayout, VisionGeometry, VisionView


@register("hired", "HiRED", paper="2408.10945", source="hasanar1f/HiRED@42be984")
class HiRED(Salient, OnImages, Budgeted):
    """Share a budget among an image and its tiles, and keep the patches of each to which CLS attends most."""

    hook_points = ("vision",)
    positions = "renumber"
    newlines, unpad = "drop", "after"
    examples = ("keep=0.5", "tokens=7,alpha=0.3,positions=keep")
    everything = "keep=1,newlines=keep"

    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.alpha <= 1, f"alpha is a fraction of the budget in [0, 1], not {self.alpha}")

    def blocks_read(self, vision: VisionGeometry) -> tuple[int, ...]:
        # The one whose output is used, and block 0.
        return (-1, -1 - vision.feature_block) if self.attention == "cls" else ()

    def blocks_received(self, vision: VisionGeometry) -> tuple[int, ...]:
        return (*super().blocks_received(vision), *[-1 - vision.feature_block] * self.shares_received(vision))

    def shares_received(self, vision: VisionGeometry) -> bool:
        """Whether block 0 says by the attention that patches receive which share a tile gets."""
        return self.attention == "received" and vision.tiled

    def left(self, layout: TokenLayout, geometry: Geometry) -> dict[int, Tensor] | None:
        tiled = geometry.vision is not None and geometry.vision.tiled
        return None if tiled else super().left(layout, geometry)  # what images show decides about tiles

    def vision(self, view: VisionView) -> Keep:
        scores = self.salience(view)
        apart = self.attention == "cls" or self.shares_received(view.vision)
        first = self.salience(view, -1 - view.vision.feature_block) if apart else scores
        images = [[*own] for _, own in groupby(range(len(first)), key=lambda unit: view.parts[unit][0])]
        budgets = torch.cat([self.shares(first[own[0]], len(own) - 1) for own in images])
        whole = len(images) == len(first)  # without tiles no share is to be read
        return Keep(
            top(scores, budgets, view.present), counts=(self.total(first.shape[1]),) * len(first) if whole else None
        )

    def total(self, patches: int) -> int:
        """The budget of an image of so many ``patches``, those of tiles and the whole together."""
        return int(self.budget(torch.tensor(patches)))

    def shares(self, attention: Tensor, tiles: int) -> Tensor:
        """Int (1 + tiles,): budgets of an image as a whole, with ``attention`` (P,) in block 0, and of its tiles."""
        patches = len(attention)
        total = self.total((1 + tiles) * patches)
        if not tiles or total == (1 + tiles) * patches:
            return torch.full((1 + tiles,), total // (1 + tiles), device=attention.device)
        parts = (total, self.alpha), (patches, 1 - self.alpha)
        whole, seen = (min(int(floored(torch.tensor(number), share)), patches) for number, share in parts)
        part = attention.argsort(descending=True, stable=True)[:seen] * tiles // patches
        counts = (part == torch.arange(tiles, device=part.device)[:, None]).sum(1)
        rest = min(total - whole, tiles * patches) * counts // max(seen, 1)
        return torch.cat([rest.new_full((1,), whole), rest.clamp(max=patches)])
