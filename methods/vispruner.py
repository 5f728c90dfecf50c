"""VisPruner: *Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs*.

arXiv 2412.01818, the number of FasterVLM, of which it is the later version.

Authors' code: Theia-4869/VisPruner, commit aefa01a.

    in the vision block whose output the model uses:  s_j = mean over heads of the attention of CLS to patch j
    important:  the floor(important · T) patches of highest s_j, of a budget of T
    diverse:    a list of the others by falling s_j; until it holds T - important patches, compare the features at its
                even places with those at its odd places, drop those even ones (8 at a time) whose cosine to their
                nearest odd one is highest, and go on with the even ones that stay, by falling cosine, then the odd ones
    in front of the projector:  keep both kinds, in their order in the image, with new positions

``important=1`` is FasterVLM. The authors' code needs even lists, and so even T and floor(important · T); here the even
places of an odd list are one more than the odd ones.

Each tile of an image that the model cuts into tiles has the same budget. Patches of padding count like others
(``unpad=false``), and there are no newlines (``newlines=drop``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..engine.contract import Keep
from .base import Budgeted, OnPatches, Salient
from .pieces import cosine, marked, per_image
from .registry import register

if TYPE_CHECKING:
    from ..engine.contract import VisionView


@register("vispruner", "VisPruner", paper="2412.01818", source="Theia-4869/VisPruner@aefa01a")
class VisPruner(Salient, OnPatches, Budgeted):
    """Keep the patches to which CLS attends most, and of the others the least redundant ones."""

    hook_points = ("vision",)
    positions = "renumber"
    newlines, unpad = "drop", False
    everything = "keep=1,newlines=keep,unpad=true"
    examples = ("keep=0.4", "tokens=9,important=0.3,drop=2", "tokens=6,important=1")

    important: float = 0.5
    drop: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.important <= 1, f"important is a fraction of the budget in [0, 1], not {self.important}")
        self.require(self.drop >= 1, "drop, the patches that leave at a time, must be >= 1")

    def vision(self, view: VisionView) -> Keep:
        images, patches, size = view.features.shape
        budget = per_image(self, patches)
        important = int(budget * self.important)
        similarity = None
        if 0 < budget - important < patches - important:
            view.scored(patches * patches * size)
            similarity = cosine(view.features)
        stay = select(self.salience(view), similarity, important, budget - important, self.drop)
        return Keep(stay, counts=(budget,) * images)


def select(attention: Tensor, similarity: Tensor | None, important: int, diverse: int, drop: int = 8) -> Tensor:
    """Bool (N, P): the ``important`` patches of highest ``attention`` (N, P), and ``diverse`` others.

    ``similarity``: (N, P, P), cosines; not needed if nothing leaves. All images at once; no host sync.
    """
    by_attention = attention.argsort(dim=1, descending=True, stable=True)
    chosen, rest = by_attention[:, :important], by_attention[:, important:]
    while similarity is not None and rest.shape[1] > max(diverse, 1):
        rest = thinned(rest, similarity, min(drop, rest.shape[1] - diverse))
    return marked(chosen, attention.shape[1]) | marked(rest[:, :diverse], attention.shape[1])


def thinned(rest: Tensor, similarity: Tensor, drop: int) -> Tensor:
    """The list ``rest``, int (N, R), less the ``drop`` entries at even places that are most like an odd one."""
    even, odd = rest[:, ::2], rest[:, 1::2]
    rows = similarity.gather(1, even[..., None].expand(-1, -1, similarity.shape[2]))
    nearest = rows.gather(2, odd[:, None].expand(-1, even.shape[1], -1)).amax(2)
    order = nearest.argsort(dim=1, descending=True, stable=True)
    return torch.cat([even.gather(1, order[:, drop:]), odd], dim=1)
