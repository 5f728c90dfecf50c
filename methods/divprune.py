"""DivPrune: *Diversity-based Visual Token Pruning for Large Multimodal Models* (arXiv 2503.02175).

Authors' code: vbdi/divprune, commit 799e2d9.

    on the projected tokens of an image:  d(i, j) = 1 - cos(x_i, x_j)
    first pick:                           the token whose nearest other token is farthest
    then, until the budget is spent:      the token farthest from its nearest picked one (max–min diversity)

The picked tokens keep their order in the image and get new positions. The authors round the budget to the nearest
integer; here it is floored as for every method. Their code prunes the embeddings of one prompt, of one image, with the
image at a fixed place; here every image of every row is pruned by itself. Of an image that the model cuts into tiles
they prune the packed sequence as it is: its newlines compete with the patches (``newlines=compete``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .base import OnImages, Picking
from .pieces import cosine, per_image
from .registry import register

if TYPE_CHECKING:
    from ..engine.contract import ImageView


@register("divprune", "DivPrune", paper="2503.02175", source="vbdi/divprune@799e2d9")
class DivPrune(OnImages, Picking):
    """Keep the projected tokens of each image that are farthest from one another."""

    hook_points = ("projector",)
    positions = "renumber"
    newlines = "compete"
    vision_blocks = ()
    examples = ("keep=0.5", "tokens=6,positions=keep")

    def picked(self, view: ImageView) -> Tensor:
        patches, size = view.projected.shape[1:]
        view.scored(patches * patches * size)
        return farthest(1 - cosine(view.projected), per_image(self, patches))


def farthest(distance: Tensor, count: int) -> Tensor:
    """Int (N, count): tokens in the order in which the greedy max–min rule picks them; ties go to the earlier token.

    ``distance``: (N, P, P), symmetric. ``count`` steps, all images at once.
    """
    itself = torch.eye(distance.shape[1], dtype=torch.bool, device=distance.device)
    distance, image = distance.masked_fill(itself, torch.inf), torch.arange(len(distance), device=distance.device)
    nearest, picked = distance.amin(2), list[Tensor]()
    # A token that is picked is at no distance of itself: less than none, so that it is not picked again.
    distance.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    for step in range(count):
        if step:
            row = distance[image, picked[-1]]
            nearest = torch.minimum(nearest, row) if step > 1 else row
        picked.append(nearest.argmax(1))
    return torch.stack(picked, dim=1) if picked else image.new_empty(len(distance), 0)
