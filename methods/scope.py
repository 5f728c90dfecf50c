"""SCOPE: *Saliency-Coverage Oriented Token Pruning for Efficient Multimodal LLMs* (arXiv 2510.24214).

Authors' code: kinredon/SCOPE, commit 6bf7306. Block: the vision block whose output the model uses.

    a_j = attention of CLS to patch j in the block, all heads together
    b_i = how well patch i is covered, 0 at first; until the budget is spent:
        gain_j = Σ_i max(0, cos(x_i, x_j) - b_i)         what picking j would cover, x the features of an image
        pick the patch of highest gain_j · a_j^alpha     (``combine="add"``: gain_j + a_j^alpha)
        b_i = max(b_i, cos(x_i, x_picked))
    in front of the projector:  keep the picks, in their order in the image, with new positions

It keeps its budget of every image from decoder layer 0 on. The authors divide their budget by the number of images in
the batch, so that two prompts side by side get half of it each; here every image has all of it. A pick takes nine small
operations, one behind the other, so that the greedy loop costs more time than its arithmetic. An image that the model
cuts into tiles has no newlines (``newlines=drop``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from .base import OnPatches, Picking, Salient
from .pieces import cosine, per_image
from .registry import register

if TYPE_CHECKING:
    from ..engine.contract import VisionView

Combination = Literal["multiply", "add"]


@register("scope", "SCOPE", paper="2510.24214", source="kinredon/SCOPE@6bf7306")
class SCOPE(Salient, OnPatches, Picking):
    """Keep patches that together cover the others' features best, weighted by the attention of CLS."""

    hook_points = ("vision",)
    positions = "renumber"
    newlines = "drop"
    everything = "keep=1,newlines=keep"
    examples = ("keep=0.5", "tokens=6,alpha=0.5,combine=add")

    alpha: float = 1.0
    combine: Combination = "multiply"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.alpha >= 0, f"alpha must be >= 0, not {self.alpha}")
        self.require(self.combine in get_args(Combination), "combine must be 'multiply' or 'add'")

    def weight(self, view: VisionView) -> Tensor:
        """(N, P): attention that each patch gets, all heads together."""
        return view.cls_weights().sum(1) if self.attention == "cls" else view.received() * view.vision.heads

    def picked(self, view: VisionView) -> Tensor:
        patches, size = view.features.shape[1:]
        view.scored(patches * patches * size)
        weight = self.weight(view) ** self.alpha
        return covering(cosine(view.features), weight, per_image(self, patches), add=self.combine == "add")


def covering(similarity: Tensor, weight: Tensor, count: int, *, add: bool = False) -> Tensor:
    """Int (N, count): tokens in the order in which the greedy rule picks them; ties go to the earlier token.

    ``similarity``: (N, P, P), cosines; ``weight``: (N, P), multiplied with what a token would newly cover, or added.
    """
    images, tokens, _ = similarity.shape
    covered, left_out = similarity.new_zeros(images, tokens, 1), similarity.new_zeros(images, tokens)
    picked = [similarity.new_empty(images, 0, dtype=torch.int64)]
    for _ in range(count):
        gain = (similarity - covered).clamp(min=0).sum(1)
        gain = (gain + weight if add else gain * weight) + left_out
        token = gain.argmax(1, keepdim=True)
        picked.append(token)
        left_out = left_out.scatter(1, token, -torch.inf)
        covered = covered.maximum(similarity.gather(2, token[:, None].expand(-1, tokens, -1)))
    return torch.cat(picked, dim=1)
