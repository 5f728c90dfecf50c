"""Roles and positions of the tokens in a batch, and what a cut does to them.

Rows are left padded: the last column is every row's last token through every cut. How many tokens a row holds is known
on the host; which ones, only on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError

PAD, PREFIX, VISUAL, TEXT, ADDED = 0, 1, 2, 3, -2
Facts = tuple[Tensor, Tensor]
Made = Tensor | Callable[[], Tensor]
Span = tuple[int, int] | None


class TokenSet:
    """Some tokens of each row: bool ``mask`` (B, L), or a function that makes it, and ``counts``, on the host.

    ``span``: the first place and the one behind the last, where all rows have these tokens in the same run of places;
    then they are reached as a slice, and no index is made.
    """

    def __init__(self, mask: Made, counts: tuple[int, ...], span: Span = None, device: Any = None) -> None:
        self._mask, self.counts, self.span, self._device = mask, counts, span, device
        self.sizes = len(counts), max(counts)  # (B, n)
        # What of other sets its tokens see, by the other's id: made once, in engine/attention.
        self.rules: dict[int, tuple[TokenSet, Tensor]] = {}

    @cached_property
    def mask(self) -> Tensor:
        """Bool (B, L)."""
        return self._mask if isinstance(self._mask, Tensor) else self._mask()

    @property
    def device(self) -> torch.device:
        return self.mask.device if self._device is None else self._device

    @property
    def is_even(self) -> bool:
        """Whether every row has as many."""
        return min(self.counts) == max(self.counts)

    @cached_property
    def index(self) -> Tensor:
        """Int (B, n): columns of the tokens in order, n the most over the rows; meaningless past a row's count."""
        if self.span is not None:
            return torch.arange(*self.span, device=self.device).expand(len(self.counts), -1)
        return self.mask.sort(dim=1, descending=True, stable=True)[1][:, : max(self.counts)]

    @cached_property
    def present(self) -> Tensor:
        """Bool (B, n): which entries of :attr:`index` count."""
        if self.is_even:
            return torch.ones(self.sizes, dtype=torch.bool, device=self.device)
        return torch.arange(self.sizes[1], device=self.device) < self.device_counts[:, None]

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
        if min(self.counts) == tokens.shape[dim]:
            return tokens
        if self.span is not None:
            return tokens.narrow(dim, self.span[0], self.counts[0])
        shape = [1] * tokens.ndim
        shape[0], shape[dim] = self.index.shape
        return tokens.take_along_dim(self.index.view(shape), dim)

    def place(self, new: Tensor, onto: Tensor, dim: int) -> Tensor:
        """A copy of ``onto`` with the entries of this set along ``dim`` taken from ``new`` (length n there)."""
        if self.span is not None:
            return onto.slice_scatter(new.to(onto.dtype), dim, *self.span)
        width = onto.shape[dim]
        shape = [1] * onto.ndim
        shape[0], shape[dim] = self.index.shape
        if self.is_even:
            return onto.scatter(dim, self.index.view(shape).expand_as(new), new.to(onto.dtype))
        # Entries past a row's count land in one surplus column.
        index = self.index.masked_fill(~self.present, width)
        surplus = torch.cat([onto, onto.narrow(dim, 0, 1)], dim=dim)
        return surplus.scatter(dim, index.view(shape).expand_as(new), new.to(onto.dtype)).narrow(dim, 0, width)

    def nth(self, number: int) -> TokenSet:
        """Of each row the token of this ``number``, or its last one where there are not as many."""

        def mask() -> Tensor:
            chosen = self.index.gather(1, self.device_counts.sub(1).clamp(0, number)[:, None])
            return torch.zeros_like(self.mask).scatter_(1, chosen, 1) & self.mask

        place = self.span and min(self.span[0] + number, self.span[1] - 1)
        span = None if place is None else (place, place + 1)
        return TokenSet(mask, tuple(min(count, 1) for count in self.counts), span, self._device)

    def last_of(self, tokens: Tensor, times: int) -> Tensor:
        """(B, ``times``, …): of ``tokens`` (B, L, …) the last one of this set in each row, repeated."""
        if self.span is not None:
            last = tokens[:, self.span[1] - 1 : self.span[1]]
        else:
            column = self.index.gather(1, (self.device_counts[:, None] - 1).clamp(min=0))
            last = tokens.take_along_dim(column.view(-1, 1, *[1] * (tokens.ndim - 2)), 1)
        return last.expand(-1, times, *tokens.shape[2:])

    def union(self, mask: Tensor, added: Sequence[int]) -> TokenSet:
        """This set and the tokens of ``mask`` (B, L), of which ``added`` in each row are not in it yet."""
        return TokenSet(self.mask | mask, tuple(n + m for n, m in zip(self.counts, added, strict=True)))


@dataclass(frozen=True)
class TokenLayout:
    """What each token of a batch of ``rows`` × ``width`` is.

    ``facts`` makes :attr:`roles` and :attr:`visual_id` when they are first asked for: many layouts of a prefill are
    never looked at. ``lengths``, ``visual_counts``, ``text_counts``: valid, visual and TEXT tokens of each row, on the
    host. ``span``: the places of the visual tokens where no row is padded and all rows have them in the same run;
    None otherwise. ``images``: an ``ImageShape`` for each of each row, where known.
    """

    facts: Callable[[], Facts]
    width: int
    device: torch.device
    lengths: tuple[int, ...]
    visual_counts: tuple[int, ...]
    text_counts: tuple[int, ...]
    span: Span = None
    hash_inputs: Callable[[], Tensor] | None = None
    images: tuple[tuple[Any, ...], ...] | None = None

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
        there, visual = torch.stack([valid, is_visual]).cpu().numpy().astype(bool)  # one transfer
        if (there[:, :-1] & ~there[:, 1:]).any():
            raise InputError("rows must be left padded without gaps: set the tokenizer's padding_side to 'left'")
        visual &= there
        roles = np.full(there.shape, PREFIX, dtype=np.int8)
        roles[visual.cumsum(1) > 0] = TEXT
        roles[visual] = VISUAL
        roles[~there] = PAD

        @cache
        def facts() -> Facts:
            return torch.from_numpy(roles), torch.from_numpy(np.where(visual, visual.cumsum(1) - 1, -1))

        lengths, images, text = (tuple(mask.sum(1).tolist()) for mask in (there, visual, roles == TEXT))
        span = _run(visual) if there.all() else None
        return cls(facts, there.shape[1], torch.device("cpu"), lengths, images, text, span)

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
            facts=lambda: (self.roles.expand(rows, -1), self.visual_id.expand(rows, -1)),
            lengths=self.lengths * rows,
            visual_counts=self.visual_counts * rows,
            text_counts=self.text_counts * rows,
            images=None if self.images is None else self.images * rows,
        )

    def to(self, device: torch.device) -> TokenLayout:
        """The same layout with its tensors on ``device``."""
        moved = lambda: (self.roles.to(device), self.visual_id.to(device))  # noqa: E731
        return self if device == self.device else replace(self, facts=moved, device=device)

    @cached_property
    def _facts(self) -> Facts:
        return self.facts()

    @property
    def roles(self) -> Tensor:
        """Int (B, L) of PAD, PREFIX, VISUAL, TEXT.

        PREFIX is text before the row's first visual token, or all text of a row without image, TEXT that behind it.
        """
        return self._facts[0]

    @property
    def visual_id(self) -> Tensor:
        """Int (B, L): the index of a visual token among those of the prompt, -2 for an added one, -1 elsewhere."""
        return self._facts[1]

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def is_full(self) -> bool:
        """Whether no row is padded."""
        return min(self.lengths) == self.width

    @cached_property
    def fingerprint(self) -> Tensor:
        """Int (B,): a hash of each row's inputs, which does not depend on the rest of the batch."""
        none = torch.zeros(self.rows, dtype=torch.int64, device=self.device)
        return none if self.hash_inputs is None else self.hash_inputs()

    @cached_property
    def valid(self) -> Tensor:
        """Bool (B, L): not padded."""
        return self.roles != PAD

    @cached_property
    def visual(self) -> TokenSet:
        """The visual tokens."""
        return TokenSet(lambda: self.roles == VISUAL, self.visual_counts, self.span, self.device)

    @cached_property
    def text(self) -> TokenSet:
        """The text after the row's first visual token."""
        behind = self.span and (self.span[1], self.width)
        return TokenSet(lambda: self.roles == TEXT, self.text_counts, behind, self.device)

    @cached_property
    def nonvisual(self) -> TokenSet:
        """All text."""
        counts = tuple(n - v for n, v in zip(self.lengths, self.visual_counts, strict=True))
        return TokenSet(lambda: self.valid & (self.roles != VISUAL), counts, None, self.device)

    @cached_property
    def everything(self) -> TokenSet:
        """All valid tokens."""
        return TokenSet(lambda: self.valid, self.lengths, (0, self.width) if self.is_full else None, self.device)

    @cached_property
    def last(self) -> TokenSet:
        """The last token of each row."""
        end, one = self.width, (1,) * self.rows
        return TokenSet(lambda: self.counted[:, :end] == end - 1, one, (end - 1, end), self.device)

    @cached_property
    def counted(self) -> Tensor:
        """Int (B, n): 0, 1, 2, … in each row, n >= L. Layouts that follow by a cut share it."""
        return torch.arange(self.width, device=self.device).expand(self.rows, -1)


def _run(visual: np.ndarray) -> Span:
    """The places of tokens (B, L) of which all rows have the same unbroken run."""
    places = visual[0].nonzero()[0]
    if not len(places) or len(places) != places[-1] - places[0] + 1 or (visual != visual[:1]).any():
        return None
    return int(places[0]), int(places[-1]) + 1


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
        if len(source) == 1:
            return source.index_select(1, self._only)
        index = self.index.view(*self.index.shape, *[1] * (source.ndim - 2)).expand(-1, -1, *source.shape[2:])
        return source.gather(1, index)

    @cached_property
    def _only(self) -> Tensor:
        """Int (n,): the index where there is one row."""
        return self.index[0]


def cut_to(layout: TokenLayout, keep: Tensor, counts: tuple[int, ...]) -> Cut | None:
    """Drop all visual tokens but ``keep``, bool (B, V), of which there are ``counts``; None if nothing changes."""
    if counts == layout.visual_counts:
        return None
    if layout.span is not None and min(counts) == max(counts):
        return cut_run(layout, keep.sort(dim=1, descending=True, stable=True)[1][:, : counts[0]], counts)
    stays = layout.visual.place(keep, layout.nonvisual.mask, dim=1)
    return arranged(layout, layout.counted[:, : layout.width], stays, layout.visual_id[:, :0], counts)


def cut_run(layout: TokenLayout, kept: Tensor, counts: tuple[int, ...], added: int = 0) -> Cut:
    """Keep of the one run of visual tokens, alike in all rows, those at ``kept``, int (B, k), ascending.

    So many ``added`` ones follow them.
    """
    assert layout.span is not None
    first, behind = layout.span
    places, pad = layout.counted, torch.nn.functional.pad
    old = places.split([first, behind - first, layout.width - behind, places.shape[1] - layout.width], dim=1)
    parts = [old[0], kept + first, old[2]]
    if added:
        new = torch.arange(layout.width, layout.width + added, device=layout.device)
        parts.insert(2, new.expand(layout.rows, -1))
    index, gone = torch.cat(parts, dim=1), behind - first - counts[0] - added

    def facts() -> Facts:
        roles, ids = pad(layout.roles, (0, added), value=VISUAL), pad(layout.visual_id, (0, added), value=ADDED)
        return roles.gather(1, index), ids.gather(1, index)

    left = replace(
        layout,
        facts=facts,
        width=layout.width - gone,
        lengths=tuple(length - gone for length in layout.lengths),
        visual_counts=tuple(count + added for count in counts),
        span=(first, behind - gone) if counts[0] + added else None,
    )
    if gone >= 0:
        vars(left)["counted"] = places
    return Cut(left, index)


def arranged(layout: TokenLayout, column: Tensor, stays: Tensor, other_id: Tensor, counts: tuple[int, ...]) -> Cut:
    """Those of L tokens and M visual others that stay, bool (B, L + M), by ``column``, ``counts`` of them visual."""
    lengths = tuple(n - old + now for n, old, now in zip(layout.lengths, layout.visual_counts, counts, strict=True))
    index = column.masked_fill(~stays, -1).argsort(dim=1, stable=True)[:, -max(lengths) :]

    def facts() -> Facts:
        padded = ~stays.gather(1, index)
        roles = torch.cat([layout.roles, torch.full_like(other_id, VISUAL, dtype=layout.roles.dtype)], dim=1)
        ids = torch.cat([layout.visual_id, other_id], dim=1)
        return roles.gather(1, index).masked_fill(padded, PAD), ids.gather(1, index).masked_fill(padded, -1)

    span = layout.span and _span_left(layout.span[0], lengths, counts)
    left = replace(layout, facts=facts, width=max(lengths), lengths=lengths, visual_counts=counts, span=span)
    return Cut(left, index)


def _span_left(first: int, lengths: tuple[int, ...], counts: tuple[int, ...]) -> Span:
    """What a cut left of a run of visual tokens from ``first`` on, where all rows have as many."""
    return (first, first + counts[0]) if len({*counts}) == len({*lengths}) == 1 and counts[0] else None
