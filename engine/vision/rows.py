"""Where the images of a batch land in its rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import InputError, VisibenchError
from ..decisions import Merge
from ..layout import TokenLayout


class ImageRows:
    """Where the ``images`` (N, in row-major order) stand in the rows (B, with up to M images each).

    In beam search each row of the prompt, with its images, is repeated after the images were encoded.
    """

    def __init__(self, layout: TokenLayout, patches: int, images: int) -> None:
        visual = layout.visual_counts
        if any(count % patches for count in visual) or not images or sum(visual) // patches % images:
            raise InputError(f"{images} images of {patches} patches do not fill rows of {visual} visual tokens")
        self.counts = [count // patches for count in visual]
        self.most, self.patches = max(self.counts), patches
        beams = sum(self.counts) // images
        if any(len(set(self.counts[row : row + beams])) > 1 for row in range(0, len(self.counts), beams)):
            raise InputError(f"{images} images of {patches} patches do not fill rows of {visual} visual tokens")
        sources: list[int] = []
        places: list[int] = []
        first = 0
        for row, count in enumerate(self.counts):
            sources += range(first, first + count)
            places += range(row * self.most, row * self.most + count)
            first += count if (row + 1) % beams == 0 else 0
        self.sources = torch.tensor(sources, device=layout.device)
        self.places = torch.tensor(places, device=layout.device)

    def group(self, images: Tensor) -> Tensor:
        """(N, K, …) → (B, M·K, …), zero where a row has fewer than M images."""
        rows = len(self.counts)
        out = images.new_zeros(rows * self.most, *images.shape[1:])
        out[self.places] = images[self.sources]
        return out.reshape(rows, self.most * images.shape[1], *images.shape[2:])

    def translate(self, merge: Merge) -> Merge:
        """A decision over images (N, P) as one over rows (B, V)."""
        return Merge(
            self.group(merge.mask),
            None if merge.replaced is None else self.group(merge.replaced),
            None if merge.added is None else self.group(merge.added),
            None if merge.added is None else self.group(merge.added_mask()),
            None if merge.added_positions is None else self.group(merge.added_positions),
            None if merge.added is None else self._anchors(merge),
            None if merge.order is None else self._order(merge.order),
        )

    def _order(self, order: Tensor) -> Tensor:
        """Int (B, M·P): places among all images of the row, each of which comes as a whole, from those within each."""
        within = order.argsort(dim=1, stable=True).argsort(dim=1)
        first = torch.arange(self.most, device=order.device) * self.patches
        return self.group(within) + first.repeat_interleave(self.patches)

    def _anchors(self, merge: Merge) -> Tensor:
        """Int (B, M·added): for each added token the visual token of the row behind which it goes."""
        assert merge.added is not None
        anchors = merge.anchors
        if anchors is None:
            anchors = torch.full(merge.added.shape[:2], self.patches - 1, device=self.places.device)
        anchors = self.group(anchors)
        first = (torch.arange(self.most, device=self.places.device) * self.patches).repeat_interleave(
            merge.added.shape[1]
        )
        return torch.where(anchors < 0, anchors - first, anchors + first)


class RowHashes:
    """Hash, int (B,), of each row's raw inputs (ids and pixels, or embeddings), made when first asked for.

    Integer sums, alike in any batch. :meth:`close` lets go of the inputs.
    """

    def __init__(
        self, layout: TokenLayout, ids: Tensor | None, embeddings: Tensor | None, pixels: Tensor | None, patches: int
    ) -> None:
        self._layout, self._patches = layout, patches
        self._inputs: tuple[Tensor | None, Tensor | None, Tensor | None] | None = (ids, embeddings, pixels)
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

    def _compute(self, ids: Tensor | None, embeddings: Tensor | None, pixels: Tensor | None) -> Tensor:
        layout = self._layout
        if ids is None:
            assert embeddings is not None
            known = embeddings[:, : layout.width].masked_fill(~layout.valid[..., None], 0)
            return _hash(known.flip(1))
        hashes = (ids[:, : layout.width] * layout.valid).sum(1)
        if pixels is None or not any(layout.visual_counts):
            return hashes
        return hashes + ImageRows(layout, self._patches, pixels.shape[0]).group(_hash(pixels)[:, None]).sum(1)


def _hash(values: Tensor) -> Tensor:
    bits = (values.detach().double() * 2**20).long().flatten(1)
    weights = torch.arange(bits.shape[1], device=bits.device) * 2654435761 % 4294967291
    return (bits * weights).sum(1)
