"""How tokens lie in a tower that has all units in one sequence, of which some blocks may attend in windows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError, UnsupportedModelError, VisibenchError
from ..units.blocks import Form, Heads
from ..units.encoding import Encoding
from ..units.inside import Inside, by_unit
from ..units.shapes import on_device
from .forms import NO_BIAS, NOT_WHOLE

NONE_LEFT = "{} leaves nothing of an image of {} tokens, and this vision tower cannot go on with nothing: keep more"


class OneSequence(Form):
    """Units of any shape lie one behind the other in (S, D), square by square, and attend in pieces of the sequence.

    A *seat* is a place in it as it was at first. Each patch has one, and one that others merged into keeps its own.
    What is left lies in the order of seats, so that the patches of a unit stay together, and so do those of a window.
    Rotary tables are read at the seats, and a piece is as long as there are seats taken in it. Behind the last block
    what is left goes into the first squares of its unit in the full sequence, since the model's own code makes tokens
    of that.

    ``encoding.inside`` is one for each shape. ``pairs``: query-key pairs of each unit in the block at hand.
    """

    def __init__(self, encoding: Encoding, method: str, like: Tensor) -> None:
        units, side = encoding.units, encoding.vision.merged
        self._method, self._side, self._has_moved = method, side, False
        self._pieces: dict[Heads, list[Tensor]] = {}
        self._squares = units.squares
        self._size = side * sum(map(len, self._squares))
        self._first_seats: list[Tensor] = []
        self._inside: list[Inside] = []
        for group in units.whole:
            squares = np.stack([self._squares[unit] for unit in group.units])
            seats = (squares[..., None] * side + np.arange(side)).reshape(len(squares), -1)
            self._first_seats.append(on_device(seats, like))
            counts = (int(seats.shape[1]),) * len(seats)
            self._inside.append(Inside(group, 0, side, counts, seats=self._first_seats[-1]))
        encoding.inside = self._inside
        self._sort(like.device)

    def _sort(self, device: torch.device) -> None:
        """Where what is left lies: ``_of_seat``, int (S,), the place of each in the sequence among all by unit, (N · t)
        of each shape one behind the other, and ``_places``, for each shape int (N, t), the way back."""
        self.places, seats = by_unit(self._inside, [inside.counts for inside in self._inside]), []
        for inside in self._inside:
            assert inside.seats is not None
            absent = None if inside.present is None else ~inside.present
            seats.append(inside.seats if absent is None else inside.seats.masked_fill(absent, self._size))
        every = torch.cat([part.flatten() for part in seats])
        self._of_seat = every.argsort()[: sum(self.places)]
        self._seats = every[self._of_seat]
        places = torch.zeros_like(every).scatter_(0, self._of_seat, torch.arange(len(self._of_seat), device=device))
        shapes = [part.shape for part in seats]
        parts = places.split([part.numel() for part in seats])
        self._places = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        self._known: dict[bool, tuple[dict[str, Any], tuple[int, ...]]] = {}
        self._bias: Tensor | None = None

    # ---- a block begins -------------------------------------------------------------------------------------------

    def told(self, given: Mapping[str, Any], read: Callable[[Tensor], list[int]], *, windowed: bool) -> dict[str, Any]:
        """Keyword arguments of a block in place of those ``given``, which are for all patches; ``read`` brings numbers
        to the host. ``windowed``: whether it attends in windows."""
        if windowed not in self._known:
            self._known[windowed] = self._in_blocks(given, read, windowed=windowed)
        told, self.pairs = self._known[windowed]
        return told

    def _in_blocks(
        self, given: Mapping[str, Any], read: Callable[[Tensor], list[int]], *, windowed: bool
    ) -> tuple[dict[str, Any], tuple[int, ...]]:
        """What blocks of a kind are told until the next decision, and their query-key pairs, by unit."""
        bounds, lengths, ends = given["cu_seqlens"], [*self.places], np.cumsum(self.places)
        if windowed:
            taken = torch.searchsorted(self._seats, bounds.to(self._seats.dtype)).diff()
            lengths = [length for length in read(taken) if length]
        owner = np.searchsorted(ends, np.cumsum(lengths))
        pairs = tuple(np.bincount(owner, np.square(lengths), len(ends)).astype(int).tolist())
        if not self._has_moved:
            return {}, pairs
        told = {
            "cu_seqlens": torch.tensor([0, *accumulate(lengths)], dtype=bounds.dtype).to(bounds.device),
            "position_embeddings": tuple(table[self._seats] for table in given["position_embeddings"]),
        }
        return told if given.get("max_seqlen") is None else told | {"max_seqlen": max(lengths)}, pairs

    def attends(self, method: str, module: Any, heads: dict[Heads, Tensor], mask: Any, scaling: float) -> Any:
        if self.scaling is None:
            self._pieces, self.scaling = {which: [] for which in heads}, scaling
            self._bias = self._on_keys(heads["queries"].dtype)
        first = sum(int(piece.shape[2]) for piece in self._pieces["keys"])
        for which, part in heads.items():
            self._pieces[which].append(part)
        if self._bias is None:
            return mask
        if "flash" in module.config._attn_implementation:
            raise UnsupportedModelError(NO_BIAS.format(method))
        return self._bias[None, None, None, first : first + int(heads["keys"].shape[2])]

    def _on_keys(self, dtype: torch.dtype) -> Tensor | None:
        """(S,): what is added to the logits of all keys; None: nothing."""
        every = list(zip(self._inside, self._places, strict=True))
        if all(inside.bias is None for inside, _ in every):
            return None
        return self._row(
            [
                places.new_zeros(places.shape, dtype=dtype) if inside.bias is None else inside.bias.to(dtype)
                for inside, places in every
            ]
        )

    # ---- what is shown, and laid back -----------------------------------------------------------------------------

    def asked(self, tokens: Tensor) -> None:
        super().asked(tokens)
        self._pieces = {}

    def tokens(self, inside: Inside, given: Tensor) -> Tensor:
        return given[self._places_of(inside)]

    def heads(self, inside: Inside, which: Heads) -> Tensor:
        if len(self._pieces[which]) > 1:
            self._pieces[which] = [torch.cat(self._pieces[which], dim=2)]
        (whole,) = self._pieces[which]
        return whole[0].transpose(0, 1)[self._places_of(inside)].transpose(1, 2)

    def laid(self, parts: Sequence[Tensor]) -> Tensor:
        for inside in self._inside:
            if 0 in inside.counts:
                raise InputError(NONE_LEFT.format(self._method, inside.group.tokens))
        self._has_moved = True
        self._sort(parts[0].device)
        return self._row(parts)

    def whole(self, method: str, tokens: Tensor) -> Tensor:
        if not self._has_moved:
            return tokens
        if any(count % self._side for count in self.places):
            raise VisibenchError(NOT_WHOLE.format(method, [*self.places], self._side))
        every = zip(self._first_seats, self._places, strict=True)
        first = self._row([seats[:, : places.shape[1]] for seats, places in every])
        return tokens.new_zeros(self._size, tokens.shape[1]).index_copy_(0, first, tokens)

    def projected(self, projector: Callable[[Tensor], Tensor], block: int) -> Tensor:
        """(T, D) of all T tokens: what a ``projector`` makes of the output of a ``block`` at what is left in the end.

        Where :meth:`whole` has it, among zeros.
        """
        row = self._row([inside.outputs[block] for inside in self._inside])
        if not self._has_moved:
            return projector(row)
        full = self.whole(self._method, row).unflatten(0, (-1, self._side))
        left = zip(self._squares, self.places, strict=True)
        squares = on_device(np.concatenate([own[: count // self._side] for own, count in left]), row)
        made = projector(full[squares].flatten(0, 1))
        return made.new_zeros(len(full), made.shape[1]).index_copy_(0, squares, made)

    def _places_of(self, inside: Inside) -> Tensor:
        number = next(number for number, one in enumerate(self._inside) if one is inside)
        return self._places[number]

    def _row(self, parts: Sequence[Tensor]) -> Tensor:
        """(S, …): what is (N, t, …) of each shape, in the sequence as it is now."""
        return torch.cat([part.flatten(0, 1) for part in parts])[self._of_seat]
