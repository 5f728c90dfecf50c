"""Attention among the patches of a unit, in which each sees all: what the tower was told of padding among them."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import attention


def real_patches(mask: Tensor | None, units: int) -> Tensor | None:
    """Bool (N, P): patches of N ``units`` that are no padding, of the mask that a kernel was given; None: all.

    ``mask``: (N, P), true for patches that count, or (N or 1, 1, Q, P), bool or added to logits. A unit of nothing but
    padding counts as a whole, as it does in the kernels.
    """
    if mask is None:
        return None
    if mask.ndim == 4:
        mask = (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2)[:, 0].any(1)
    real = mask.bool().expand(units, -1)
    return real | ~real.any(1, keepdim=True)


def received(query: Tensor, key: Tensor, scaling: float, real: Tensor | None = None) -> Tensor:
    """(N, P): attention that each key (N, H, P, d) gets, mean over heads and queries (N, H, P, d); no causal mask.

    ``real``: bool (N, P), None for all: the others ask nothing and get nothing.
    """
    total = query.new_zeros(key.shape[0], key.shape[2], dtype=torch.float32)
    for place in range(0, query.shape[2], attention.weights.BLOCK):
        rows = slice(place, place + attention.weights.BLOCK)
        logits = attention.fine(query[:, :, rows] @ key.transpose(-1, -2)).mul(scaling)
        if real is None:
            total = total + logits.softmax(-1).sum((1, 2))
        else:
            weights = logits.masked_fill(~real[:, None, None], float("-inf")).softmax(-1)
            total = total + weights.mul(real[:, None, rows, None]).sum((1, 2))
    asked = query.shape[2] if real is None else real.sum(1, keepdim=True)
    return total / (asked * query.shape[1])
