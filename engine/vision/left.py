"""What a tower has left in which a method acted, as a decision about the tokens of the prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from ..decisions import Merge
from ..layout import TokenSet
from ..units.encoding import Encoding


def left_inside(encoding: Encoding, features: Tensor) -> TokenSet:
    """Which patches are left of each unit where the tower put out fewer; none where its tokens are new ones."""
    images, patches = features.shape[0], encoding.units.width
    left = features.new_zeros(images, patches + 1, dtype=torch.bool)
    if encoding.has_new:
        return TokenSet(left[:, :-1], (0,) * images)
    (inside,) = encoding.inside
    first = inside.first
    assert inside.patches is not None
    index = inside.patches[:, first:] - first
    if inside.present is not None:
        index = index.masked_fill(~inside.present[:, first:], patches)
    left = left.scatter(1, index, torch.ones_like(index, dtype=torch.bool))
    return TokenSet(left[:, :-1], tuple(count - first for count in inside.counts))


def squares_left(encoding: Encoding, features: Tensor) -> Merge:
    """The first of the ``features`` (N, W, Dv) of each unit as new tokens, as many as its squares that are left."""
    counts, none = encoding.tokens_left, features.new_zeros(features.shape[:2], dtype=torch.bool)
    added, there = features[:, : max(counts)], None
    if min(counts) < max(counts):
        place = torch.arange(max(counts), device=features.device)
        there = place < torch.tensor(counts, device=features.device)[:, None]
    return Merge(none, added=added, added_present=there, counts=(0,) * len(counts))
