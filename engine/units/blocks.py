"""What a method sees of a block of the vision tower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from ...errors import VisibenchError
from ...models.adapters import VisionGeometry
from .. import attention
from ..decisions import spelled
from .encoding import Encoding
from .inside import Inside
from .shapes import Grid

Heads = Literal["queries", "keys", "values"]
NO_NUMBER = (
    "what the method reads of vision block {} is NaN: pixels may be, or activations overflow in float16: load the "
    "model in bfloat16 or float32"
)


class Form:
    """How tokens lie in the tensors of a tower while a method acts in it; made by its first attention.

    ``scaling``: of the attention of the block at hand, None until that was seen. ``places``: what the tokens of each
    unit take. ``going_on``: the tokens that enter the MLP of the block at hand in place of those that it was given, of
    ``shape``; ``mlp_output``: what that makes of them. ``pairs``: query-key pairs of each unit in its attention; empty
    where all places attend to all. Where units of different shapes lie together, what goes on does so as a whole.
    """

    places: tuple[int, ...] = ()
    scaling: float | None = None
    going_on: Tensor | None = None
    mlp_output: Tensor | None = None
    shape: tuple[int, ...] = ()
    pairs: tuple[int, ...] = ()

    def attends(self, method: str, module: Any, heads: dict[Heads, Tensor], mask: Any, scaling: float) -> Any:
        """A block attends, for the ``method`` of that name: the mask with which it has to. Remembers the ``heads``.

        Raises :class:`UnsupportedModelError` where its kernel cannot take that.
        """
        raise NotImplementedError

    def asked(self, tokens: Tensor) -> None:
        """The method has been asked about the block at hand, among whose tensors are ``tokens``: what it attended with
        is let go."""
        self.scaling, self.shape = None, tuple(tokens.shape)

    def tokens(self, inside: Inside, given: Tensor) -> Tensor:
        """(N, t, Dv), in the order of :class:`Inside`, of ``given``, as they lie in the tower."""
        raise NotImplementedError

    def heads(self, inside: Inside, which: Heads) -> Tensor:
        """(N, heads, t, d), likewise: what the block at hand attends with."""
        raise NotImplementedError

    def laid(self, parts: Sequence[Tensor]) -> Tensor:
        """What goes on of the units of each shape (N, t, Dv), as it lies in the tower from now on."""
        raise NotImplementedError

    def whole(self, method: str, tokens: Tensor) -> Tensor:
        """What the last block puts out, as the model's own code behind it takes it."""
        raise NotImplementedError


class BlockView:
    """A block of the vision tower, behind its attention or its MLP as the method says: N units of one shape.

    ``block``: its number. ``counts``: the P patches of each unit that are left, on the host, the most of them P. Where
    several patches make a token behind the tower they come square by square.
    """

    def __init__(self, block: int, given: Tensor, encoding: Encoding, inside: Inside, form: Form) -> None:
        self.block, self.counts = block, tuple(count - inside.first for count in inside.counts)
        self._given, self._encoding, self._inside, self._form = given, encoding, inside, form
        assert form.scaling is not None
        self._scaling = form.scaling

    @property
    def grid(self) -> Grid:
        """Frames, rows and columns of the tokens that each unit would be; times ``vision.merged`` patches."""
        return self._inside.group.grid

    @property
    def vision(self) -> VisionGeometry:
        """Sizes of the vision side, for units of this shape."""
        vision, tokens = self._encoding.vision, self._inside.group.tokens
        return vision if vision.tokens == tokens else replace(vision, tokens=tokens)

    @cached_property
    def tokens(self) -> Tensor:
        """(N, t, Dv): hidden states, CLS first where there is one."""
        return self._form.tokens(self._inside, self._given)

    @cached_property
    def queries(self) -> Tensor:
        """(N, heads, t, d), as the block attends with them."""
        return self._form.heads(self._inside, "queries")

    @cached_property
    def keys(self) -> Tensor:
        """(N, heads, t, d)."""
        return self._form.heads(self._inside, "keys")

    @cached_property
    def values(self) -> Tensor:
        """(N, heads, t, d)."""
        return self._form.heads(self._inside, "values")

    @property
    def token_keys(self) -> Tensor:
        """(N, u, d): keys of CLS and of the tokens that the patches make, mean over heads and over their patches.

        Patches of padding count only where a token has no others.
        """
        keys, first, side = self.keys.mean(1), self._inside.first, self._inside.merged
        if side == 1:
            return keys
        squares = keys[:, first:].unflatten(1, (-1, side))
        if self._inside.real is None:
            return torch.cat([keys[:, :first], squares.mean(2)], dim=1)
        size = self.size[:, first:].unflatten(1, (-1, side))[..., None].to(keys.dtype)
        return torch.cat([keys[:, :first], (squares * size).sum(2) / size.sum(2)], dim=1)

    @property
    def size(self) -> Tensor:
        """(N, t), fp32: how many patches each token stands for; next to nothing for padding."""
        return self._inside.sizes(self.tokens)

    @property
    def memory(self) -> Tensor | None:
        """(N, P): what the method set here in an earlier block, of the patches that are left; None if nothing, or if
        patches have merged since."""
        return self._inside.memory

    @memory.setter
    def memory(self, values: Tensor) -> None:
        wanted = (len(self.counts), max(self.counts))
        if tuple(values.shape) != wanted:
            raise VisibenchError(f"memory of block {self.block}: wants (N, P) = {wanted}, got {spelled(values)}")
        self._inside.memory = values

    def cls_logits(self, of: Literal["keys", "values"] = "keys") -> Tensor:
        """Logits (N, heads, t), fp32, of CLS's attention; with ``of="values"`` products of its value and each token's.

        Minus infinity where there is no token, so that a softmax over all is one over those that are there.
        """
        if of == "keys":
            logits = attention.fine(self.queries[:, :, :1] @ self.keys.transpose(-1, -2)) * self._scaling
        else:
            logits = attention.fine(self.values[:, :, :1] @ self.values.transpose(-1, -2))
        return self._products(logits, 0)

    def mean_logits(self) -> Tensor:
        """Logits (N, heads, P), fp32, of the attention that the mean of the patches' queries would pay to each patch.

        Minus infinity where there is no patch or where it is padding, which asks nothing either.
        """
        first, there = self._inside.first, self._inside.counted
        queries, keys = attention.fine(self.queries[:, :, first:]), self.keys[:, :, first:]
        if there is None:
            mean = queries.mean(2, keepdim=True)
        else:
            weight = there[:, first:].to(queries.dtype)
            weight = weight / weight.sum(1, keepdim=True)
            mean = (queries * weight[:, None, :, None]).sum(2, keepdim=True)
        logits = attention.fine(mean.to(keys.dtype) @ keys.transpose(-1, -2)) * self._scaling
        return self._products(logits, first)

    def _products(self, logits: Tensor, first: int) -> Tensor:
        """``logits`` (N, heads, 1, …) of the tokens from the ``first`` on, their products counted."""
        width, cls = self.keys.shape[1] * self.keys.shape[3], self._inside.first - first
        self.scored(tuple((count + cls) * width for count in self.counts))
        there = self._inside.counted
        if there is not None:
            logits = logits.masked_fill(~there[:, None, None, first:], float("-inf"))
        return logits.squeeze(2)

    def read(self, values: Tensor) -> list[float]:
        """One number of each unit (N,) on the host, which waits for the device; counted like the reads of cuts.

        Raises :class:`VisibenchError` where one is NaN.
        """
        numbers = self._encoding.read(values)
        if any(number != number for number in numbers):
            raise VisibenchError(NO_NUMBER.format(self.block))
        return numbers

    def scored(self, macs: int | tuple[int, ...]) -> None:
        """Count ``macs`` multiply-adds that the method itself spent on matrix products: an int, or one of each unit.

        Where units differ each is taken to be padded to the largest.
        """
        self._encoding.scored(macs, self._inside.group.units)
