"""Roles and positions of the tokens in a batch, and what a cut does to them.

Rows are left padded: valid tokens stand at the right, so the last column is every row's last token and stays so
through every cut. How many tokens a row holds is known on the host; which ones, only on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..errors import InputError

PAD, PREFIX, VISUAL, TEXT = range(4)
ADDED = -2


@dataclass(frozen=True)
class TokenSet:
    """Some tokens of each row: bool ``mask`` (B, L), and how many there are in each row, on the host."""

    mask: Tensor
    counts: tuple[int, ...]

    @cached_property
    def index(self) -> Tensor:
        """Int (B, n): columns of the tokens in order, n the most over the rows; meaningless past a row's count."""
        return self.mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : max(self.counts)]

    @cached_property
    def present(self) -> Tensor:
        """Bool (B, n): which entries of :attr:`index` count."""
        return torch.arange(max(self.counts), device=self.mask.device) < self.device_counts[:, None]

    @cached_property
    def host_counts(self) -> Tensor:
        """Int (B,): the counts, on the host."""
        return torch.tensor(self.counts)

    @cached_property
    def device_counts(self) -> Tensor:
        """Int (B,): the counts, on the device; summed there, since copying them to it would wait for it."""
        return self.mask.sum(1)

    def pick(self, tokens: Tensor, dim: int) -> Tensor:
        """The entries of this set along ``dim`` (length L) of a tensor whose first dimension is the batch."""
        if min(self.counts) == self.mask.shape[1]:
            return tokens
        shape = [1] * tokens.ndim
        shape[0], shape[dim] = self.index.shape
        size = list(tokens.shape)
        size[dim] = self.index.shape[1]
        return tokens.gather(dim, self.index.view(shape).expand(size))

    def place(self, new: Tensor, onto: Tensor, dim: int) -> Tensor:
        """A copy of ``onto`` with the entries of this set along ``dim`` taken from ``new`` (length n there)."""
        width = onto.shape[dim]
        shape = [1] * onto.ndim
        shape[0], shape[dim] = self.index.shape
        if min(self.counts) == max(self.counts):
            return onto.scatter(dim, self.index.view(shape).expand_as(new), new.to(onto.dtype))
        # Entries past a row's count land in one surplus column.
        index = self.index.masked_fill(~self.present, width)
        surplus = torch.cat([onto, onto.narrow(dim, 0, 1)], dim=dim)
        return surplus.scatter(dim, index.view(shape).expand_as(new), new.to(onto.dtype)).narrow(dim, 0, width)

    def union(self, mask: Tensor, added: Sequence[int]) -> TokenSet:
        """This set and the tokens of ``mask`` (B, L), of which ``added`` in each row are not in it yet."""
        return TokenSet(self.mask | mask, tuple(n + m for n, m in zip(self.counts, added, strict=True)))


@dataclass(frozen=True)
class TokenLayout:
    """What each token of a batch is.

    ``roles``: int (B, L) of PAD, PREFIX (text before the row's first visual token, or all text of a row without
    image), VISUAL, TEXT (text after the first visual token). ``visual_id``: int (B, L), the index of a visual token
    among those of the prompt, -2 for one that a merge added, -1 elsewhere. ``lengths``, ``visual_counts``,
    ``text_counts``: valid, visual and TEXT tokens of each row, on the host.
    """

    roles: Tensor
    visual_id: Tensor
    lengths: tuple[int, ...]
    visual_counts: tuple[int, ...]
    text_counts: tuple[int, ...]
    hash_inputs: Callable[[], Tensor] | None = None

    @classmethod
    def from_spans(cls, length: int, visual: Sequence[tuple[int, int]] = ()) -> TokenLayout:
        """Layout of one sequence of ``length`` tokens with visual tokens in the half-open spans ``visual``.

        Use :meth:`batch` for several rows; one row serves a whole batch of equal rows.
        """
        is_visual = torch.zeros(1, length, dtype=torch.bool)
        for start, end in visual:
            if not 0 <= start < end <= length:
                raise InputError(f"visual span ({start}, {end}) does not lie in a sequence of {length} tokens")
            if is_visual[0, start:end].any():
                raise InputError(f"visual span ({start}, {end}) overlaps another one")
            is_visual[0, start:end] = True
        return cls.from_masks(is_visual, torch.ones_like(is_visual))

    @classmethod
    def from_masks(cls, is_visual: Tensor, valid: Tensor) -> TokenLayout:
        """Layout from bool masks (B, L) of visual and of valid (not padded) tokens; rows must be left padded."""
        is_visual, valid = is_visual.cpu().bool(), valid.cpu().bool()
        if (valid[:, :-1] & ~valid[:, 1:]).any():
            raise InputError("rows must be left padded without gaps: set the tokenizer's padding_side to 'left'")
        is_visual = is_visual & valid
        seen = is_visual.cumsum(1) > 0
        roles = torch.full(valid.shape, PREFIX, dtype=torch.int8)
        roles[seen] = TEXT
        roles[is_visual] = VISUAL
        roles[~valid] = PAD
        visual_id = torch.where(is_visual, is_visual.cumsum(1) - 1, -1)
        count = lambda mask: tuple(mask.sum(1).tolist())  # noqa: E731
        return cls(roles, visual_id, count(valid), count(is_visual), count(roles == TEXT))

    @classmethod
    def batch(cls, rows: Sequence[TokenLayout]) -> TokenLayout:
        """Stack layouts of single sequences, left padded to the longest."""
        width = max(row.width for row in rows)
        pad = lambda t, value: torch.nn.functional.pad(t, (width - t.shape[1], 0), value=value)  # noqa: E731
        roles = torch.cat([pad(row.roles, PAD) for row in rows])
        return cls.from_masks(roles == VISUAL, roles != PAD)

    def expand(self, rows: int) -> TokenLayout:
        """Repeat a single row ``rows`` times; a layout of ``rows`` rows stays as it is."""
        if self.rows == rows:
            return self
        if self.rows != 1:
            raise InputError(f"the layout has {self.rows} rows, the batch {rows}")
        return replace(
            self,
            roles=self.roles.expand(rows, -1),
            visual_id=self.visual_id.expand(rows, -1),
            lengths=self.lengths * rows,
            visual_counts=self.visual_counts * rows,
            text_counts=self.text_counts * rows,
        )

    def to(self, device: torch.device) -> TokenLayout:
        """The same layout with its tensors on ``device``."""
        return replace(self, roles=self.roles.to(device), visual_id=self.visual_id.to(device))

    @property
    def rows(self) -> int:
        return self.roles.shape[0]

    @property
    def width(self) -> int:
        return self.roles.shape[1]

    @property
    def device(self) -> torch.device:
        return self.roles.device

    @property
    def is_full(self) -> bool:
        """Whether no row is padded."""
        return min(self.lengths) == self.width

    @cached_property
    def fingerprint(self) -> Tensor:
        """Int (B,): a hash of each row's inputs, which does not depend on the rest of the batch."""
        if self.hash_inputs is None:
            return torch.zeros(self.rows, dtype=torch.int64, device=self.device)
        return self.hash_inputs()

    @cached_property
    def valid(self) -> Tensor:
        """Bool (B, L): not padded."""
        return self.roles != PAD

    @cached_property
    def visual(self) -> TokenSet:
        """The visual tokens."""
        return TokenSet(self.roles == VISUAL, self.visual_counts)

    @cached_property
    def text(self) -> TokenSet:
        """The text after the row's first visual token."""
        return TokenSet(self.roles == TEXT, self.text_counts)

    @cached_property
    def nonvisual(self) -> TokenSet:
        """All text."""
        counts = tuple(n - v for n, v in zip(self.lengths, self.visual_counts, strict=True))
        return TokenSet(self.valid & (self.roles != VISUAL), counts)

    @cached_property
    def everything(self) -> TokenSet:
        """All valid tokens."""
        return TokenSet(self.valid, self.lengths)

    @cached_property
    def last(self) -> TokenSet:
        """The last token of each row."""
        is_last = torch.zeros_like(self.valid)
        is_last[:, -1] = True
        return TokenSet(is_last, (1,) * self.rows)


@dataclass(frozen=True)
class Cut:
    """The outcome of a cut: the new layout and, for every place in it, the index (B, n) of the token that fills it.

    The index counts the old tokens first and then the added ones.
    """

    layout: TokenLayout
    index: Tensor

    def gather(self, old: Tensor, added: Tensor | None = None) -> Tensor:
        """Pick from (B, L, …) and added (B, M, …) what fills the new places."""
        source = old if added is None else torch.cat([old, added.to(old.dtype)], dim=1)
        index = self.index.view(*self.index.shape, *[1] * (source.ndim - 2)).expand(-1, -1, *source.shape[2:])
        return source.gather(1, index)


def cut(
    layout: TokenLayout,
    keep: Tensor,
    added: Tensor | None = None,
    anchor: Tensor | None = None,
    order: Tensor | None = None,
) -> Cut | None:
    """Drop visual tokens and add others; None if nothing changes. One host sync: the counts.

    ``keep``: bool (B, V). ``added``: bool (B, M), the new tokens that exist; each stands right behind the token at
    ``anchor``, int (B, M) in old columns. ``order``: int (B, V), tokens that stay take each other's columns so that
    these numbers rise. Sorting by column with dropped tokens first pads on the left by itself.
    """
    keep = keep & layout.visual.present
    column = torch.arange(layout.width, device=layout.device).expand(layout.rows, -1) * 2
    if added is None or anchor is None:
        added, anchor = keep[:, :0], column[:, :0]
    column, moved = _in_order(layout, column, keep, order)
    kept, new, moves = torch.stack([keep.sum(1), added.sum(1), moved]).tolist()
    if tuple(kept) == layout.visual_counts and not any(new) and not any(moves):
        return None
    stays = torch.cat([layout.visual.place(keep, layout.nonvisual.mask, dim=1), added], dim=1)
    column = torch.cat([column, anchor * 2 + 1], dim=1)
    ids = torch.full_like(added, ADDED, dtype=layout.visual_id.dtype)
    return _arranged(layout, column, stays, ids, tuple(map(sum, zip(kept, new, strict=True))))


def join(layout: TokenLayout, column: Tensor, others: TokenSet, other_column: Tensor, other_id: Tensor) -> Cut:
    """All tokens and M visual ``others`` (B, M), of numbers ``other_id``, in the order of their columns. No host sync.

    ``column``: int (B, L) and ``other_column``: int (B, M) in the same terms.
    """
    stays = torch.cat([layout.valid, others.mask], dim=1)
    counts = tuple(map(sum, zip(layout.visual_counts, others.counts, strict=True)))
    return _arranged(layout, torch.cat([column, other_column], dim=1), stays, other_id, counts)


def _arranged(layout: TokenLayout, column: Tensor, stays: Tensor, other_id: Tensor, counts: tuple[int, ...]) -> Cut:
    """Those of L tokens and M visual others that stay, bool (B, L + M), by ``column``, ``counts`` of them visual."""
    lengths = tuple(n - old + now for n, old, now in zip(layout.lengths, layout.visual_counts, counts, strict=True))
    roles = torch.cat([layout.roles, torch.full_like(other_id, VISUAL, dtype=layout.roles.dtype)], dim=1)
    visual_id = torch.cat([layout.visual_id, other_id], dim=1)
    index = column.masked_fill(~stays, -1).argsort(dim=1, stable=True)[:, -max(lengths) :]
    is_there = stays.gather(1, index)
    left = TokenLayout(
        roles.gather(1, index).masked_fill(~is_there, PAD),
        visual_id.gather(1, index).masked_fill(~is_there, -1),
        lengths,
        counts,
        layout.text_counts,
        layout.hash_inputs,
    )
    return Cut(left, index)


def _in_order(layout: TokenLayout, column: Tensor, keep: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor]:
    """Columns (B, L) with those of the tokens that stay dealt out anew by ``order``, and int (B,): how many moved."""
    if order is None:
        return column, torch.zeros_like(column[:, 0])
    visual = layout.visual.pick(column, 1)
    by_place = (~keep).to(torch.int8).argsort(dim=1, stable=True)
    by_order = order.masked_fill(~keep, torch.iinfo(order.dtype).max).argsort(dim=1, stable=True)
    dealt = visual.scatter(1, by_order, visual.gather(1, by_place))
    return layout.visual.place(dealt, column, dim=1), ((dealt != visual) & keep).sum(1)
