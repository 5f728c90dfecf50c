"""The KV cache of a pruned model: keys and values by layer, and beside them what those layers hold.

Every token that was fed, over all turns, has a number: its *column*. Layers drop columns, each as the method says, so
the cache carries by layer which columns are left, which of them count and how they are numbered. It tells the outside
the logical length, the number of columns fed, whatever its layers hold: transformers then slices inputs and counts
positions as for a model that nobody prunes. What changes the tensors (cropping, choosing or repeating rows, copying)
changes the record with them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..errors import InputError, UnsupportedModelError, VisibenchError
from .packing import Packing

OUTSIDE = (
    "this KV cache was made under visibench.prune() and works only inside that `with` block, in calls of the model "
    "itself: stay in the block until generation is done"
)


@dataclass(frozen=True)
class Held:
    """What the caches of some decoder layers hold.

    ``length``: places in their tensors. ``dense``: so many places at the left are columns 0, 1, 2, … in every row.
    ``columns``: int (B, n), the column at each of the first n places, -1 for none; places behind them hold the latest
    columns, one each; None: every column has its place. ``valid``: bool (B, length), the places that count; None: all.
    ``positions``: int (B, length, …) where the engine numbers places anew, None where the model does. ``bias``: (B,
    length), added to the logits of these keys, None: nothing.
    """

    length: int = 0
    dense: int = 0
    columns: Tensor | None = None
    valid: Tensor | None = None
    positions: Tensor | None = None
    bias: Tensor | None = None

    def append(
        self,
        fed: int,
        length: int,
        columns: Tensor | None,
        valid: Tensor | None,
        positions: Tensor | None,
        bias: Tensor | None,
    ) -> Held:
        """With ``length`` more places, in the same terms; ``columns`` (B, length) count from column ``fed`` on."""
        if not fed:
            return Held(length, length if columns is None else 0, columns, valid, positions, bias)
        if self.columns is None and columns is None:
            dense, all_columns = self.length + length, None
        elif columns is None:
            dense, all_columns = self.dense, self.columns
        else:
            dense, columns = self.dense, torch.where(columns < 0, columns, columns + fed)
            all_columns = torch.cat([self.every_column(fed, columns), columns], dim=1)
        if positions is not None and self.length:
            # What the model numbered ends right in front of what the engine numbers.
            before = self.positions
            if before is None:
                before = (positions[:, :1] - 1).expand(-1, self.length, *positions.shape[2:])
            positions = torch.cat([before, positions], dim=1)
        valid, bias = self.with_valid(length, valid), self.with_bias(length, bias)
        return Held(self.length + length, dense, all_columns, valid, positions, bias)

    def with_valid(self, length: int, valid: Tensor | None) -> Tensor | None:
        """Bool (B, self.length + length), with ``valid`` of the places behind those held; None if all count."""
        if not self.length or (self.valid is None and valid is None):
            return valid
        if self.valid is None:
            assert valid is not None
            return torch.cat([valid.new_ones(valid.shape[0], self.length), valid], dim=1)
        behind = self.valid.new_ones(self.valid.shape[0], length) if valid is None else valid
        return torch.cat([self.valid, behind], dim=1)

    def with_bias(self, length: int, bias: Tensor | None) -> Tensor | None:
        """(B, self.length + length), with the ``bias`` on places behind those held; None if there is none on any."""
        if not self.length or (self.bias is None and bias is None):
            return bias
        known = self.bias if bias is None else bias
        assert known is not None
        parts = ((self.bias, self.length), (bias, length))
        return torch.cat([known.new_zeros(len(known), n) if part is None else part for part, n in parts], dim=1)

    def every_column(self, fed: int, like: Tensor) -> Tensor:
        """Int (B, length): the columns of all places; B and the device are those of ``like``."""
        known = like[:, :0].long() if self.columns is None else self.columns
        latest = torch.arange(fed - (self.length - known.shape[1]), fed, device=like.device)
        return torch.cat([known, latest.expand(like.shape[0], -1)], dim=1)

    def crop(self, fed: int, limit: int) -> tuple[Held, slice | Tensor]:
        """Without columns from ``limit`` on, and which places those are that stay: a slice, or int (B, n)."""
        tail = self.length - (0 if self.columns is None else self.columns.shape[1])
        if limit <= self.dense:
            return Held(limit, limit, valid=_cut(self.valid, limit), bias=_cut(self.bias, limit)), slice(limit)
        if fed - limit <= tail:
            length = self.length - (fed - limit)
            left = [_cut(part, length) for part in (self.valid, self.positions, self.bias)]
            return Held(length, min(self.dense, length), self.columns, *left), slice(length)
        assert self.columns is not None
        columns = self.every_column(fed, self.columns)
        stays = (columns >= 0) & (columns < limit)
        stays = stays if self.valid is None else stays & self.valid
        # Rows lose different numbers: what stays moves to the right, as in a prompt of uneven rows.
        length = int(stays.sum(1).max())
        index = stays.to(torch.int8).argsort(dim=1, stable=True)[:, columns.shape[1] - length :]
        stays, columns = stays.gather(1, index), columns.gather(1, index)
        positions = None if self.positions is None else _gather(self.positions, index)
        bias = None if self.bias is None else self.bias.gather(1, index)
        return Held(length, 0, columns.masked_fill(~stays, -1), stays, positions, bias), index

    def hide(self, fed: int, counts: Tensor) -> Held:
        """With only those columns counting that do in ``counts``, bool (B, fed)."""
        columns = self.every_column(fed, counts)
        valid = counts.gather(1, columns.clamp(min=0))
        valid = valid & ((columns >= 0) if self.valid is None else self.valid)
        positions = self.positions
        if positions is not None:  # the next one follows the last that counts
            there = valid.view(*valid.shape, *[1] * (positions.ndim - 2))
            positions = positions.masked_fill(~there, -1).cummax(1).values
        return replace(self, valid=valid, positions=positions)

    def rows(self, change: Callable[[Tensor], Tensor]) -> Held:
        """The same with ``change`` made to the rows of every tensor."""
        parts = (self.columns, self.valid, self.positions, self.bias)
        return Held(self.length, self.dense, *(None if part is None else change(part) for part in parts))


class PrunedCache(DynamicCache):
    """A DynamicCache whose layers hold different columns; made from an empty one by :func:`adopt`.

    ``fed``: columns fed so far, in all turns. ``held``: what each decoder layer holds; layers of one segment share the
    record. ``padding``: bool (B, fed), the attention mask of all columns, None if nothing was padded.
    """

    fed: int
    held: list[Held]
    padding: Tensor | None
    _user: Callable[[], Any]

    def belongs_to(self, user: Any) -> bool:
        """Whether ``user`` (a session) filled it."""
        return self._user() is user

    def commit(self, tokens: int, held: list[Held], padding: Tensor | None) -> None:
        """A forward with ``tokens`` new columns is complete, and its layers hold this now."""
        self.fed, self.held, self.padding = self.fed + tokens, held, padding

    def spread(self, layer: int, packing: Packing) -> None:
        """Lay out by row what ``layer`` was given as rows one behind the other: those to come end at the same place."""
        own: Any = self.layers[layer]
        own.keys, own.values = packing.spread(own.keys, 2), packing.spread(own.values, 2)

    def hide(self, counts: Tensor) -> None:
        """Of the columns fed so far only those count from now on that do in ``counts``, bool (B, fed)."""
        kept = {id(held): held.hide(self.fed, counts) for held in self.held}
        self.held, self.padding = [kept[id(held)] for held in self.held], counts

    def check(self) -> None:
        """Raise if keys and values are not those that the record speaks of: a forward failed half-way, say."""
        layers: list[Any] = self.layers
        lengths = [layer.keys.shape[2] if layer.is_initialized else 0 for layer in layers]
        if lengths != [held.length for held in self.held[: len(lengths)]]:
            raise InputError(
                "the KV cache does not hold what was fed to it: a call of the model failed half-way, or its tensors "
                "were changed from outside; start with an empty one"
            )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append; raises outside the `with` block that filled it."""
        user = self._user()
        if user is None or not user.feeds(self):
            raise VisibenchError(OUTSIDE)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns fed so far, whatever the layer holds of them."""
        return self.fed

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Columns that a mask is about, and the first of them: all, whatever the layer holds of them."""
        return self.fed + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the latest columns: so many if the number is negative, all but so many if it is positive."""
        limit = self.fed + tokens_to_remove if tokens_to_remove <= 0 else min(tokens_to_remove, self.fed)
        if limit < 0:
            raise InputError(f"cannot crop {-tokens_to_remove} tokens from a KV cache that was fed {self.fed}")
        if limit == self.fed:
            return
        kept = {id(held): held.crop(self.fed, limit) for held in self.held}
        layers: list[Any] = self.layers
        for layer, held in zip(layers, self.held, strict=False):
            places = kept[id(held)][1]
            layer.keys, layer.values = _places(layer.keys, places), _places(layer.values, places)
        self.held = [kept[id(held)][0] for held in self.held]
        self.padding, self.fed = _cut(self.padding, limit), limit

    def reorder_cache(self, beam_idx: Any) -> None:
        """Rows in another order, some several times."""
        super().reorder_cache(beam_idx)
        self._rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times."""
        super().batch_repeat_interleave(repeats)
        self._rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows."""
        super().batch_select_indices(indices)
        self._rows(lambda tensor: tensor[indices])

    def reset(self) -> None:
        """Empty it."""
        super().reset()
        self.fed, self.held, self.padding = 0, [Held()] * len(self.held), None

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        changed = {id(held): held.rows(change) for held in self.held}
        self.held = [changed[id(held)] for held in self.held]
        self.padding = None if self.padding is None else change(self.padding)


def adopt(cache: DynamicCache, layers: int, user: Any) -> PrunedCache:
    """Turn an empty cache, in place, into one that carries what its ``layers`` decoder layers hold.

    In place, since it may be the user's own, who goes on with it. ``user``: the session that alone may fill it.
    """
    sliding = cache.is_sliding
    cache.__class__ = PrunedCache
    assert isinstance(cache, PrunedCache)
    # Layers with a window drop what leaves it by its place, and places are no columns here: they keep everything.
    cache.layers = [DynamicLayer() if slides else layer for layer, slides in zip(cache.layers, sliding, strict=True)]
    cache.fed, cache.held, cache.padding = 0, [Held()] * layers, None
    cache._user = weakref.ref(user)
    return cache


def check_cache(cache: Any, user: Any, layer_types: Sequence[str]) -> None:
    """Raise unless ``cache`` is one that ``user`` (a session) filled, an empty DynamicCache of this model, or None."""
    if cache is None:
        return
    name = type(cache).__name__
    if type(cache) not in (DynamicCache, PrunedCache) or getattr(cache, "offloading", False):
        kind = f"an offloaded {name}" if getattr(cache, "offloading", False) else name
        raise UnsupportedModelError(
            f"prune() works with a DynamicCache, not with {kind}: pass an empty transformers.DynamicCache() or none, "
            "and leave cache_implementation unset"
        )
    if any(slides and kind == "full_attention" for slides, kind in zip(cache.is_sliding, layer_types, strict=False)):
        raise InputError(
            "this KV cache has sliding windows in layers where the model has none: pass an empty "
            "transformers.DynamicCache() or none"
        )
    if isinstance(cache, PrunedCache):
        cache.check()
    if not cache.get_seq_length():
        return
    if type(cache) is DynamicCache or not cache.belongs_to(user):
        raise InputError(
            "the KV cache was filled outside this `with` block: pass an empty transformers.DynamicCache() or none, and "
            "run all of the prompt inside"
        )


def _cut(tensor: Tensor | None, length: int) -> Tensor | None:
    return None if tensor is None else tensor[:, :length]


def _places(tensor: Tensor, places: slice | Tensor) -> Tensor:
    """Places of keys or values (B, heads, n, d)."""
    if isinstance(places, slice):
        return tensor[:, :, places]
    return tensor.gather(2, places[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3]))


def _gather(tensor: Tensor, index: Tensor) -> Tensor:
    wide = index.view(*index.shape, *[1] * (tensor.ndim - 2)).expand(-1, -1, *tensor.shape[2:])
    return tensor.gather(1, wide)
