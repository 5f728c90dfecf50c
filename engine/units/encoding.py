"""The record of one encoding, made anew for each batch of images, and what methods may read of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import InputError
from ...models.adapters import VisionGeometry
from ..decisions import Merge
from ..layout import TokenLayout, TokenSet
from .bidirectional import real_patches, received
from .inside import Inside, by_unit
from .rows import ImageRows
from .shapes import Grid, Packed, Units, of_units


@dataclass
class Encoding:
    """What the vision side computed of one batch of images, and what the method decided about them.

    ``units``: what the tower encoded by itself, N of them with up to W tokens each; ``smaller``: what it was given in
    their place, where a method made images smaller. ``pixels``: what entered the tower, where images are of one size;
    ``grids``: frames and patches (N, 3) where they differ in shape, those of a run ``before`` included, of images in
    front of videos; ``is_joined``: made of both. ``cls``: the CLS feature (N, Dv), and ``cls_of`` the blocks whose
    outputs are used. ``real``: bool (N, patches), which patches the tower does not take for padding; None: all.
    ``blocks``: query, key and scaling of the tower blocks that the method reads, by its names of them; ``chunks``: the
    same in a tower that has all units in one sequence, piece by piece. ``received``: attention (N, patches and CLS)
    that the tokens of blocks receive, where it is shared. ``features`` (N, W, Dv) enter the projector, ``projected``
    (N, W, D) leave it. ``macs``: multiply-adds that were spent on scoring each unit, int (N,); ``padding_macs``: on
    what they were padded with. ``kept``: the features that were projected where others were dropped before, ``new``:
    those that were added to them; ``projected_tokens``: their number, int (N,). ``projector_input``: tokens that
    entered the projector in all. ``block_tokens``: where a method acts inside the tower, tokens of each unit (N,) at
    the attention and at the MLP of each block; ``block_places``: places that they took. ``inside``: what is left there,
    one for each shape of unit; ``form``: how that lies in the tower's tensors. ``block_pairs``: query-key pairs of each
    unit in the attention of each block, empty where all of its tokens attend to all. ``host_syncs``: how often the
    method read numbers there.
    """

    vision: VisionGeometry
    units: Units
    pixels: Tensor | None = None
    grids: Tensor | None = None
    smaller: Units | None = None
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
    block_places: list[tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    block_pairs: list[tuple[int, ...]] = field(default_factory=list)
    inside: list[Inside] = field(default_factory=list)
    form: Any = None
    padding_macs: int = 0
    macs: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.macs = np.zeros(len(self.units.grids), np.int64)

    @property
    def is_shrunk(self) -> bool:
        """Whether the tower put out fewer features than the prompt has tokens, or in a full grid fewer that count."""
        return self.smaller is not None or any(inside.is_cut for inside in self.inside)

    @property
    def has_new(self) -> bool:
        """Whether those that it put out stand for no token of the prompt in particular."""
        kept = self.vision.merged == 1 and any(inside.patches is not None for inside in self.inside)
        return self.is_shrunk and not kept

    @property
    def inside_counts(self) -> tuple[int, ...]:
        """Of each unit, how many tokens the tower has left, CLS among them, where a method acts in it."""
        return by_unit(self.inside, [inside.counts for inside in self.inside])

    @property
    def tokens_left(self) -> tuple[int, ...]:
        """Of each unit, how many tokens are made of the patches that it has left there."""
        return by_unit(self.inside, [inside.tokens_left for inside in self.inside])

    @property
    def new_tokens(self) -> tuple[int, ...]:
        """The same, but none of units that lost nothing."""
        left = [inside.tokens_left if inside.is_cut else (0,) * len(inside.counts) for inside in self.inside]
        return by_unit(self.inside, left)

    def read(self, values: Tensor) -> list:
        """``values`` on the host, which waits for the device, while the tower runs; counted."""
        self.host_syncs += 1
        return values.tolist()

    def rows(self, layout: TokenLayout) -> ImageRows:
        """Where the units stand in the rows of a prompt."""
        return ImageRows(layout, self.units.images, self.units.width)

    def scored(self, macs: int | tuple[int, ...], units: Sequence[int]) -> None:
        """Multiply-adds were spent on scoring each of some ``units``, by number: an int, or one each where they differ.

        What units of fewer are padded with is counted besides.
        """
        # A tracer's sizes are tensors.
        more = np.array([int(work) for work in (macs if isinstance(macs, tuple) else (macs,) * len(units))])
        self.macs[list(units)] += more
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


def _squares(grid: Grid, side: int) -> NDArray[np.int64]:
    """Patches, row by row, that squares of ``side`` make one of each token of a ``grid``."""
    frames, rows, columns = grid
    patches = np.arange(prod(grid) * side**2).reshape(frames, rows, side, columns, side)
    return patches.transpose(0, 1, 3, 2, 4).reshape(-1, side**2)
