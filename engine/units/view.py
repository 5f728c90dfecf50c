"""What a method sees of the vision side: units in front of the projector, and images as they enter the decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError, UnsupportedModelError
from ...models.adapters import VisionGeometry
from .. import attention
from .shapes import ANCHOR, MIXED, MIXTURE, Grid, Group, Numbers, of_units, on_device

if TYPE_CHECKING:
    from .encoding import Encoding


class VisionView:
    """N units of one shape (images, or tiles of them), P tokens each.

    ``macs``: int (N,), multiply-adds that were spent on scoring.
    """

    def __init__(self, encoding: Encoding, group: Group) -> None:
        self._encoding, self._group = encoding, group
        self.macs = np.zeros(len(group.units), np.int64)

    @cached_property
    def features(self) -> Tensor:
        """(N, P, Dv): what enters the projector."""
        assert self._encoding.features is not None
        return self._group.pick(self._encoding.features)

    @cached_property
    def projected(self) -> Tensor:
        """(N, P, D): what leaves the projector; only in :meth:`~visibench.methods.Forward.projected`."""
        assert self._encoding.projected is not None
        return self._group.pick(self._encoding.projected)

    @property
    def grid(self) -> Grid:
        """Frames, rows and columns of the P tokens."""
        return self._group.grid

    @cached_property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """For each of the N units the number of its image, and its own number in that: 0 for an image as a whole."""
        images = self._encoding.units.images
        every = [(number, part) for number, image in enumerate(images) for part in range(image.units)]
        return tuple(every[unit] for unit in self._group.units)

    @property
    def vision(self) -> VisionGeometry:
        """Sizes of the vision side, for images of this size."""
        return replace(self._encoding.vision, tokens=self._group.tokens)

    @property
    def cls(self) -> Tensor:
        """The feature (N, 1, Dv) of the CLS token, for methods with ``vision_cls``; (N, 0, Dv) where there is none.

        None either where the projector takes several patches together, of which CLS is none.
        """
        cls = self._encoding.cls
        return self.features[:, :0] if cls is None else of_units(cls, self._group.units)[:, None]

    @property
    def sizes(self) -> tuple[int, int]:
        """N and P."""
        return len(self._group.units), self._group.tokens

    @property
    def present(self) -> Tensor:
        """Bool (N, P): all true, units have no padding."""
        return torch.ones(self.sizes, dtype=torch.bool, device=self.features.device)

    def cls_weights(self, block: int = -1, *, single_head: bool = False) -> Tensor:
        """Attention weights (N, heads, P), fp32, from CLS to the patches in a vision block.

        ``block`` counts back from the block whose output the model uses as features (-1: that block itself, 0: the
        one after it). ``single_head``: weights (N, 1, P) as if the block had one head of the full width. A token of
        several patches has the sum of theirs.
        """
        assert self._encoding.real is None, "no tower with a CLS token is given padding"
        query, key, scaling = self._encoding.attended(block, self._group.units)
        self.scored(key.shape[1] * key.shape[2] * key.shape[3])
        query = query[:, :, :1]
        if single_head:
            query, key = (t.transpose(1, 2).flatten(2)[:, None] for t in (query, key))
            scaling = query.shape[3] ** -0.5
        logits = attention.fine(query @ key.transpose(-1, -2)).squeeze(2)
        return self._tokens((logits * scaling).softmax(-1)[:, :, 1:])

    def received(self, block: int | None = None) -> Tensor:
        """Attention (N, P), fp32, that each patch receives in a vision block: mean over heads and all queries.

        CLS is one of the queries; what the tower takes for padding neither asks nor receives. For blocks that the
        method names in ``blocks_received``; rows are taken in blocks. None: the last one, up to the features', in which
        patches attend to the whole image. A token of several patches has the sum of theirs.
        """
        encoding, units = self._encoding, self._group.units
        block = encoding.vision.last_full if block is None else block
        got = encoding.attention_received(block, units)
        self.scored(encoding.vision.hidden * got.shape[1] ** 2)
        return self._tokens(got[:, None, int(encoding.vision.has_cls) :]).squeeze(1)

    def keys(self, block: int = -1) -> Tensor:
        """Keys (N, heads, P, d) of the patches in a vision block; of a token of several patches the mean of theirs."""
        _, key, _ = self._encoding.attended(block, self._group.units)
        return self._tokens(key[:, :, int(self._encoding.vision.has_cls) :], mean=True)

    def scored(self, macs: int) -> None:
        """Count ``macs`` multiply-adds a unit that the method itself spent on matrix products."""
        self.macs += int(macs)  # a tracer's sizes are tensors

    def _tokens(self, values: Tensor, *, mean: bool = False) -> Tensor:
        """Values (N, heads, patches, …), as the tower has them, of tokens (N, heads, P, …)."""
        places = self._encoding.patches(self._group.units[0])
        if places is not None:
            values = values[:, :, on_device(places, values)]
            values = values.mean(3) if mean else values.sum(3)
        return self._group.pick(values.transpose(1, 2)).transpose(1, 2) if self._group.index is not None else values


class ImageView:
    """N images whose P tokens enter the decoder, whatever they are made of.

    ``projected``: (N, P, D). ``source``: int (N, P), which of the features of all units each token is,
    :data:`~.units.ANCHOR` for none. ``units``: those of each image. ``macs``: as in :class:`VisionView`, by image.
    """

    def __init__(
        self, projected: Tensor, encoding: Encoding, source: Numbers, units: Sequence[tuple[int, ...]]
    ) -> None:
        self.projected, self._encoding, self._source, self._units = projected, encoding, source, units
        self.macs = np.zeros(len(projected), np.int64)

    @property
    def sizes(self) -> tuple[int, int]:
        """N and P."""
        return int(self.projected.shape[0]), int(self.projected.shape[1])

    @cached_property
    def present(self) -> Tensor:
        """Bool (N, P): all true."""
        return torch.ones(self.sizes, dtype=torch.bool, device=self.projected.device)

    @cached_property
    def features(self) -> Tensor:
        """(N, P, Dv): what entered the projector; zeros for tokens that are no feature."""
        if self._encoding.features is None:
            raise UnsupportedModelError(
                "what enters the projector is not read of this architecture, nor of images beside videos: choose a "
                "method that reads view.projected alone"
            )
        return self._own(self._encoding.features)

    def cls_weights(self, block: int = -1) -> Tensor:
        """Attention weights (N, heads, P) from the CLS of each token's own unit, as in :class:`VisionView`."""
        return self._of_units(lambda view: view.cls_weights(block)).transpose(1, 2)

    def received(self, block: int | None = None) -> Tensor:
        """Attention (N, P) that each token receives in its own unit, as in :class:`VisionView`."""
        return self._of_units(lambda view: view.received(block)[:, None]).squeeze(2)

    def scored(self, macs: int) -> None:
        """Count ``macs`` multiply-adds an image that the method itself spent on matrix products."""
        self.macs += int(macs)  # a tracer's sizes are tensors

    def _own(self, values: Tensor) -> Tensor:
        """Of values (units, W, …) those of the tokens (N, P, …)."""
        if (self._source == MIXED).any():
            raise InputError(MIXTURE.format("a method that reads features"))
        source = on_device(self._source, values)
        own = values.flatten(0, 1)[source.clamp(min=0)]
        return own.masked_fill((source == ANCHOR).view(*source.shape, *[1] * (own.ndim - 2)), 0)

    def _of_units(self, read: Callable[[VisionView], Tensor]) -> Tensor:
        """What is read (n, heads, P) of the units of each shape, for the tokens of images: (N, P, heads)."""
        encoding = self._encoding
        units, mine = encoding.units, {unit for own in self._units for unit in own}
        together, macs = None, np.zeros(len(units.grids), np.int64)
        for every in units.whole:
            group = replace(every, units=tuple(unit for unit in every.units if unit in mine))
            if not group.units:
                continue
            view = VisionView(encoding, group)
            values = read(view).transpose(1, 2)
            if together is None:
                together = values.new_zeros(len(units.grids), units.width, values.shape[2])
            group.place(values, together)
            macs[list(group.units)] = view.macs
        assert together is not None
        self.macs += np.array([macs[list(own)].sum() for own in self._units])
        return self._own(together)
