"""A segment: a run of decoder layers whose inputs hold the same tokens, and whose caches held the same before.

What its layers are told (mask, rotary table, positions) is made once for each type of layer, and not at all while every
column is there: then the model's own is right. Otherwise it is the model's own at the columns that are left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedModelError, VisibenchError
from ..models.adapters import Adapter
from .attention import attention_mask, carried, implementation_of
from .cache import Held
from .layout import Cut, TokenLayout, TokenSet, arranged
from .packing import Packing


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


@dataclass(frozen=True)
class Deepstack:
    """What the model adds to the new tokens behind each of its first layers: ``features`` (B, n, D) of all columns."""

    features: tuple[Tensor, ...]

    @classmethod
    def of(cls, given: Mapping[str, Any], layers: int) -> Deepstack | None:
        """From the keyword arguments of a decoder of so many layers, None if there are none."""
        features, where = given.get("deepstack_visual_embeds"), given.get("visual_pos_masks")
        if features is None or where is None:
            return None
        if len(features) >= layers:
            raise UnsupportedModelError(
                f"features are added behind {len(features)} decoder layers, and there are {layers}: "
                "prune() needs a layer more than those"
            )
        nothing = features[0].new_zeros(*where.shape, features[0].shape[-1])
        return cls(tuple(nothing.masked_scatter(where[..., None], part) for part in features))

    def behind(self, layer: int, segment: Segment, hidden: Tensor, aside: list[Aside]) -> tuple[Tensor, list[Aside]]:
        """What ``layer`` put out, with it: at the columns that are left and at those held aside."""
        if layer >= len(self.features):
            return hidden, aside
        features, columns = self.features[layer].to(hidden), segment.columns
        away = [replace(part, hidden=part.hidden + at(features, part.columns.clamp(min=0))) for part in aside]
        return hidden + segment.laid(features if columns is None else at(features, columns.clamp(min=0))), away


@dataclass
class Segment:
    """Layers whose inputs hold the same B rows of ``places`` new tokens.

    ``layout``: those that the method sees; None if it sees none. New tokens behind them run along unseen. ``held``:
    what the caches of these layers held before. ``columns``: int (B, places), each token's column counted from the
    first new one, -1 for none; None while every column is there. ``positions``: as the model gave them, (B, places) or
    (B, places, 3). ``valid``: bool (B, places), None: all. ``added``: whether some tokens share the column, and not the
    position, of another, or have moved. ``renumbered``: in the form of ``positions``, where the engine counts anew.
    ``counted``: (B, L, 3), positions of the tokens of ``layout`` from 0 on, where they are no plain count.
    ``bias``: (B, places), added to the logits of these tokens as keys, None: nothing. ``packs``: whether rows of
    unequal length are laid one behind the other.
    """

    held: Held
    layout: TokenLayout | None
    places: int
    positions: Tensor
    valid: Tensor | None = None
    columns: Tensor | None = None
    added: bool = False
    renumbered: Tensor | None = None
    bias: Tensor | None = None
    packs: bool = False
    counted: Tensor | None = None
    _told: dict[str, dict[str, Any]] = field(default_factory=dict)

    @cached_property
    def packing(self) -> Packing | None:
        """How its layers are handed the rows; None: padded, (B, places, D)."""
        if not self.packs or self.layout is None or self.layout.is_full:
            return None
        return Packing(self.layout.lengths, self.layout.width, self.positions.device)

    def laid(self, tokens: Tensor) -> Tensor:
        """(1, N, …) or (B, places, …): padded ``tokens`` (B, places, …) as its layers are handed them."""
        return tokens if self.packing is None else self.packing.pack(tokens)

    def padded(self, tokens: Tensor) -> Tensor:
        """The way back."""
        return tokens if self.packing is None else self.packing.spread(tokens)

    @property
    def is_whole(self) -> bool:
        """Whether every column fed so far has its place: the model's own mask is right."""
        return self.columns is None and self.held.columns is None

    @property
    def key_bias(self) -> Tensor | None:
        """(B, held and new places): what is added to the logits of all keys, None: nothing."""
        return self.held.with_bias(self.places, self.bias)

    @property
    def prompt_bias(self) -> Tensor | None:
        """The same of the places held and those of the prompt."""
        bias, layout = self.key_bias, self.layout
        return bias if bias is None or layout is None else bias[:, : self.held.length + layout.width]

    def biased(self, bias: Tensor) -> Segment:
        """With another ``bias`` (B, V) on the visual tokens, as keys."""
        assert self.layout is not None
        old = bias.new_zeros(len(bias), self.places) if self.bias is None else self.bias
        width = self.layout.width
        placed = self.layout.visual.place(bias, old[:, :width], dim=1)
        return replace(self, bias=torch.cat([placed, old[:, width:]], dim=1), _told={})

    def moved(self, positions: Tensor) -> Segment:
        """With other ``positions`` of the visual tokens, in the form of those of all."""
        assert self.layout is not None
        width = self.layout.width
        placed = self.layout.visual.place(positions, self.positions[:, :width], dim=1)
        return replace(self, positions=torch.cat([placed, self.positions[:, width:]], dim=1), added=True, _told={})

    def on(self, held: Held) -> Segment:
        """The same tokens in front of layers whose caches held something else."""
        return replace(self, held=held, renumbered=None, _told={})

    def numbered(self, start: int, prompt: TokenLayout | None) -> Segment:
        """With positions counted anew from ``start``, or behind those in the cache, unless every column is there.

        ``prompt``: the tokens that the method saw at first.
        """
        if self.is_whole:
            return self
        if self.held.positions is not None and self.valid is None and self.places == 1:  # a step of decoding
            return replace(self, renumbered=self.held.positions[:, -1:] + 1, _told={})
        if self.valid is None and not self.held.length and self.positions.ndim == 2:
            count = torch.arange(start, start + self.places, device=self.positions.device)
            return replace(self, renumbered=count.expand_as(self.positions), _told={})
        valid, first, count = self.valid, self.positions[:, :1], self._count()
        if valid is not None and self.held.length:
            first = at(self.positions, valid.to(torch.int8).argmax(1, keepdim=True))
        if self.held.positions is not None:
            first = self.held.positions[:, -1:] + 1
        elif not self.held.length:
            first = torch.full_like(first, start)
        counted = (first + count - 1).clamp(min=0)
        if prompt is not None and self.positions.ndim == 3 and not self.held.length:
            # On three axes they are no plain count: rows that lost nothing keep theirs, as they do alone.
            counted = torch.where(
                self._whole_rows(prompt.everything.device_counts)[:, None, None], self.positions, counted
            )
        return replace(self, renumbered=counted, _told={})

    def showing(self, images: Tensor, adapter: Adapter) -> Segment:
        """Counting as the model counts a prompt whose images have these frames and patches, int (N, 3)."""
        assert self.layout is not None
        return replace(self, counted=adapter.places(self.layout.visual.mask, self.layout.valid, images))

    def _count(self) -> Tensor:
        """Int, in the form of ``positions``: numbers of the tokens from 1 on."""
        if self.counted is not None:
            behind = torch.arange(1, self.places - self.counted.shape[1] + 1, device=self.positions.device)
            return 1 + torch.cat([self.counted, self.counted[:, -1:] + behind[:, None]], dim=1)
        if self.valid is None:
            count = torch.arange(1, self.places + 1, device=self.positions.device).expand(len(self.positions), -1)
        else:
            count = self.valid.cumsum(1)
        return on_every_axis(count, self.positions)

    def _whole_rows(self, lengths: Tensor) -> Tensor:
        """Bool (B,): rows that hold every column of the ``lengths``, int (B,), that they had."""
        assert self.layout is not None
        columns, valid = self.every_column[:, : self.layout.width], self.layout.valid
        in_order = (columns.diff(dim=1) == 1) | ~valid[:, :-1]
        return in_order.all(1) & (valid.sum(1) == lengths)

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
        columns = None if anchors is None else at(self.every_column, anchors.clamp(min=0))
        return replace(self._changed(change, places, columns), added=self.added or anchors is not None)

    def cut_with(self, change: Cut, added: int) -> Segment:
        """The segment behind a cut with so many new tokens a row, which stand by the last visual one of the row."""
        assert self.layout is not None
        if not added:
            return self._changed(change, None, None)
        visual, width = self.layout.visual, self.layout.width
        stood = [visual.last_of(part[:, :width], added) for part in (self.positions, self.every_column)]
        return replace(self._changed(change, *stood), added=True)

    def without(self, keep: Tensor, change: Cut, prompt: Tensor) -> Aside:
        """What the cut ``change``, which keeps visual tokens by ``keep`` (B, V) alone, takes out of ``prompt``."""
        assert self.layout is not None
        if self.bias is not None:
            raise VisibenchError("tokens cannot be held aside where others have a lasting bias as keys")
        visual, left = self.layout.visual, change.layout.visual_counts
        leaves = visual.place(~keep & visual.present, torch.zeros_like(visual.mask), dim=1)
        gone = TokenSet(leaves, tuple(n - m for n, m in zip(visual.counts, left, strict=True)))
        prompts = (prompt, self.positions, self.every_column, self.layout.visual_id)
        return Aside(TokenSet(gone.present, gone.counts), *(at(part, gone.index) for part in prompts))

    def join(self, aside: Aside, prompt: Tensor) -> tuple[Segment, Tensor]:
        """The segment in which tokens held aside are back, and its prompt."""
        assert self.layout is not None
        if self.bias is not None:
            raise VisibenchError("tokens held aside cannot join where others have a lasting bias as keys")
        here = self.every_column[:, : self.layout.width]
        change = _join(self.layout, here, aside.tokens, aside.columns, aside.visual_id)
        return self._changed(change, aside.positions, aside.columns), change.gather(prompt, aside.hidden)

    def _changed(self, change: Cut, positions: Tensor | None, columns: Tensor | None) -> Segment:
        """With the places of ``change``; ``positions`` and ``columns`` (B, M) of those that come from elsewhere."""
        assert self.layout is not None
        width, behind = self.layout.width, self.places - self.layout.width
        positions = change.gather(parted(self.positions, width)[0], positions)
        # While every column is there, places are columns.
        same = self.columns is None and columns is None
        left = change.index if same else change.gather(parted(self.every_column, width)[0], columns)
        valid = None if change.layout.is_full else change.layout.valid
        left = left if valid is None else left.masked_fill(~valid, -1)
        bias = self.bias
        if bias is not None:
            other = None if columns is None else bias.new_zeros(columns.shape)
            bias = torch.cat([change.gather(bias[:, :width], other), bias[:, width:]], dim=1)
        if behind:
            positions = torch.cat([positions, self.positions[:, width:]], dim=1)
            left = torch.cat([left, self.every_column[:, width:]], dim=1)
            valid = None if valid is None else torch.cat([valid, valid.new_ones(valid.shape[0], behind)], dim=1)
        places = change.layout.width + behind
        after = Segment(self.held, change.layout, places, positions, valid, left, self.added)
        return replace(after, bias=bias, packs=self.packs)

    def told(self, adapter: Adapter, layer: int, hidden: Tensor, given: Mapping[str, Any]) -> dict[str, Any]:
        """What a layer is told in place of what the model has ``given`` it; ``hidden``: what it gets.

        Tables and positions are laid as the tokens are, masks are of padded rows (B, 1, places, keys).
        """
        if self.is_whole and self.packing is None and self.bias is None and self.held.bias is None:
            return {}
        kind = adapter.layer_types[layer]
        if kind not in self._told:
            self._told[kind] = self._rule(adapter, kind, hidden, given)
        return self._told[kind]

    def told_of_prompt(self, adapter: Adapter, layer: int, hidden: Tensor, given: Mapping[str, Any]) -> dict[str, Any]:
        """The whole of it, for the tokens alone that the method sees."""
        names = ("attention_mask", "position_embeddings", "position_ids")
        told: dict[str, Any] = {name: given.get(name) for name in names} | self.told(adapter, layer, hidden, given)
        width = self.places if self.layout is None else self.layout.width
        if self.places == width:
            return told
        table, places = told["position_embeddings"], told["position_ids"]
        return {
            "attention_mask": None,
            "position_embeddings": tuple(part[..., :width, :] for part in table),
            "position_ids": None if places is None else places[:, :width],
        }

    def _rule(self, adapter: Adapter, kind: str, hidden: Tensor, given: Mapping[str, Any]) -> dict[str, Any]:
        told: dict[str, Any] = {"attention_mask": self._mask(adapter, kind, hidden, given["attention_mask"])}
        if self.renumbered is None and self.columns is None and self.packing is None:
            return told
        positions = self.positions if self.renumbered is None else self.renumbered
        if self.renumbered is None and not self.added:
            columns = self.every_column if self.valid is None else self.every_column.clamp(min=0)
            table = _along(given["position_embeddings"], columns)
        else:
            table = adapter.rotary(hidden, positions, kind)
        packing = self.packing
        told["position_embeddings"] = table if packing is None else tuple(packing.pack_table(part) for part in table)
        # Layers take positions of one axis alone, to tell packed sequences apart.
        return told | {"position_ids": self.laid(positions) if positions.ndim == 2 else None}

    def _mask(self, adapter: Adapter, kind: str, hidden: Tensor, model: Tensor | None) -> Tensor | None:
        """``model``: the mask that the model made, of all columns; None where it needs none."""
        bias = self.key_bias
        mask = self._visible(adapter, kind, hidden, model, written=bias is not None)
        if bias is None or mask is None:
            return mask
        if mask.dtype == torch.bool:
            lowest = torch.finfo(hidden.dtype).min
            mask = mask.new_zeros(mask.shape, dtype=hidden.dtype).masked_fill(~mask, lowest)
        return mask + bias[:, None, None].to(mask.dtype)

    def _visible(
        self, adapter: Adapter, kind: str, hidden: Tensor, model: Tensor | None, *, written: bool
    ) -> Tensor | None:
        """The mask without a bias; ``written``: in any case, and not None where a kernel needs none."""
        valid, length = self.held.with_valid(self.places, self.valid), self.held.length + self.places
        if model is None or kind not in adapter.carried_types:
            if self.packing is not None and not written:
                return None  # each row is causal by itself
            form = "eager" if written else implementation_of(adapter.decoder.config)
            return attention_mask(form, valid, self.places, length, hidden)
        new = self.every_column
        if self.layout is not None:  # tokens in another order take each other's places, and see what those see
            new = new.sort(dim=1).values
        keys, fed = new, model.shape[-1] - model.shape[-2]
        if self.held.length:
            keys = torch.cat([self.held.every_column(fed, new), new + fed], dim=1)
        ordered = self.added and not adapter.family.bidirectional
        return carried(model, new.clamp(min=0), keys.clamp(min=0), valid, ordered=ordered)

    def after(self, fed: int) -> Held:
        """What the caches of its layers hold when they have run."""
        return self.held.append(fed, self.places, self.columns, self.valid, self.renumbered, self.bias)


def _join(layout: TokenLayout, column: Tensor, others: TokenSet, other_column: Tensor, other_id: Tensor) -> Cut:
    """All tokens and M visual ``others`` (B, M), of numbers ``other_id``, in the order of their columns. No host sync.

    ``column``: int (B, L) and ``other_column``: int (B, M) in the same terms.
    """
    stays = torch.cat([layout.valid, others.mask], dim=1)
    counts = tuple(map(sum, zip(layout.visual_counts, others.counts, strict=True)))
    return arranged(layout, torch.cat([column, other_column], dim=1), stays, other_id, counts)


def on_every_axis(places: Tensor, positions: Tensor) -> Tensor:
    """Int (B, n) in the form of ``positions``, (B, L) or (B, L, 3), as text has them: the same on every axis."""
    return places if positions.ndim == 2 else places[..., None].expand(-1, -1, positions.shape[2])


def _along(tables: tuple[Tensor, ...], columns: Tensor) -> tuple[Tensor, ...]:
    """(…, B, n, d): rotary tables (…, B or 1, L, d) at ``columns``, int (B, n)."""
    if len(columns) == 1:
        only = columns[0]
        return tuple(table.index_select(-2, only) for table in tables)
    index = [columns[..., None].expand(*table.shape[:-3], -1, -1, table.shape[-1]) for table in tables]
    wide = (table.expand(*at.shape[:-2], *table.shape[-2:]) for table, at in zip(tables, index, strict=True))
    return tuple(table.gather(-2, at) for table, at in zip(wide, index, strict=True))


def at(tokens: Tensor, index: Tensor) -> Tensor:
    """(B, n, …): the entries of ``tokens`` (B, L, …) at ``index``, int (B, n)."""
    wide = index.view(*index.shape, *[1] * (tokens.ndim - 2)).expand(-1, -1, *tokens.shape[2:])
    return tokens.gather(1, wide)


def parted(tokens: Tensor, width: int) -> tuple[Tensor, Tensor | None]:
    """The first ``width`` tokens, and those behind them, if there are any."""
    return (tokens, None) if tokens.shape[1] == width else (tokens[:, :width], tokens[:, width:])


def joined(prompt: Tensor, behind: Tensor | None) -> Tensor:
    """Both in one again."""
    return prompt if behind is None else torch.cat([prompt, behind], dim=1)
