"""Units: what the vision tower encodes by itself (an image, or a tile of one), and which token each feature becomes.

N units, W tokens in the largest. What fewer have is filled up at the end with zeros, which nobody reads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..decisions import Merge
from ..layout import TokenSet

ANCHOR = -1
"""In place of a feature: a token that is none, such as a newline."""

MIXED = -2
"""In place of a feature: a token that is a mixture of several."""

MIXTURE = (
    "{} asks which feature of the vision tower each token is, and this model interpolates the features of an image of "
    "so many tiles and of videos: give it smaller images, or choose divprune or a method that acts in the decoder"
)

Grid = tuple[int, int, int]
"""Frames, rows and columns of tokens."""

Numbers = NDArray[np.int64]
"""On the host, where reading them waits for nobody."""


@dataclass(frozen=True)
class ImageShape:
    """An image in a prompt: frames, rows and columns of tokens of each of its ``units``, itself or tiles of it.

    ``loose`` of its tokens are part of none, such as newlines. ``padded``: the units with padding that the model leaves
    out of the prompt; empty where there is none.
    """

    units: tuple[Grid, ...]
    loose: int = 0
    padded: tuple[Grid, ...] = ()


def on_device(numbers: NDArray[Any], like: Tensor | torch.device) -> Tensor:
    """The same as a tensor, on the device of ``like``."""
    return torch.from_numpy(np.ascontiguousarray(numbers)).to(like.device if isinstance(like, Tensor) else like)


@dataclass(frozen=True)
class Packed:
    """One image as the prompt has it: for each of its tokens, int (n,), the feature that it is.

    Features count through all ``units`` of the image, W of each; :data:`ANCHOR` is none of them, :data:`MIXED` made of
    several. ``padded``: the same without anchors, but with all features in their order that the model leaves out of the
    prompt.
    """

    source: Numbers
    units: int
    padded: Numbers

    @classmethod
    def whole(cls, tokens: int) -> Packed:
        """One unit, all of it."""
        return cls(np.arange(tokens), 1, np.arange(tokens))

    @property
    def is_feature(self) -> NDArray[np.bool_]:
        """Bool (n,): which tokens are one, or made of several."""
        return self.source != ANCHOR

    @property
    def is_mixed(self) -> bool:
        """Whether some tokens are made of several features."""
        return bool((self.source == MIXED).any())

    def moved(self, first: int) -> Numbers:
        """``source`` where ``first`` features stand before those of the image."""
        return np.where(self.source >= 0, self.source + first, self.source)


@dataclass(frozen=True)
class Group:
    """Some ``units``, by number, that show a method P tokens each, on one ``grid``.

    ``index``: int (n, P), which tokens of a unit these are; None: its first P, all that it has.
    """

    grid: Grid
    units: tuple[int, ...]
    index: Numbers | None = None

    @property
    def tokens(self) -> int:
        """P."""
        return prod(self.grid)

    def pick(self, values: Tensor) -> Tensor:
        """Of values (N, W, …) those that are shown, (n, P, …)."""
        mine = of_units(values, self.units)
        if self.index is None:
            return mine if mine.shape[1] == self.tokens else mine[:, : self.tokens]
        index = self._index(values).view(*self.index.shape, *[1] * (mine.ndim - 2))
        return mine.gather(1, index.expand(*self.index.shape, *mine.shape[2:]))

    def place(self, new: Tensor, onto: Tensor) -> None:
        """Put ``new`` (n, P, …) into values (N, W, …), where they came from."""
        onto[torch.tensor(self.units, device=onto.device)[:, None], self._index(onto)] = new.to(onto.dtype)

    def column(self, place: Tensor, width: int) -> Tensor:
        """Of int (n, K), places among the P tokens, those in the unit of ``width``.

        -1 - j stands in front of j, and what is behind all P is behind all of them there, too.
        """
        behind, front = place - self.tokens, place < 0
        if self.index is not None:
            found = self._index(place).gather(1, torch.where(front, -1 - place, place).clamp(max=self.tokens - 1))
            place = torch.where(front, -1 - found, found)
        return torch.where(behind < 0, place, behind + width)

    def _index(self, like: Tensor) -> Tensor:
        if self.index is None:
            return torch.arange(self.tokens, device=like.device).expand(len(self.units), -1)
        return on_device(self.index, like)


def of_units(values: Tensor, units: Sequence[int]) -> Tensor:
    """Of values (all units, …) those of some ``units``, by number, which rise."""
    return values if len(units) == len(values) else values[torch.tensor(units, device=values.device)]


@dataclass(frozen=True)
class Units:
    """The units of one run of the tower, in its order: ``grids`` of their tokens, and the ``images`` made of them.

    ``order``: int (T,), where tokens of all units, counted row by row and unit by unit, lie in the one sequence (T, …)
    that enters the projector; None: they lie there as they are, (N, W, …).
    """

    grids: tuple[Grid, ...]
    images: tuple[Packed, ...]
    order: Numbers | None = None

    @cached_property
    def width(self) -> int:
        """W."""
        return max(map(prod, self.grids))

    @cached_property
    def squares(self) -> tuple[Numbers, ...]:
        """Where the tokens of each unit, row by row, lie in the one sequence."""
        assert self.order is not None
        ends = np.cumsum([prod(grid) for grid in self.grids])
        return tuple(np.split(self.order, ends[:-1]))

    @cached_property
    def whole(self) -> tuple[Group, ...]:
        """Units of one grid together, with all tokens that they have."""
        members: dict[Grid, list[int]] = defaultdict(list)
        for number, grid in enumerate(self.grids):
            members[grid].append(number)
        return tuple(Group(grid, tuple(numbers)) for grid, numbers in members.items())

    @cached_property
    def shapes(self) -> tuple[ImageShape, ...]:
        """Each of the images. What is a mixture of features counts as a unit of its own."""
        shown = {unit: group.grid for group in self.groups() for unit in group.units}
        shapes, first = [], 0
        for image in self.images:
            numbers = range(first, first + image.units)
            first += image.units
            units = tuple(shown[unit] for unit in numbers if unit in shown)
            mixed, loose = (int((image.source == kind).sum()) for kind in (MIXED, ANCHOR))
            if mixed:
                units = (*units, (1, 1, mixed))
            whole = tuple(self.grids[unit] for unit in numbers)
            shapes.append(ImageShape(units, loose, () if units == whole else whole))
        return tuple(shapes)

    def groups(self, *, unpad: bool = True) -> tuple[Group, ...]:
        """Units of one shape together. ``unpad``: tokens that no image of the prompt has are left out of theirs."""
        if not unpad:
            return self.whole
        used, first = np.zeros(len(self.grids) * self.width, bool), 0
        for image in self.images:
            used[image.moved(first)[image.source >= 0]] = True
            first += image.units * self.width
        members: dict[tuple[Grid, Grid], list[tuple[int, Numbers | None]]] = defaultdict(list)
        for number, (grid, mine) in enumerate(zip(self.grids, used.reshape(-1, self.width), strict=True)):
            shown, index = _shown(grid, mine[: prod(grid)])
            if prod(shown):
                members[grid, shown].append((number, index))
        return tuple(_group(shown, mine) for (_, shown), mine in members.items())

    def spread(self, features: Tensor) -> Tensor:
        """What enters the projector, as (N, W, …)."""
        if self.order is None:
            return features
        rows = features[on_device(self.order, features)]
        spread = features.new_zeros(len(self.grids) * self.width, features.shape[1])
        return spread.index_copy_(0, self._there(features), rows).unflatten(0, (-1, self.width))

    def gathered(self, spread: Tensor) -> Tensor:
        """(N, W, …) as what leaves the projector."""
        if self.order is None:
            return spread
        rows = spread.flatten(0, 1)[self._there(spread)]
        return torch.empty_like(rows).index_copy_(0, on_device(self.order, spread), rows)

    def _there(self, like: Tensor) -> Tensor:
        """Int (T,): which of the N · W places hold a token."""
        places = [np.arange(prod(grid)) + unit * self.width for unit, grid in enumerate(self.grids)]
        return on_device(np.concatenate(places), like)

    def narrowed(self, features: Tensor, merge: Merge, kept: TokenSet, new: TokenSet | None) -> Tensor:
        """Of ``features`` (N, W, D) what is left to project: those ``kept``, and ``new`` ones of those that are added.

        In one sequence where units have different numbers of them, so that nothing is projected in vain.
        """
        contents = features if merge.replaced is None else merge.replaced
        if self._even(kept, new):
            left = kept.pick(contents, 1)
            return left if merge.added is None else torch.cat([left, merge.added.to(left.dtype)], dim=1)
        left = _together(kept).pick(contents.flatten(0, 1)[None], 1)[0]
        if merge.added is None or new is None:
            return left
        return torch.cat([left, _together(new).pick(merge.added.flatten(0, 1)[None], 1)[0].to(left.dtype)])

    def widened(self, output: Tensor, kept: TokenSet, new: TokenSet | None) -> tuple[Tensor, Tensor | None]:
        """What was projected of :meth:`narrowed`, at its places (N, W, D) among zeros, and the new ones (N, M, D)."""
        places = output.new_zeros(len(self.grids), self.width, output.shape[-1])
        if self._even(kept, new) or output.ndim == 3:
            count = kept.index.shape[1]
            return kept.place(output[:, :count], places, dim=1), output[:, count:] if output.shape[1] > count else None
        count = sum(kept.counts)
        flat = _together(kept).place(output[None, :count], places.flatten(0, 1)[None], dim=1)
        if new is None:
            return flat[0].view_as(places), None
        empty = output.new_zeros(1, new.mask.numel(), output.shape[-1])
        added = _together(new).place(output[None, count:], empty, dim=1)[0]
        return flat[0].view_as(places), added.unflatten(0, new.mask.shape)

    def _even(self, kept: TokenSet, new: TokenSet | None) -> bool:
        """Whether all units have as many tokens, each as a row of its own."""
        return self.order is None and len({*kept.counts}) == 1 and (new is None or min(new.counts) == new.mask.shape[1])


def _together(tokens: TokenSet) -> TokenSet:
    """A set over (N, W) as one over (1, N · W)."""
    return TokenSet(tokens.mask.flatten()[None], (sum(tokens.counts),))


def _shown(grid: Grid, used: NDArray[np.bool_]) -> tuple[Grid, Numbers | None]:
    """The part of a unit, a rectangle, whose tokens are ``used``, bool (P,): its grid and its tokens; None: all."""
    if used.all():
        return grid, None
    cells = used.reshape(grid)
    rows, columns = cells.any((0, 2)), cells.any((0, 1))
    index = np.arange(len(used)).reshape(grid)[:, rows][:, :, columns]
    return (grid[0], int(rows.sum()), int(columns.sum())), index.flatten()


def _group(grid: Grid, members: Sequence[tuple[int, Numbers | None]]) -> Group:
    indexes = [index for _, index in members if index is not None]
    return Group(grid, tuple(number for number, _ in members), np.stack(indexes) if indexes else None)


def decided(
    units: int, width: int, groups: Sequence[Group], ask: Callable[[Group], tuple[Tensor, Merge | None]]
) -> Merge | None:
    """One decision about all ``units`` (N, W), from one about each group; None if there is none.

    ``ask`` returns the group's contents (n, P, D), and the decision about them.
    """
    answers = [(group, *ask(group)) for group in groups]
    merges = [merge for _, _, merge in answers if merge is not None]
    if not merges:
        return None
    if len(groups) == 1 and groups[0].index is None and (len(groups[0].units), groups[0].tokens) == (units, width):
        return merges[0]
    contents = answers[0][1]
    mask = contents.new_zeros(units, width, dtype=torch.bool)
    replaced = (
        None if all(merge.replaced is None for merge in merges) else contents.new_zeros(units, width, contents.shape[2])
    )
    order = None if all(merge.order is None for merge in merges) else mask.long()
    for group, own, merge in answers:
        group.place(mask.new_ones(own.shape[:2]) if merge is None else merge.mask, mask)
        if replaced is not None:
            group.place(own if merge is None or merge.replaced is None else merge.replaced, replaced)
        if order is not None:
            places = torch.arange(group.tokens, device=order.device).expand(own.shape[:2])
            group.place(places if merge is None or merge.order is None else merge.order, order)
    new = _added(units, width, [(group, merge) for group, _, merge in answers if merge])
    return Merge(mask, replaced, *new, order=order)


def _added(
    units: int, width: int, answers: Sequence[tuple[Group, Merge]]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """New tokens (N, M, D) of all units, which of them exist, no positions, and where they go."""
    news = [(group, merge, merge.added) for group, merge in answers if merge.added is not None]
    most = max((new.shape[1] for _, _, new in news), default=0)
    if not most:
        return None, None, None, None
    like = news[0][2]
    added, there = like.new_zeros(units, most, like.shape[2]), like.new_zeros(units, most, dtype=torch.bool)
    anchors = there.long()
    for group, merge, new in news:
        where, count = torch.tensor(group.units, device=new.device), new.shape[1]
        places = merge.anchors
        if places is None:
            places = torch.full(new.shape[:2], group.tokens - 1, device=new.device)
        added[where, :count] = new
        there[where, :count] = merge.added_mask()
        anchors[where, :count] = group.column(places, width)
    return added, there, None, anchors
