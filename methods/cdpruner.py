"""CDPruner: *Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning* (arXiv 2506.10967).

Authors' code: Theia-4869/CDPruner, commit 9541616.

    relevance   r_j = - mean over the question's chunks of cos(CLIP image embedding of patch j, CLIP text embedding),
                scaled to (0, 1] within the image
    kernel      L_ij = r_i · cos(x_i, x_j) · r_j on the projected tokens x of an image
    keep        the tokens that greedily maximise det L over sets of the budget's size (a determinantal point process)

The tokens keep their order and get new positions. The sign of r is that of the authors' code. They scale r over
the whole batch, which they run with one image; here each image is scaled by itself. Where the budget exceeds the rank
of the kernel their loop repeats tokens; here it goes on with tokens not yet chosen.

The relevance needs the text tower of CLIP beside the vision tower. Checkpoints of vision-language models leave it out,
so ``condition="question"``, the default and the paper's method, raises on them; ``condition="none"`` is the same
choice with r = 1, by diversity alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from .base import OnImages, Picking
from .pieces import cosine, per_image
from .registry import register

if TYPE_CHECKING:
    from ..engine.contract import Geometry, ImageView

Condition = Literal["question", "none"]


@register("cdpruner", "CDPruner", paper="2506.10967", source="Theia-4869/CDPruner@9541616")
class CDPruner(OnImages, Picking):
    """Keep the projected tokens that are most diverse and most relevant to the question."""

    hook_points = ("projector",)
    positions = "renumber"
    vision_blocks = ()
    examples = ("keep=0.5,condition=none",)
    everything = "keep=1,condition=none"

    condition: Condition = "question"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.condition in get_args(Condition), "condition must be 'question' or 'none'")

    def check(self, geometry: Geometry) -> None:
        super().check(geometry)
        self.require(
            self.condition == "none",
            "compares patches with the question in CLIP's embedding space, and this model has no CLIP text tower: "
            "use condition=none (diversity alone), divprune or a method that reads the prompt in the decoder",
        )

    def picked(self, view: ImageView) -> Tensor:
        patches, size = view.projected.shape[1:]
        count = per_image(self, patches)
        view.scored(patches * patches * size + patches * count * (count - 1) // 2)
        itself = torch.eye(patches, dtype=torch.bool, device=view.projected.device)
        # Exactly 1: rounding must not choose the first token.
        kernel = cosine(view.projected).masked_fill(itself, 1)
        return most_likely(kernel, count)


def relevance(images: Tensor, texts: Tensor) -> Tensor:
    """(N, P): minus the mean cosine of patch embeddings (N, P, E) with text embeddings (M, E), not scaled yet."""
    return -cosine(images, texts.expand(len(images), -1, -1)).mean(2)


def scaled(values: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Values (N, P) moved and stretched within each row to start just above 0 and end at 1."""
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    return (values - low + epsilon) / (high - low)


def conditioned(similarity: Tensor, weight: Tensor) -> Tensor:
    """The kernel (N, P, P) of ``similarity`` (N, P, P) under ``weight`` (N, P)."""
    return weight[:, :, None] * similarity * weight[:, None, :]


def most_likely(kernel: Tensor, count: int) -> Tensor:
    """Int (N, count): tokens in the order in which the greedy rule picks them for the largest determinant.

    ``kernel``: (N, P, P), positive semidefinite. Each pick extends the Cholesky factor of the chosen part by one row
    (Chen, Zhang and Zhou 2018): ``gain`` is what a token would multiply the determinant by.
    """
    images, tokens, _ = kernel.shape
    gain = kernel.diagonal(dim1=1, dim2=2)
    least = gain.amax(1, keepdim=True) * torch.finfo(kernel.dtype).eps ** 2
    factor = kernel.new_zeros(images, 0, tokens)
    picked: list[Tensor] = []
    for _ in range(count):
        token = gain.argmax(1, keepdim=True)
        picked.append(token)
        along = lambda t, at=token: t.gather(2, at[:, None].expand(-1, t.shape[1], -1))  # noqa: E731
        row = along(kernel).transpose(1, 2)
        if factor.shape[1]:
            row = row - along(factor).transpose(1, 2) @ factor
        gained = gain.gather(1, token)
        # Past the rank of the kernel only rounding is left.
        row = row * torch.where(gained > least, gained, torch.inf).rsqrt()[..., None]
        factor = torch.cat([factor, row], dim=1)
        gain = (gain - row.squeeze(1) ** 2).scatter(1, token, -torch.inf)
    return torch.cat(picked, dim=1) if picked else kernel.new_empty(images, 0, dtype=torch.int64)
