"""Merging inside the vision tower: hooks that let each block go on with fewer tokens than it was given."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..errors import UnsupportedModelError
from .attention import Interception
from .views import BlockView

if TYPE_CHECKING:
    from ..models.adapters import Adapter
    from .contract import BlockMerge, Method
    from .vision import VisionTap


class Tower:
    """While active, asks the method in each vision block, between attention and MLP, what to go on with.

    A block adds its MLP's output to what it has kept from before, at full length. So the merged tokens enter through
    the norm in front of the MLP, the MLP's output is kept back and zeros go on in its place, and the block's output is
    replaced by the merged tokens plus what was kept back. ``tokens``: how many there were at the attention and at the
    MLP of each block.
    """

    def __init__(self, adapter: Adapter, method: Method, tap: VisionTap) -> None:
        self.adapter, self.method, self.tap = adapter, method, tap
        self.forget()
        self._exit = ExitStack()

    def forget(self) -> None:
        """The images were others."""
        self.tokens: list[tuple[int, int]] = []
        self._size: Tensor | None = None
        self._bias: Tensor | None = None
        self._keys: Tensor | None = None
        self._merge: BlockMerge | None = None
        self._mlp_output: Tensor | None = None

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
        self.forget()

    def _on_attention(self, kernel: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        self._keys = k
        if self._bias is not None:
            if "flash" in module.config._attn_implementation:
                raise UnsupportedModelError(
                    f"{self.method.name} adds to the attention logits of the vision tower, and "
                    "flash attention cannot: load the model with attn_implementation='sdpa'"
                )
            bias = self._bias[:, None, None, :].to(q.dtype)
            mask = bias if mask is None else mask + bias
        return kernel(module, q, k, v, mask, **kwargs)

    def _before_mlp(self, number: int, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        (tokens,), vision = args, self.tap.vision
        assert self._keys is not None
        view = BlockView(number, tokens, self._keys, self._size, vision, self.tap)
        with self.tap.watch("method"):
            self._keys, self._merge = None, self.method.block(view)
        merged = tokens if self._merge is None else self._merge.tokens
        self.tokens.append((int(tokens.shape[1]), int(merged.shape[1])))
        return None if self._merge is None else (merged,)

    def _behind_mlp(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor | None:
        if self._merge is None:
            return None
        self._mlp_output = output
        return output.new_zeros(output.shape[0], self.tokens[-1][0], output.shape[2])

    def _behind_block(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor | None:
        merge, self._merge = self._merge, None
        if merge is None:
            return None
        assert self._mlp_output is not None
        self._size, self._bias = merge.size, merge.bias
        return merge.tokens + self._mlp_output
