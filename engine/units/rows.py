"""Where the images of a batch land in its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError, VisibenchError
from ..decisions import Merge
from ..layout import TokenLayout
from .shapes import ANCHOR, ImageShape, Numbers, Packed, Units, on_device


class ImageRows:
    """Where ``images`` (in row-major order), of N units and W features in each, stand in the rows (B, V).

    In beam search each row of the prompt, with its images, is repeated after the images were encoded.
    ``of_row``: for each row its units, by number. ``source``: int (B, V), for each visual token the feature, of all
    N · W, that it is, :data:`ANCHOR` for none.
    """

    def __init__(self, layout: TokenLayout, images: Sequence[Packed], width: int) -> None:
        self.width, self._device, visual = width, layout.device, layout.visual_counts
        self._anchored = not all(image.is_feature.all() for image in images)
        lengths = [len(image.source) for image in images]
        beams, rest = divmod(sum(visual), max(sum(lengths), 1))
        self._wrong = InputError(f"images of {lengths} tokens do not fill rows of {[*visual]} visual tokens")
        if rest or not beams:
            raise self._wrong
        self._source = np.full((len(visual), max(visual)), ANCHOR)
        self._images: list[tuple[int, Packed]] = []
        self.of_row: list[list[int]] = []
        self._images_of_row: list[range] = []
        ends: list[int] = []
        number = self.units = 0
        for row in range(0, len(visual), beams):
            filled, first, image_before = 0, self.units, number
            while filled < visual[row]:
                if number == len(images) or filled + lengths[number] > visual[row]:
                    raise self._wrong
                image, end = images[number], filled + lengths[number]
                self._source[row : row + beams, filled:end] = image.moved(self.units * width)
                self._images.append((self.units * width, image))
                ends += [end - 1] * image.units
                self.units, filled, number = self.units + image.units, end, number + 1
            if {*visual[row : row + beams]} != {filled}:
                raise self._wrong
            self.of_row += [[*range(first, self.units)]] * beams
            self._images_of_row += [range(image_before, number)] * beams
        self._ends, self._tiled = np.array(ends, np.int64), any(image.units > 1 for image in images)

    def shapes(self, units: Units) -> tuple[tuple[ImageShape, ...], ...]:
        """The images of each row, made of ``units``."""
        return tuple(tuple(units.shapes[image] for image in images) for images in self._images_of_row)

    @cached_property
    def source(self) -> Tensor:
        return on_device(self._source, self._device)

    @cached_property
    def columns(self) -> Tensor:
        """Int (N, W): where each feature stands among the visual tokens of its row; padding has the place before it."""
        return on_device(self._columns, self._device)

    @cached_property
    def _columns(self) -> Numbers:
        found = np.full(self.units * self.width, -1)
        there = self._source != ANCHOR
        found[self._source[there]] = np.broadcast_to(np.arange(self._source.shape[1]), there.shape)[there]
        for first, image in self._images:
            place = image.padded + first
            found[place] = np.maximum.accumulate(found[place]).clip(min=0)
        return found.reshape(self.units, self.width)

    @cached_property
    def _are_units(self) -> bool:
        """Whether each row is one unit, all of it and in order, so that nothing moves from the one to the other."""
        source = self._source
        return source.shape == (self.units, self.width) and bool((source.ravel() == np.arange(source.size)).all())

    def sum(self, values: Numbers) -> Numbers:
        """Sums (B,) of values (N,) over the units of each row."""
        return np.array([values[own].sum() for own in self.of_row], np.int64)

    def group(self, values: Tensor) -> Tensor:
        """(N, K, …) → (B, M·K, …), zero where a row has fewer units than that with the most, M."""
        if self._are_units:
            return values
        rows, most = len(self.of_row), max(map(len, self.of_row))
        places = [row * most + place for row, own in enumerate(self.of_row) for place in range(len(own))]
        sources = [unit for own in self.of_row for unit in own]
        out = values.new_zeros(rows * most, *values.shape[1:])
        out[torch.tensor(places, device=values.device)] = values[torch.tensor(sources, device=values.device)]
        return out.reshape(rows, most * values.shape[1], *values.shape[2:])

    def tokens(self, values: Tensor) -> Tensor:
        """(N, W, …) → (B, V, …); of anchors and absent ones something or other."""
        return values if self._are_units else values.flatten(0, 1)[self.source.clamp(min=0)]

    def features(self, tokens: Tensor) -> Tensor:
        """(B, V, …) → (N, W, …), of the first row in beam search; of features that no token is something or other."""
        if self._are_units:
            return tokens
        rows = {unit: row for row in reversed(range(len(self.of_row))) for unit in self.of_row[row]}
        row = on_device(np.array([[rows[unit]] for unit in range(self.units)]), self._device)
        return tokens[row, self.columns]

    def translate(
        self, merge: Merge, contents: Tensor, *, anchors_stay: bool = True, padding: Tensor | None = None
    ) -> Merge:
        """A decision over units (N, W) as one over rows (B, V), whose visual tokens are ``contents`` (B, V, D).

        ``padding``: contents (N, W, D) of all features, if those that no token is may become new ones.
        """
        mask, order, counts = self.tokens(merge.mask), merge.order, merge.counts if self._are_units else None
        replaced = None if merge.replaced is None else self.tokens(merge.replaced)
        if self._anchored:
            anchors = self.source == ANCHOR
            mask = mask | anchors if anchors_stay else mask & ~anchors
            replaced = (
                None if replaced is None else torch.where(anchors[..., None], contents.to(replaced.dtype), replaced)
            )
        if order is not None:
            order = self._order(order, mask)
        new = []
        if padding is not None:
            new = self._padding(merge.mask, padding if merge.replaced is None else merge.replaced)
        if merge.added is not None:
            new.append((self.group(merge.added), self.group(merge.added_mask()), *self._anchors(merge)))
        if not new:
            return Merge(mask, replaced, order=order, counts=counts)
        added, there, anchors, ranks = (torch.cat(parts, dim=1) for parts in zip(*new, strict=True))
        places = None if merge.added_positions is None else self.group(merge.added_positions)
        if self._tiled and merge.added is not None:
            first = ranks.argsort(dim=1, stable=True)
            added, there, anchors = (_at(part, first) for part in (added, there, anchors))
            places = None if places is None else _at(places, first)
        present = None if counts is not None and merge.added_present is None else there
        return Merge(mask, replaced, added, present, places, anchors, order, counts=counts, anchored=merge.anchored)

    def _padding(self, mask: Tensor, contents: Tensor) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Features (B, K, D) that no token of the rows is, which of them ``mask`` (N, W) keeps, and where they go.

        Last their rank among new tokens that go to the same place. An empty list if there are none.
        """
        spare = {}
        for first, image in self._images:
            unused = np.setdiff1d(image.padded, image.source)
            spare[first // self.width] = image.padded[np.isin(image.padded, unused)] + first
        none = np.empty(0, np.int64)
        rows = [np.concatenate([none, *(spare[unit] for unit in own if unit in spare)]) for own in self.of_row]
        if not any(map(len, rows)):
            return []
        ids = np.full((len(rows), max(map(len, rows))), -1)
        for row, own in enumerate(rows):
            ids[row, : len(own)] = own
        anchors = on_device(self._columns.flatten()[ids.clip(min=0)], self._device)
        index = on_device(ids, self._device)
        flat = index.clamp(min=0)
        there = mask.flatten()[flat] & (index >= 0)
        return [(contents.flatten(0, 1)[flat], there, anchors, torch.ones_like(anchors))]

    def _order(self, order: Tensor, mask: Tensor) -> Tensor:
        """Int (B, V): places among all tokens of the row, from those in each unit, which comes as a whole."""
        within = order.argsort(dim=1, stable=True).argsort(dim=1)
        order = self.tokens(within + torch.arange(self.units, device=order.device)[:, None] * self.width)
        if not self._anchored:
            return order
        # Anchors keep their places.
        anchors = self.source == ANCHOR
        moves, column = mask & ~anchors, torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
        by_place = (~moves).to(torch.int8).argsort(dim=1, stable=True)
        by_order = order.masked_fill(~moves, torch.iinfo(order.dtype).max).argsort(dim=1, stable=True)
        return torch.where(anchors, column, torch.empty_like(order).scatter(1, by_order, by_place))

    def _anchors(self, merge: Merge) -> tuple[Tensor, Tensor]:
        """Int (B, M·added): for each added token the visual token of the row behind which it goes, and its rank there.

        First those that stand by a token, then padding, and those behind the whole image at last.
        """
        assert merge.added is not None
        places = merge.anchors
        if places is None:
            places = torch.full(merge.added.shape[:2], self.width - 1, device=merge.added.device)
        columns = self.columns.gather(1, torch.where(places < 0, -1 - places, places).clamp(max=self.width - 1))
        columns, behind = torch.where(places < 0, -1 - columns, columns), places - self.width
        if not self._tiled:
            return self.group(columns), self.group(torch.zeros_like(behind))
        columns = torch.where(behind < 0, columns, on_device(self._ends, columns)[:, None])
        return self.group(columns), self.group(torch.where(behind < 0, 0, behind + 2))


def _at(values: Tensor, index: Tensor) -> Tensor:
    """Values (B, n, …) in another order, int (B, n)."""
    return values.take_along_dim(index.view(*index.shape, *[1] * (values.ndim - 2)), dim=1)


Pixels = tuple[Tensor, Callable[[], ImageRows]]


class RowHashes:
    """Hash, int (B,), of each row's raw inputs (ids and pixels, or embeddings), made when first asked for.

    ``pixels``: those of all units, (N, …), and where these stand. Integer sums, alike in any batch. :meth:`close` lets
    go of the inputs.
    """

    def __init__(
        self,
        layout: TokenLayout,
        ids: Tensor | None,
        embeddings: Tensor | None,
        pixels: Pixels | None,
    ) -> None:
        self._layout = layout
        self._inputs: tuple[Tensor | None, Tensor | None, Pixels | None] | None = (ids, embeddings, pixels)
        self._hashes: Tensor | None = None

    def __call__(self) -> Tensor:
        if self._hashes is None:
            if self._inputs is None:
                raise VisibenchError("a layout's fingerprint can be read during the prefill alone")
            self._hashes = self._compute(*self._inputs)
        return self._hashes

    def close(self) -> None:
        """The prefill is over."""
        self._inputs = None

    def _compute(self, ids: Tensor | None, embeddings: Tensor | None, pixels: Pixels | None) -> Tensor:
        layout = self._layout
        if ids is None:
            assert embeddings is not None
            known = embeddings[:, : layout.width].masked_fill(~layout.valid[..., None], 0)
            return _hash(known.flip(1))
        hashes = (ids[:, : layout.width] * layout.valid).sum(1)
        if pixels is None or not any(layout.visual_counts):
            return hashes
        images, rows = pixels
        return hashes + rows().group(_hash(images)[:, None]).sum(1)


def _hash(values: Tensor) -> Tensor:
    bits = (values.detach().double() * 2**20).long().flatten(1)
    weights = torch.arange(bits.shape[1], device=bits.device) * 2654435761 % 4294967291
    return (bits * weights).sum(1)
