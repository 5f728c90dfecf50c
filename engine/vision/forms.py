"""How tokens lie in the tensors of a tower in which a method acts: what is shown of them by unit, and laid back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from ...errors import UnsupportedModelError, VisibenchError
from ..units.bidirectional import real_patches
from ..units.blocks import Form, Heads
from ..units.encoding import Encoding
from ..units.inside import Inside
from ..units.shapes import on_device

NO_BIAS = (
    "{} adds to the attention logits of the vision tower, and flash attention cannot: load the model with "
    "attn_implementation='sdpa'"
)
NOT_WHOLE = "{} leaves {} patches of each unit, of which {} make a token: leave a multiple of that"


class Batched(Form):
    """Units of one size lie in (N, t, D): CLS where there is one, then their patches, row by row.

    Once a method has decided, they lie as it was shown them: square by square where several make a token, padded to the
    unit with the most. Behind the last block what is left goes into the first squares of the full grid, since the
    model's own code makes tokens of that. Where each patch is a token, the tower puts out so many less.

    ``encoding.inside`` is then one, of units of the one shape that there is.
    """

    def __init__(self, encoding: Encoding, query: Tensor, mask: Tensor | None) -> None:
        (group,), vision = encoding.units.whole, encoding.vision
        units, self._full, self._has_moved = len(group.units), int(query.shape[2]), False
        self._heads: dict[Heads, Tensor] = {}
        self._squares: Tensor | None = None
        first, real, patches = int(vision.has_cls), real_patches(mask, units), encoding.patches(group.units[0])
        if patches is not None:
            self._squares = pad(on_device(patches.flatten(), query) + first, (first, 0))
            real = None if real is None else real[:, self._squares]
        self._inside = Inside(group, first, vision.merged, (self._full,) * units, real=real)
        self.places, encoding.inside = self._inside.counts, [self._inside]

    def attends(self, method: str, module: Any, heads: dict[Heads, Tensor], mask: Any, scaling: float) -> Any:
        self._heads, self.scaling = heads, scaling
        if not self._has_moved:
            return mask
        added = self._inside.on_keys(heads["queries"].dtype)
        if added is not None and "flash" in module.config._attn_implementation:
            raise UnsupportedModelError(NO_BIAS.format(method))
        return added

    def asked(self, tokens: Tensor) -> None:
        super().asked(tokens)
        self._heads = {}

    def tokens(self, inside: Inside, given: Tensor) -> Tensor:
        return given if self._has_moved or self._squares is None else given[:, self._squares]

    def heads(self, inside: Inside, which: Heads) -> Tensor:
        part = self._heads[which]
        return part if self._has_moved or self._squares is None else part[:, :, self._squares]

    def laid(self, parts: Sequence[Tensor]) -> Tensor:
        (tokens,), self._has_moved = parts, True
        self.places = (int(tokens.shape[1]),) * len(tokens)
        return tokens

    def whole(self, method: str, tokens: Tensor) -> Tensor:
        if self._squares is None or not self._has_moved:
            return tokens
        inside = self._inside
        if any((count - inside.first) % inside.merged for count in inside.counts):
            left = [count - inside.first for count in inside.counts]
            raise VisibenchError(NOT_WHOLE.format(method, left, inside.merged))
        places = self._squares[: tokens.shape[1]]
        return tokens.new_zeros(len(tokens), self._full, tokens.shape[2]).index_copy_(1, places, tokens)
