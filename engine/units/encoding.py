"""The record of one encoding, made anew for each batch of images, and what methods may read of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import InputError
from ...models.adapters import VisionGeometry
from .. import attention
from ..decisions import Merge
from ..layout import TokenLayout, TokenSet
from .bidirectional import real_patches, received
from .rows import ImageRows
from .shapes import Grid, Packed, Units, of_units

Attended = tuple[Tensor, Tensor, Tensor, float]
"""Query of the first token (N, heads, 1, d), keys and values (N, heads, t, d) of a block, and its scaling."""


@dataclass
class Inside:
    """Where a tower stands in which a method acts: what the blocks so far leave to the next one, N images of t tokens.

    ``counts``: tokens of each image, on the host. ``present``: bool (N, t), which of the t places hold one; None: all.
    ``patches``: int (N, t), the place that each token had at first, None while all are there or where tokens are new.
    ``size``: (N, t) and ``bias``: (N, t), as in :class:`BlockMerge`. ``memory``: (N, P), what the method remembers of
    each patch. ``outputs``: (N, t, Dv), by block, of blocks so far that the model uses besides the last one's, at the
    tokens that are left. ``attended``: of the block at hand. ``width``: t when the block began; ``going_on``: the
    tokens that enter its MLP in place of those given; ``mlp_output``: what that makes of them.
    """

    counts: tuple[int, ...] = ()
    present: Tensor | None = None
    patches: Tensor | None = None
    size: Tensor | None = None
    bias: Tensor | None = None
    memory: Tensor | None = None
    outputs: dict[int, Tensor] = field(default_factory=dict)
    attended: Attended | None = None
    width: int = 0
    going_on: Tensor | None = None
    mlp_output: Tensor | None = None

    def sizes(self, tokens: Tensor) -> Tensor:
        """(N, t), fp32: how many of the image's tokens each of ``tokens`` (N, t, Dv) stands for."""
        return tokens.new_ones(tokens.shape[:2], dtype=torch.float32) if self.size is None else self.size


@dataclass
class Encoding:
    """What the vision side computed of one batch of images, and what the method decided about them.

    ``units``: what the tower encoded by itself, N of them with up to W tokens each. ``pixels``: what entered the tower,
    where images are of one size; ``grids``: frames and patches (N, 3) where they differ in shape, those of a run
    ``before`` included, of images in front of videos; ``is_joined``: made of both. ``cls``: the CLS feature (N, Dv),
    and ``cls_of`` the blocks whose outputs are used. ``real``: bool (N, patches), which patches the tower does not take
    for padding; None: all. ``blocks``: query, key and scaling of the tower blocks that the method reads, by its names
    of them; ``chunks``: the same in a tower that has all units in one sequence, piece by piece. ``received``: attention
    (N, patches and CLS) that the tokens of blocks receive, where it is shared. ``features`` (N, W, Dv) enter the
    projector, ``projected`` (N, W, D) leave it. ``macs``: multiply-adds that were spent on scoring each unit, int (N,);
    ``padding_macs``: on what they were padded with. ``kept``: the features that were projected where others were
    dropped before, ``new``: those that were added to them; ``projected_tokens``: their number, int (N,).
    ``projector_input``: tokens that entered the projector in all. ``block_tokens``: where a method acts inside the
    tower, tokens of each unit (N,) at the attention and at the MLP of each block; ``block_widths``: places that they
    took. ``host_syncs``: how often the method read numbers there.
    """

    vision: VisionGeometry
    units: Units
    pixels: Tensor | None = None
    grids: Tensor | None = None
    before: Encoding | None = None
    is_joined: bool = False
    cls: Tensor | None = None
    cls_of: dict[int, Tensor] = field(default_factory=dict)
    real: Tensor | None = None
    blocks: dict[int, tuple[Tensor, Tensor, float]] = field(default_factory=dict)
    chunks: dict[int, list[tuple[Tensor, Tensor, float]]] = field(default_factory=dict)
    received: dict[int, Tensor] = field(default_factory=dict)
    features: Tensor | None = None
    projected: Tensor | None = None
    host_syncs: int = 0
    decision: Merge | None = None
    kept: TokenSet | None = None
    new: TokenSet | None = None
    projected_tokens: Tensor | None = None
    projector_input: int = 0
    block_tokens: list[tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    block_widths: list[tuple[int, int]] = field(default_factory=list)
    inside: Inside = field(default_factory=Inside)
    padding_macs: int = 0
    macs: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.macs = np.zeros(len(self.units.grids), np.int64)

    @property
    def is_shrunk(self) -> bool:
        """Whether the tower put out fewer features than the prompt has tokens."""
        return self.features is not None and int(self.features.shape[1]) < self.units.width

    @property
    def has_new(self) -> bool:
        """Whether those that it put out stand for no patch in particular."""
        return self.is_shrunk and self.inside.patches is None

    def rows(self, layout: TokenLayout) -> ImageRows:
        """Where the units stand in the rows of a prompt."""
        return ImageRows(layout, self.units.images, self.units.width)

    def scored(self, macs: int | tuple[int, ...]) -> None:
        """Multiply-adds were spent on scoring each unit: an int, or N of them where units differ."""
        # A tracer's sizes are tensors.
        more = np.array([int(work) for work in (macs if isinstance(macs, tuple) else (macs,))])
        self.macs = self.macs + more
        self.padding_macs += int(more.max() * len(more) - more.sum())

    def observe(self, name: int, query: Tensor, key: Tensor, scaling: float, mask: Tensor | None) -> None:
        """A block of the tower attends; where all units are in one sequence, it may do so in pieces."""
        if self.units.order is None:
            self.blocks[name], self.real = (query, key, scaling), real_patches(mask, len(query))
        else:
            assert mask is None
            self.chunks.setdefault(name, []).append((query, key, scaling))

    def attended(self, name: int, units: Sequence[int]) -> tuple[Tensor, Tensor, float]:
        """Query and key (n, heads, patches, d) of a block in some ``units`` of one size, and its scaling."""
        if self.units.order is None:
            query, key, scaling = self.blocks[name]
            return of_units(query, units), of_units(key, units), scaling
        sizes = [prod(grid) * self.vision.merged for grid in self.units.grids]
        queries, keys, scalings = zip(*self.chunks[name], strict=True)
        whole = (torch.cat(parts, dim=2).split(sizes, dim=2) for parts in (queries, keys))
        query, key = (torch.cat([part[unit] for unit in units]) for part in whole)
        return query, key, scalings[0]

    def attention_received(self, name: int, units: Sequence[int]) -> Tensor:
        """(n, patches): what the patches of some ``units`` of one size get in a block, as :func:`received`."""
        if (shared := self.received.get(name)) is not None:
            return of_units(shared, units)
        return received(*self.attended(name, units), None if self.real is None else of_units(self.real, units))

    def patches(self, unit: int) -> NDArray[np.int64] | None:
        """Int (P, merged): which patches of a ``unit``, as the tower has them, each token is made of.

        None: each of one, in order.
        """
        grid, merged, order = self.units.grids[unit], self.vision.merged, self.units.order
        if order is None:
            return None if merged == 1 else _squares(grid, round(merged**0.5))
        first = sum(map(prod, self.units.grids[:unit]))
        places = order[first : first + prod(grid)] - first
        return places[:, None] * merged + np.arange(merged)


def joined(videos: Encoding, is_video: NDArray[np.bool_], counts: Sequence[int]) -> Encoding:
    """The shapes of ``videos`` and of the images before them as one record, in the order in which rows have them.

    ``is_video``: bool (B, V), which visual tokens are a video's, of ``counts`` in each row. Raises :class:`InputError`
    where these are other images and videos.
    """
    assert videos.before is not None
    assert videos.grids is not None
    runs = (videos.before, videos)
    every = [(kind, image) for kind, run in enumerate(runs) for image in run.units.images]
    firsts = np.cumsum([0, *(image.units for _, image in every)])
    beams = max(sum(counts) // max(sum(len(image.source) for _, image in every), 1), 1)
    waiting = [[number for number, (kind, _) in enumerate(every) if kind == wanted] for wanted in (False, True)]
    images: list[Packed] = []
    order: list[int] = []
    for row in range(0, len(counts), beams):
        place = 0
        while place < counts[row]:
            kind = waiting[bool(is_video[row, place])]
            if not kind:
                raise InputError("images and videos are fewer than the visual tokens of the prompt")
            number = kind.pop(0)
            images.append(every[number][1])
            order += range(firsts[number], firsts[number + 1])
            place += len(images[-1].source)
    grids = [grid for run in runs for grid in run.units.grids]
    units = Units(tuple(grids[unit] for unit in order), tuple(images))
    return Encoding(videos.vision, units, grids=videos.grids[order], is_joined=True)


class BlockView:
    """A block of the vision tower, behind its attention or its MLP as the method says: N images, P patches each.

    ``block``: its number. ``tokens``: hidden states (N, t, Dv) of all tokens, CLS first where there is one. ``vision``:
    sizes of the tower. ``counts``: the patches of each image, on the host.
    """

    def __init__(self, block: int, tokens: Tensor, encoding: Encoding) -> None:
        assert encoding.inside.attended is not None
        self._query, self.keys, self.values, self._scaling = encoding.inside.attended
        self.block, self.tokens, self.vision = block, tokens, encoding.vision
        self.counts = tuple(count - int(self.vision.has_cls) for count in encoding.inside.counts)
        self._encoding, self._inside = encoding, encoding.inside

    @property
    def size(self) -> Tensor:
        """(N, t), fp32: how many of the image's tokens each token stands for."""
        return self._inside.sizes(self.tokens)

    @property
    def memory(self) -> Tensor | None:
        """(N, P): what the method set here in an earlier block, of the patches that are left; None if nothing."""
        return self._inside.memory

    @memory.setter
    def memory(self, values: Tensor) -> None:
        self._inside.memory = values

    def cls_logits(self, of: Literal["keys", "values"] = "keys") -> Tensor:
        """Logits (N, heads, t), fp32, of CLS's attention; with ``of="values"`` products of its value and each token's.

        Minus infinity where there is no token, so that a softmax over all is one over those that are there.
        """
        if of == "keys":
            logits = attention.fine(self._query @ self.keys.transpose(-1, -2)) * self._scaling
        else:
            logits = attention.fine(self.values[:, :, :1] @ self.values.transpose(-1, -2))
        width = self.keys.shape[1] * self.keys.shape[3]
        self.scored(tuple((count + 1) * width for count in self.counts))
        if self._inside.present is not None:
            logits = logits.masked_fill(~self._inside.present[:, None, None], float("-inf"))
        return logits.squeeze(2)

    def read(self, values: Tensor) -> list[float]:
        """One number of each image (N,) on the host, which waits for the device; counted like the reads of cuts."""
        self._encoding.host_syncs += 1
        return values.tolist()

    def scored(self, macs: int | tuple[int, ...]) -> None:
        """Count ``macs`` multiply-adds that the method itself spent on matrix products: an int, or one of each image.

        Where images differ each is taken to be padded to the largest.
        """
        self._encoding.scored(macs)


def _squares(grid: Grid, side: int) -> NDArray[np.int64]:
    """Patches, row by row, that squares of ``side`` make one of each token of a ``grid``."""
    frames, rows, columns = grid
    patches = np.arange(prod(grid) * side**2).reshape(frames, rows, side, columns, side)
    return patches.transpose(0, 1, 3, 2, 4).reshape(-1, side**2)
