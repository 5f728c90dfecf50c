"""A segment: a run of decoder layers whose inputs hold the same tokens, and whose caches held the same before.

What its layers are told (mask, rotary table, positions) is made once, and not at all while every column is there: then
the model's own is right.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..models.adapters import Adapter
from .attention import attention_mask, implementation_of
from .cache import Held
from .layout import Cut, TokenLayout, TokenSet, join


@dataclass(frozen=True)
class Aside:
    """Visual tokens held aside, A places a row, of which ``tokens`` (B, A) count.

    ``hidden``: (B, A, D), their states at the layer where they left. ``positions``: (B, A) or (B, A, 3), as the model
    gave them. ``columns``, ``visual_id``: int (B, A), as in :class:`Segment` and :class:`TokenLayout`.
    """

    tokens: TokenSet
    hidden: Tensor
    positions: Tensor
    columns: Tensor
    visual_id: Tensor


@dataclass
class Segment:
    """Layers whose inputs hold the same B rows of ``places`` new tokens.

    ``layout``: those that the method sees; None if it sees none. New tokens behind them run along unseen. ``held``:
    what the caches of these layers held before. ``columns``: int (B, places), each token's column counted from the
    first new one, -1 for none; None while every column is there. ``positions``: as the model gave them, (B, places) or
    (B, places, 3). ``valid``: bool (B, places), None: all. ``renumbered``: in the form of ``positions``, where the
    engine counts them anew.
    """

    held: Held
    layout: TokenLayout | None
    places: int
    positions: Tensor
    valid: Tensor | None = None
    columns: Tensor | None = None
    renumbered: Tensor | None = None
    _told: dict[str, Any] | None = None

    @property
    def is_whole(self) -> bool:
        """Whether every column fed so far has its place: the model's own mask is right."""
        return self.columns is None and self.held.columns is None

    def on(self, held: Held) -> Segment:
        """The same tokens in front of layers whose caches held something else."""
        return replace(self, held=held, renumbered=None, _told=None)

    def numbered(self) -> Segment:
        """With positions counted anew, behind those in the cache, unless every column is there."""
        if self.is_whole:
            return self
        if self.held.positions is not None and self.valid is None and self.places == 1:  # a step of decoding
            return replace(self, renumbered=self.held.positions[:, -1:] + 1, _told=None)
        valid, first = self.valid, self.positions[:, :1]
        if valid is None:
            count = torch.arange(1, self.places + 1, device=self.positions.device)[None]
        else:
            count = valid.cumsum(1)
            if self.held.length:
                first = at(self.positions, valid.to(torch.int8).argmax(1, keepdim=True))
        count = on_every_axis(count.expand(self.positions.shape[0], -1), self.positions)
        if self.held.positions is not None:
            first = self.held.positions[:, -1:] + 1
        elif not self.held.length:
            first = torch.zeros_like(first)
        return replace(self, renumbered=(first + count - 1).clamp(min=0), _told=None)

    @property
    def every_column(self) -> Tensor:
        """Int (B, places): each token's column, -1 for none or, while every column is there, that of padding."""
        if self.columns is not None:
            return self.columns
        return torch.arange(self.places, device=self.positions.device).expand(self.positions.shape[0], -1)

    def cut(self, change: Cut, added_positions: Tensor | None, anchors: Tensor | None) -> Segment:
        """The segment behind a cut. ``added_positions`` and ``anchors`` (places in this segment): of added tokens."""
        places = None if added_positions is None else on_every_axis(added_positions, self.positions)
        if anchors is not None and added_positions is None:
            places = at(self.positions, anchors.clamp(min=0))  # they will be numbered anew
        return self._changed(change, places, None if anchors is None else at(self.every_column, anchors.clamp(min=0)))

    def without(self, keep: Tensor, change: Cut, prompt: Tensor) -> Aside:
        """What the cut ``change``, which keeps visual tokens by ``keep`` (B, V) alone, takes out of ``prompt``."""
        assert self.layout is not None
        visual, left = self.layout.visual, change.layout.visual_counts
        leaves = visual.place(~keep & visual.present, torch.zeros_like(visual.mask), dim=1)
        gone = TokenSet(leaves, tuple(n - m for n, m in zip(visual.counts, left, strict=True)))
        prompts = (prompt, self.positions, self.every_column, self.layout.visual_id)
        return Aside(TokenSet(gone.present, gone.counts), *(at(part, gone.index) for part in prompts))

    def join(self, aside: Aside, prompt: Tensor) -> tuple[Segment, Tensor]:
        """The segment in which tokens held aside are back, and its prompt."""
        assert self.layout is not None
        here = self.every_column[:, : self.layout.width]
        change = join(self.layout, here, aside.tokens, aside.columns, aside.visual_id)
        return self._changed(change, aside.positions, aside.columns), change.gather(prompt, aside.hidden)

    def _changed(self, change: Cut, positions: Tensor | None, columns: Tensor | None) -> Segment:
        """With the places of ``change``; ``positions`` and ``columns`` (B, M) of those that come from elsewhere."""
        assert self.layout is not None
        width, behind, before = self.layout.width, self.places - self.layout.width, self.every_column
        positions = change.gather(self.positions[:, :width], positions)
        left = change.gather(before[:, :width], columns).masked_fill(~change.layout.valid, -1)
        valid = None if change.layout.is_full else change.layout.valid
        if behind:
            positions = torch.cat([positions, self.positions[:, width:]], dim=1)
            left = torch.cat([left, before[:, width:]], dim=1)
            valid = None if valid is None else torch.cat([valid, valid.new_ones(valid.shape[0], behind)], dim=1)
        return Segment(self.held, change.layout, change.layout.width + behind, positions, valid, left)

    def told(self, adapter: Adapter, hidden: Tensor) -> dict[str, Any]:
        """What its layers are told in place of what the model gave them; ``hidden``: (B, places, D)."""
        if self._told is None:
            self._told = {} if self.is_whole else self._rule(adapter, hidden)
        return self._told

    def _rule(self, adapter: Adapter, hidden: Tensor) -> dict[str, Any]:
        valid, length = self.held.with_valid(self.places, self.valid), self.held.length + self.places
        mask = attention_mask(implementation_of(adapter.decoder.config), valid, self.places, length, hidden)
        if self.renumbered is None and self.columns is None:
            return {"attention_mask": mask}
        positions = self.positions if self.renumbered is None else self.renumbered
        # Layers take positions of one axis alone, to tell packed sequences apart.
        plain = positions if positions.ndim == 2 else None
        return {
            "attention_mask": mask,
            "position_embeddings": adapter.rotary(hidden, positions),
            "position_ids": plain,
        }

    def after(self, fed: int) -> Held:
        """What the caches of its layers hold when they have run."""
        return self.held.append(fed, self.places, self.columns, self.valid, self.renumbered)


def on_every_axis(places: Tensor, positions: Tensor) -> Tensor:
    """Int (B, n) in the form of ``positions``, (B, L) or (B, L, 3), as text has them: the same on every axis."""
    return places if positions.ndim == 2 else places[..., None].expand(-1, -1, positions.shape[2])


def at(tokens: Tensor, index: Tensor) -> Tensor:
    """(B, n, …): the entries of ``tokens`` (B, L, …) at ``index``, int (B, n)."""
    wide = index.view(*index.shape, *[1] * (tokens.ndim - 2)).expand(-1, -1, *tokens.shape[2:])
    return tokens.gather(1, wide)
