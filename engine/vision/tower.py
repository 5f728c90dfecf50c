"""Merging inside the vision tower: hooks that let each block go on with fewer tokens than it was given."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor, nn

from ...errors import UnsupportedModelError, VisibenchError
from ...models.adapters import Adapter
from ..attention import Interception
from ..contract import Method
from ..encoding import Encoding
from ..trace import Watch
from ..views import BlockView

UNSEEN = (
    "{} reads the vision tower, and the tower ran without it: set the attention implementation and compile before the "
    "`with` block, not inside"
)


class Tower:
    """While active, asks the method in each vision block, between attention and MLP, what to go on with.

    A block adds its MLP's output to what it has kept from before, at full length. So the merged tokens enter through
    the norm in front of the MLP, the MLP's output is kept back and zeros go on in its place, and the block's output is
    replaced by the merged tokens plus what was kept back. ``current`` returns the record of the images at hand.
    """

    def __init__(self, adapter: Adapter, method: Method, watch: Watch, current: Callable[[], Encoding]) -> None:
        self.adapter, self.method, self.watch, self.current = adapter, method, watch, current
        self._exit = ExitStack()

    def __enter__(self) -> Tower:
        family, blocks = self.adapter.family, self.adapter.vision_blocks
        with ExitStack() as stack:
            stack.enter_context(Interception({block.self_attn: self._on_attention for block in blocks}))
            for number, block in enumerate(blocks):
                norm, mlp = getattr(block, family.vision_norm), getattr(block, family.vision_mlp)
                stack.callback(norm.register_forward_pre_hook(partial(self._before_mlp, number)).remove)
                stack.callback(mlp.register_forward_hook(self._behind_mlp).remove)
                # First of the block's hooks, so that hidden states that transformers records are the merged ones.
                stack.callback(block.register_forward_hook(self._behind_block, prepend=True).remove)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._exit.close()

    def _on_attention(self, kernel: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        merging = self.current().merging
        merging.keys = k
        if merging.bias is not None:
            if "flash" in module.config._attn_implementation:
                raise UnsupportedModelError(
                    f"{self.method.name} adds to the attention logits of the vision tower, and "
                    "flash attention cannot: load the model with attn_implementation='sdpa'"
                )
            bias = merging.bias[:, None, None, :].to(q.dtype)
            mask = bias if mask is None else mask + bias
        return kernel(module, q, k, v, mask, **kwargs)

    def _before_mlp(self, number: int, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        (tokens,), encoding = args, self.current()
        if encoding.merging.keys is None:
            raise VisibenchError(UNSEEN.format(self.method.name))
        with self.watch("method"):
            merge = encoding.merging.merge = self.method.block(BlockView(number, tokens, encoding))
        encoding.merging.keys = None
        merged = tokens if merge is None else merge.tokens
        encoding.block_tokens.append((int(tokens.shape[1]), int(merged.shape[1])))
        return None if merge is None else (merged,)

    def _behind_mlp(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor | None:
        encoding = self.current()
        if encoding.merging.merge is None:
            return None
        encoding.merging.mlp_output = output
        return output.new_zeros(output.shape[0], encoding.block_tokens[-1][0], output.shape[2])

    def _behind_block(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor | None:
        merging = self.current().merging
        merge, merging.merge = merging.merge, None
        if merge is None:
            return None
        assert merging.mlp_output is not None
        merging.size, merging.bias = merge.size, merge.bias
        return merge.tokens + merging.mlp_output
