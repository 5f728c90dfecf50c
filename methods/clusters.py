"""Clusters of tokens that several methods share. N counts images or rows, P tokens, D features."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .pieces import precise


def squared_distances(tokens: Tensor) -> Tensor:
    """Mean over features of the squared differences of every two tokens (N, P, D): (N, P, P), 0 to itself.

    P² · D multiply-adds. Alike both ways to the bit, so that two tokens nearest to each other are as dense on every
    machine.
    """
    tokens, share = precise(tokens), 1 / tokens.shape[2]
    square = tokens.square().sum(2, keepdim=True)
    squared = torch.baddbmm(square.transpose(1, 2), tokens, tokens.transpose(1, 2), beta=share, alpha=-2 * share)
    squared.add_(square, alpha=share).diagonal(dim1=1, dim2=2).fill_(0)
    return squared.maximum(squared.transpose(1, 2)).clamp_(min=0)


def density_peaks(tokens: Tensor, clusters: int, noise: Tensor | float = 0) -> tuple[Tensor, Tensor]:
    """Clustering by density peaks among nearest neighbours (DPC-kNN): centres and the cluster of every token.

    A token's density is exp(-mean squared distance to its k nearest, itself among them) plus ``noise`` (N, P); its gap
    is the distance to the nearest denser one, or, where there is none, the largest distance of all. The centres are
    the tokens of largest density · gap, and every other token joins the nearest centre. Distances are divided by √D.

    ``tokens``: (N, P, D). ``clusters``: how many to form, which is k as well; at most P. Returns int (N, clusters), the
    centres, best first, and int (N, P), for each token the place of its centre in that list.
    """
    squared = squared_distances(tokens)
    distance, nearest = squared.sqrt(), squared.topk(clusters, dim=2, largest=False, sorted=False)[0]
    density = torch.exp(-nearest.mean(2)) + noise
    denser = density[:, None] > density[:, :, None]
    gap = torch.where(denser, distance, distance.amax((1, 2), keepdim=True)).amin(2)
    centre = (density * gap).argsort(dim=1, descending=True, stable=True)[:, :clusters]
    reach = distance.gather(2, centre[:, None].expand(-1, distance.shape[1], -1))
    # A centre heads its own cluster, also where another one has the same place.
    heads = torch.arange(clusters, device=tokens.device).expand_as(centre)
    return centre, reach.argmin(2).scatter_(1, centre, heads)


def pooled(tokens: Tensor, cluster: Tensor, count: int, *, mean: bool) -> Tensor:
    """Sum or mean (N, count, D) of the tokens (N, P, D) of each cluster, int (N, P), -1 for none; 0 for empty ones."""
    member = (cluster[:, None] == torch.arange(count, device=tokens.device)[:, None]).to(tokens.dtype)
    total = torch.bmm(member, tokens)
    return total / member.sum(2, keepdim=True).clamp_(min=1) if mean else total


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
