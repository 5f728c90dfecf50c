"""Where a tower stands in which a method acts: what its blocks so far have left of units of one shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...errors import VisibenchError
from ..decisions import BlockCut, BlockMerge, merged, spelled
from ..segment import at
from .shapes import Group

NO_STANDS = "patches have positions in this vision tower: let a BlockMerge say where its tokens stand (stands)"
UNEVEN = "of the units {} patches are left: where some merge, let cuts leave as many of each"
PADDING = 1e-20
"""What a patch of padding weighs in an average: nothing beside one of the image, and evenly among its like."""


def by_unit(every: Sequence[Inside], parts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """One number of each unit, in their order, of those in ``parts``, one of each unit of ``every`` shape."""
    if len(every) == 1:
        return parts[0]
    shapes = zip(every, parts, strict=True)
    found = {unit: one for inside, part in shapes for unit, one in zip(inside.group.units, part, strict=True)}
    return tuple(found[unit] for unit in range(len(found)))


@dataclass
class Inside:
    """N units of one ``group``, t tokens each: CLS first where there is one, then patches.

    Where ``merged`` patches make a token they come square by square, those of a square row by row. ``first``: 1 with
    CLS, else 0. ``counts``: tokens of each unit, on the host. ``is_cut``: whether some left or were merged.
    ``present``: bool (N, t), which of the t places hold one; None: all. ``real``: bool (N, t), which of them the tower
    does not take for padding; None: all. ``patches``: int (N, t), the place that each token had at first, None while
    all are there or where tokens are new. ``size``: (N, t), how many patches each stands for, None: one. ``bias``:
    (N, t), added to the attention logits of these tokens as keys. ``memory``: (N, P), what the method remembers of each
    patch, until they merge. ``outputs``: (N, t, Dv), by block, of blocks so far that the model uses besides the last
    one's, at the tokens that are left. ``seats``: int (N, t), in a tower of one sequence, the place there that each had
    at first; one that others merged into keeps its own.
    """

    group: Group
    first: int
    merged: int
    counts: tuple[int, ...]
    is_cut: bool = False
    present: Tensor | None = None
    real: Tensor | None = None
    patches: Tensor | None = None
    size: Tensor | None = None
    bias: Tensor | None = None
    memory: Tensor | None = None
    outputs: dict[int, Tensor] = field(default_factory=dict)
    seats: Tensor | None = None

    @property
    def tokens_left(self) -> tuple[int, ...]:
        """Tokens of each unit that the patches left make."""
        return tuple((count - self.first) // self.merged for count in self.counts)

    @property
    def counted(self) -> Tensor | None:
        """Bool (N, t): which places hold a token that is no padding; None: all."""
        if self.present is None or self.real is None:
            return self.real if self.present is None else self.present
        return self.present & self.real

    def sizes(self, tokens: Tensor) -> Tensor:
        """(N, t), fp32: how many of the unit's patches each of ``tokens`` (N, t, Dv) stands for."""
        if self.size is not None:
            return self.size
        ones = tokens.new_ones(tokens.shape[:2], dtype=torch.float32)
        return ones if self.real is None else ones.masked_fill(~self.real, PADDING)

    def on_keys(self, dtype: torch.dtype) -> Tensor | None:
        """(N, 1, 1, t): what is added to the logits of all keys; None: nothing."""
        bias, there = None if self.bias is None else self.bias.to(dtype), self.counted
        if there is not None:
            absent = there.new_zeros(there.shape, dtype=dtype) if bias is None else bias
            bias = absent.masked_fill(~there, torch.finfo(dtype).min)
        return None if bias is None else bias[:, None, None]

    def check(self, decision: object, method: str) -> None:
        """Raise :class:`VisibenchError` unless what a ``method`` answered can be carried out, as far as shapes say."""
        where, units, width = f"{method}.block", len(self.counts), max(self.counts) - self.first
        if isinstance(decision, BlockCut):
            most, scores, counts = [count - self.first for count in self.counts], decision.scores, decision.counts
            if tuple(scores.shape) != (units, width):
                raise VisibenchError(f"{where}: BlockCut wants scores (N, P) = {units, width}, got {spelled(scores)}")
            whole = isinstance(counts, tuple) and all(isinstance(count, Integral) for count in counts)
            if not whole or len(counts) != units or any(not 0 <= n <= m for n, m in zip(counts, most, strict=True)):
                raise VisibenchError(f"{where}: BlockCut wants counts, a tuple of ints of 0 to {most}, got {counts}")
            if self.size is not None and len({*counts}) > 1:
                raise VisibenchError(f"{where}: {UNEVEN.format([*counts])}")
        elif isinstance(decision, BlockMerge):
            group, count, wanted = decision.group, decision.count, (units, width // self.merged + self.first)
            if len({*self.counts}) > 1:
                raise VisibenchError(f"{where}: {UNEVEN.format([count - self.first for count in self.counts])}")
            if group.dtype != torch.int64 or tuple(group.shape) != wanted:
                raise VisibenchError(f"{where}: BlockMerge wants group int64 (N, u) = {wanted}, got {spelled(group)}")
            if not 1 <= count <= wanted[1]:
                raise VisibenchError(f"{where}: BlockMerge wants a count of 1 to {wanted[1]}, got {count}")
            if self.seats is not None and decision.stands is None:
                raise VisibenchError(f"{where}: {NO_STANDS}")
        else:
            raise VisibenchError(f"{where}: answer with BlockCut, BlockMerge or None, not a {type(decision).__name__}")

    def going_on(self, decision: BlockMerge | BlockCut, tokens: Tensor) -> Tensor:
        """What goes on of ``tokens`` (N, t, Dv) by a ``decision``."""
        self.is_cut = True
        return self._merged(decision, tokens) if isinstance(decision, BlockMerge) else self._left(decision, tokens)

    def _merged(self, decision: BlockMerge, tokens: Tensor) -> Tensor:
        group, size = self._of_patches(decision.group), self.sizes(tokens)
        count = (decision.count - self.first) * self.merged + self.first
        for block, output in self.outputs.items():
            self.outputs[block], _ = merged(output, size, group, count)
        tokens, self.size = merged(tokens, size, group, count)
        self.counts, self.patches, self.memory = (count,) * len(tokens), None, None
        if self.seats is not None:
            assert decision.stands is not None
            self.seats = self.seats.gather(1, self._of_patches(decision.stands()))
        self.bias = self.size.log() if decision.proportional else None
        self.real = None if self.real is None else self.size > 0.5
        return tokens

    def _of_patches(self, group: Tensor) -> Tensor:
        """Int (N, t): where each patch goes, if squares go by ``group`` (N, u) and their patches place by place."""
        if self.merged == 1:
            return group
        place = torch.arange(self.merged, device=group.device)
        squares = (group[:, self.first :, None] - self.first) * self.merged + place + self.first
        return torch.cat([group[:, : self.first], squares.flatten(1)], dim=1)

    def _left(self, decision: BlockCut, tokens: Tensor) -> Tensor:
        counts, width, first = decision.counts, max(decision.counts), self.first
        scores = decision.scores
        if self.present is not None:
            scores = scores.masked_fill(~self.present[:, first:], float("-inf"))
        chosen = scores.argsort(dim=1, descending=True, stable=True)[:, :width]
        self.present = None
        if min(counts) < width:
            place = torch.arange(width, device=tokens.device)
            there = place < torch.tensor(counts, device=tokens.device)[:, None]
            chosen = chosen.masked_fill(~there, scores.shape[1])  # to the end
            self.present = pad(there, (first, 0), value=True)
        chosen = chosen.sort(dim=1).values
        if self.present is not None:
            chosen = chosen.clamp(max=scores.shape[1] - 1)
        index = pad(chosen + first, (first, 0))
        self.counts = tuple(count + first for count in counts)
        if self.size is None:  # else none is a patch of the image
            self.patches = index if self.patches is None else at(self.patches, index)
        self.memory = None if self.memory is None else at(self.memory, chosen)
        parts = (self.size, self.bias, self.real, self.seats)
        self.size, self.bias, self.real, self.seats = (None if part is None else at(part, index) for part in parts)
        self.outputs = {block: at(output, index) for block, output in self.outputs.items()}
        return at(tokens, index)
