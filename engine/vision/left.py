"""What a tower has left in which a method acted, as a decision about the tokens of the prompt."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..decisions import Merge
from ..layout import TokenSet
from ..units.encoding import Encoding
from ..units.shapes import on_device


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
    """Of units that lost some, the first of the ``features`` (N, W, Dv) as new tokens, as many as squares are left.

    Each stands by the token of the prompt at its own place among them, and has its position where tokens keep theirs.
    Units that lost nothing stay as they are.
    """
    new = np.array(encoding.new_tokens)
    kept = np.array(encoding.tokens_left) - new
    place, most = np.arange(features.shape[1]), int(new.max())
    there = None if new.min() == most else on_device(place[:most] < new[:, None], features)
    return Merge(
        on_device(place < kept[:, None], features),
        added=features[:, :most],
        added_present=there,
        anchors=torch.arange(most, device=features.device).expand(len(new), -1),
        counts=tuple(kept.tolist()),
        anchored=True,
    )
