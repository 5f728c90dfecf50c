"""Fewer tokens inside the vision tower: hooks that let each block go on with others than it was given."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UnsupportedModelError, VisibenchError
from ...models.adapters import Adapter
from ..attention import Interception
from ..contract import Method
from ..decisions import BlockCut, BlockMerge, merged
from ..segment import at
from ..trace import Watch
from ..units.encoding import BlockView, Encoding, Inside

UNSEEN = (
    "{} reads the vision tower, and the tower ran without it: set the attention implementation and compile before the "
    "`with` block, not inside"
)


class Tower:
    """While active, asks the method in each vision block, behind its attention or its MLP, what to go on with.

    Behind the attention: a block adds its MLP's output to what it has kept from before, at full length. So the tokens
    that go on enter through the norm in front of the MLP, the MLP's output is kept back and zeros go on in its place,
    and the block's output is replaced by those tokens plus what was kept back. Images of which different numbers are
    left are padded to the one with the most, and what is padded is no key. Where the model uses the outputs of several
    blocks, those of earlier ones follow the tokens that later ones leave. ``current`` returns the record of the images
    at hand.
    """

    def __init__(self, adapter: Adapter, method: Method, watch: Watch, current: Callable[[], Encoding]) -> None:
        self.adapter, self.method, self.watch, self.current = adapter, method, watch, current
        vision = adapter.geometry.vision
        self._joined = () if vision is None else vision.joined_blocks
        self._exit = ExitStack()

    def __enter__(self) -> Tower:
        family, blocks = self.adapter.family, self.adapter.vision_blocks
        with ExitStack() as stack:
            stack.enter_context(Interception({block.self_attn: self._on_attention for block in blocks}))
            for number, block in enumerate(blocks):
                if self.method.block_part == "attention":
                    norm, mlp = getattr(block, family.vision_norm), getattr(block, family.vision_mlp)
                    stack.callback(norm.register_forward_pre_hook(partial(self._before_mlp, number)).remove)
                    stack.callback(mlp.register_forward_hook(self._behind_mlp).remove)
                # First of the block's hooks, so that hidden states that transformers records are those that go on.
                behind = partial(self._behind_block, number)
                stack.callback(block.register_forward_hook(behind, prepend=True).remove)
            if self._joined:
                stack.callback(self.adapter.vision_tower.register_forward_hook(self._behind_tower).remove)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._exit.close()

    def _on_attention(self, kernel: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        inside = self.current().inside
        inside.attended, inside.width = (q[:, :, :1], k, v, kwargs["scaling"]), int(k.shape[2])
        if not inside.counts:
            inside.counts = (inside.width,) * int(k.shape[0])
        added = _on_keys(inside, q.dtype)
        if added is not None:
            if "flash" in module.config._attn_implementation:
                raise UnsupportedModelError(
                    f"{self.method.name} adds to the attention logits of the vision tower, and "
                    "flash attention cannot: load the model with attn_implementation='sdpa'"
                )
            mask = added if mask is None else mask + added
        return kernel(module, q, k, v, mask, **kwargs)

    def _asked(self, number: int, tokens: Tensor) -> Tensor | None:
        """The tokens with which the images go on, None if with those they have."""
        encoding, inside = self.current(), self.current().inside
        if inside.attended is None:
            raise VisibenchError(UNSEEN.format(self.method.name))
        before, places = inside.counts, int(tokens.shape[1])
        with self.watch("method"):
            decision = self.method.block(BlockView(number, tokens, encoding))
            left = None if decision is None else _left(inside, decision, tokens, int(encoding.vision.has_cls))
        inside.attended = None
        behind_attention = self.method.block_part == "attention"
        encoding.block_tokens.append((before, inside.counts if behind_attention else before))
        encoding.block_widths.append((places, places if left is None or not behind_attention else int(left.shape[1])))
        return left

    def _before_mlp(self, number: int, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        left = self.current().inside.going_on = self._asked(number, *args)
        return None if left is None else (left,)

    def _behind_mlp(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor | None:
        inside = self.current().inside
        if inside.going_on is None:
            return None
        inside.mlp_output = output
        return output.new_zeros(output.shape[0], inside.width, output.shape[2])

    def _behind_block(self, number: int, module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor | None:
        inside = self.current().inside
        if self.method.block_part == "mlp":
            left = self._asked(number, output)
        else:
            left, inside.going_on = inside.going_on, None
            if left is not None:
                assert inside.mlp_output is not None
                left = left + inside.mlp_output
        if number in self._joined:
            inside.outputs[number] = output if left is None else left
        return left

    def _behind_tower(self, module: nn.Module, args: tuple, output: Any) -> None:
        # The first of the hidden states is the embedding.
        states, outputs = enumerate(output.hidden_states, start=-1), self.current().inside.outputs
        output.hidden_states = tuple(outputs.get(block, state) for block, state in states)


def _on_keys(inside: Inside, dtype: torch.dtype) -> Tensor | None:
    """(N, 1, 1, t): what is added to the logits of all keys; None: nothing."""
    bias = None if inside.bias is None else inside.bias.to(dtype)
    if inside.present is not None:
        absent = inside.present.new_zeros(inside.present.shape, dtype=dtype) if bias is None else bias
        bias = absent.masked_fill(~inside.present, torch.finfo(dtype).min)
    return None if bias is None else bias[:, None, None]


def _left(inside: Inside, decision: BlockMerge | BlockCut, tokens: Tensor, first: int) -> Tensor:
    """The tokens that go on, ``first`` of which (CLS) always do, and the record of them."""
    if isinstance(decision, BlockMerge):
        count, size = int(decision.tokens.shape[1]), inside.sizes(tokens)
        for block, output in inside.outputs.items():
            inside.outputs[block], _ = merged(output, size, decision.group, count)
        inside.counts, inside.patches = (count,) * len(tokens), None
        inside.size, inside.bias = decision.size, decision.bias
        return decision.tokens
    counts, width = decision.counts, max(decision.counts)
    scores = decision.scores
    if inside.present is not None:
        scores = scores.masked_fill(~inside.present[:, first:], float("-inf"))
    chosen = scores.argsort(dim=1, descending=True, stable=True)[:, :width]
    inside.present = None
    if min(counts) < width:
        place = torch.arange(width, device=tokens.device)
        there = place < torch.tensor(counts, device=tokens.device)[:, None]
        chosen = chosen.masked_fill(~there, scores.shape[1])  # to the end
        inside.present = torch.nn.functional.pad(there, (first, 0), value=True)
    chosen = chosen.sort(dim=1).values
    if inside.present is not None:
        chosen = chosen.clamp(max=scores.shape[1] - 1)
    index = torch.nn.functional.pad(chosen + first, (first, 0))
    inside.counts = tuple(count + first for count in counts)
    inside.patches = index if inside.patches is None else at(inside.patches, index)
    inside.memory = None if inside.memory is None else at(inside.memory, chosen)
    inside.size, inside.bias = (None if part is None else at(part, index) for part in (inside.size, inside.bias))
    inside.outputs = {block: at(output, index) for block, output in inside.outputs.items()}
    return at(tokens, index)
