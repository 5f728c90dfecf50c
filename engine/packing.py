"""Rows of unequal length laid one behind the other, and what attention makes of them.

Norms, projections and MLPs work on (1, N, D), N the tokens of all rows, and notice nothing; attention goes by row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where tokens of left padded rows, ``width`` places and ``lengths`` tokens long, stand in one without padding."""

    lengths: tuple[int, ...]
    width: int
    device: torch.device

    @cached_property
    def bounds(self) -> tuple[int, ...]:
        """The first token of each row, and the end of the last."""
        return (0, *accumulate(self.lengths))

    @property
    def tokens(self) -> int:
        """N, the tokens of all rows."""
        return self.bounds[-1]

    @property
    def pairs(self) -> int:
        """Query-key pairs of which each is of one row."""
        return sum(length * length for length in self.lengths)

    @cached_property
    def ends(self) -> Tensor:
        """Int32 (B + 1,): the bounds, on the device."""
        return torch.tensor(self.bounds, dtype=torch.int32).to(self.device, non_blocking=True)

    @cached_property
    def _places(self) -> Tensor:
        """Int (N,): the place of each token among all B · width."""
        last = self.width * np.arange(1, len(self.lengths) + 1)
        rows = [np.arange(end - length, end) for end, length in zip(last, self.lengths, strict=True)]
        return torch.from_numpy(np.concatenate(rows)).to(self.device, non_blocking=True)

    @cached_property
    def _tokens(self) -> Tensor:
        """Int (B · width,): the token at each place, the row's first one where it is padded."""
        rows = [np.arange(end - self.width, end).clip(min=first) for first, end in pairwise(self.bounds)]
        return torch.from_numpy(np.concatenate(rows)).to(self.device, non_blocking=True)

    def pack(self, padded: Tensor, dim: int = 1) -> Tensor:
        """(1, N, …) of (B, width, …); with the places at ``dim``, what lies between them and the rows stays there."""
        return _moved(padded, dim, self._places)[None].movedim(1, dim)

    def spread(self, packed: Tensor, dim: int = 1) -> Tensor:
        """The way back: (B, width, …), the row's first token where it is padded."""
        rows = _moved(packed, dim, self._tokens)
        return rows.unflatten(0, (len(self.lengths), self.width)).movedim(1, dim)

    def of_last(self, made: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
        """What is ``made`` of the last token of each row, (1, B, …), for all ``tokens`` (1, N, D) of the row."""
        last = made(tokens.index_select(1, self.ends[1:] - 1))
        return last.repeat_interleave(self.ends.diff(), dim=1, output_size=self.tokens)

    def pack_table(self, table: Tensor) -> Tensor:
        """(…, 1, N, d) of a rotary table (…, B or 1, width, d)."""
        rows = table.expand(*table.shape[:-3], len(self.lengths), *table.shape[-2:])
        return rows.flatten(-3, -2).index_select(-2, self._places).unsqueeze(-3)


def _moved(tokens: Tensor, dim: int, index: Tensor) -> Tensor:
    """(n, …): entries of (B, …, L at ``dim``, …) at ``index``, int (n,), which counts through all rows."""
    return tokens.movedim(dim, 1).flatten(0, 1).index_select(0, index)


@dataclass(frozen=True)
class Before:
    """What a layer's KV cache held before this prefill: text that every query reads and no method sees.

    ``keys``, ``values``: (B, kv heads, p, d). ``valid``: bool (B, p), None if all count. ``counts``: how many do, (B,).
    """

    keys: Tensor
    values: Tensor
    valid: Tensor | None
    counts: np.ndarray

    def seen(self, behind: Tensor) -> Tensor:
        """Bool (B, p + L): which keys count, with those ``behind``, bool (B, L)."""
        valid = behind.new_ones(behind.shape[0], self.keys.shape[2]) if self.valid is None else self.valid
        return torch.cat([valid, behind], dim=1)


@dataclass(frozen=True)
class Parts:
    """Queries, keys, values and mask of a layer: ``first`` cached places, ``width`` of the prompt, and the rest.

    ``packing``: how the rows are laid, None where each has its own; then there is nothing but the prompt.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    first: int
    width: int
    packing: Packing | None = None

    @property
    def is_all(self) -> bool:
        """Whether there is nothing but the prompt."""
        return self.packing is not None or self.query.shape[2] == self.key.shape[2] == self.width

    @cached_property
    def seen(self) -> tuple[Tensor, Tensor, Tensor]:
        """Those of the prompt alone, by row."""
        if self.packing is not None:
            query, key, value = (self.packing.spread(part, 2) for part in (self.query, self.key, self.value))
            return query, key, value
        if self.is_all:
            return self.query, self.key, self.value
        here = slice(self.first, self.first + self.width)
        return self.query[:, :, : self.width], self.key[:, :, here], self.value[:, :, here]

    def reading(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor, Any]:
        """Query, key, value and mask with which the prompt's rows read other ``values`` of its own."""
        if self.is_all:
            return self.query, self.key, values if self.packing is None else self.packing.pack(values, 2), self.mask
        length = self.first + self.width
        values = torch.cat([self.value[:, :, : self.first], values], dim=2)
        mask = self.mask
        if mask is not None:
            mask = mask[..., : self.width, :length] if mask.ndim == 4 else mask[:, :length]
        return self.query[:, :, : self.width], self.key[:, :, :length], values, mask
