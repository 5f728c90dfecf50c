"""Clusters of tokens that several methods share. N counts images or rows, P tokens, D features."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .pieces import precise


def distances(tokens: Tensor) -> Tensor:
    """Euclidean distance of every token (N, P, D) to every one: (N, P, P), 0 to itself. P² · D multiply-adds."""
    tokens = precise(tokens)
    square = tokens.square().sum(2)
    squared = square[:, :, None] + square[:, None] - 2 * tokens @ tokens.transpose(1, 2)
    itself = torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device)
    return squared.masked_fill(itself, 0).clamp(min=0).sqrt()


def density_peaks(
    tokens: Tensor, present: Tensor, clusters: Tensor, most: int, noise: Tensor | float = 0
) -> tuple[Tensor, Tensor]:
    """Clustering by density peaks among nearest neighbours (DPC-kNN): centres and the cluster of every token.

    A token's density is exp(-mean squared distance to its k nearest, itself among them) plus ``noise`` (N, P); its gap
    is the distance to the nearest denser one, or, where there is none, the largest distance of all. The centres are
    the tokens of largest density · gap, and every other token joins the nearest centre. Distances are divided by √D.

    ``tokens``: (N, P, D), those counted by ``present``, bool (N, P). ``clusters``: int (N,), how many to form, which is
    k as well; at most the tokens that are present, and at most ``most``. Returns int (N, most), the columns of the
    centres, best first, and int (N, P), for each token the place of its centre in that list.
    """
    width, column = tokens.shape[1], torch.arange(most, device=tokens.device)
    wanted = column < clusters[:, None]
    there = present[:, :, None] & present[:, None]
    distance = (distances(tokens) / tokens.shape[2] ** 0.5).masked_fill(~there, torch.inf)
    nearest = distance.sort(dim=2).values[:, :, :most].square().masked_fill(~wanted[:, None], 0)
    density = torch.exp(-nearest.sum(2) / clusters.clamp(min=1)[:, None]) + noise
    denser = (density[:, None] > density[:, :, None]) & there
    largest = distance.masked_fill(~there, 0).amax((1, 2), keepdim=True)
    gap = torch.where(denser, distance, largest).amin(2)
    score = (density * gap).masked_fill(~present, -torch.inf)
    centre = score.argsort(dim=1, descending=True, stable=True)[:, :most]
    reach = distance.gather(2, centre[:, None].expand(-1, width, -1)).masked_fill(~wanted[:, None], torch.inf)
    # A centre heads its own cluster, also where another one has the same place. Unwanted ones land in a surplus column.
    head = centre.masked_fill(~wanted, width)
    cluster = torch.nn.functional.pad(reach.argmin(2), (0, 1)).scatter(1, head, column.expand_as(head))
    return centre, cluster[:, :width]


def pooled(tokens: Tensor, cluster: Tensor, count: int, *, mean: bool) -> Tensor:
    """Sum or mean (N, count, D) of the tokens (N, P, D) of each cluster, int (N, P), -1 for none; 0 for empty ones."""
    member = cluster[:, None] == torch.arange(count, device=tokens.device)[:, None]
    total = member.to(tokens.dtype) @ tokens
    return total / member.sum(2, keepdim=True).clamp(min=1) if mean else total


def totals(numbers: Tensor, cluster: Tensor, count: int) -> Tensor:
    """Sums (B, count, …) of whole ``numbers`` (B, V, …) by ``cluster``, int (B, V), of which ``count`` is none."""
    sums = numbers.new_zeros(len(numbers), count + 1, *numbers.shape[2:])
    index = cluster.view(*cluster.shape, *[1] * (numbers.ndim - 2)).expand_as(numbers)
    return sums.scatter_add(1, index, numbers)[:, :count]


def placed(index: Tensor, values: Tensor, onto: Tensor) -> Tensor:
    """``onto`` (B, V, …) with ``values`` (B, K, …) at ``index``, int (B, K)."""
    return onto.scatter(1, index.view(*index.shape, *[1] * (values.ndim - 2)).expand_as(values), values)


def centres(distance: Tensor, there: Tensor, cutoff: float, ask: Callable[[Tensor], bool] = bool) -> Tensor:
    """Bool (B, K): which tokens are centres, of those ``there``, by their ``distance`` (B, K, K); ``ask`` reads."""
    near = there[:, None] & there[:, :, None]
    density = torch.exp(-((distance / 2) ** 2)).masked_fill(~near, 0).sum(2)
    order = density.argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)
    before = near & (distance <= cutoff) & (rank[:, None] < rank[:, :, None])
    centre, changed = there, True
    # The densest is right at once, and with each round those that depend on right ones alone.
    while changed:
        for _ in range(4):
            last, centre = centre, there & ~(before & centre[:, None]).any(2)
        changed = ask((last != centre).any())
    return centre
