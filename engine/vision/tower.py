"""Fewer tokens inside the vision tower: hooks that let each block go on with others than it was given."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor, nn

from ...errors import VisibenchError
from ...models.adapters import Adapter
from ..attention import Interception
from ..contract import BlockCut, BlockMerge, Method
from ..trace import Watch
from ..units.blocks import BlockView, Form, Heads
from ..units.encoding import Encoding
from ..units.inside import Inside
from .forms import Batched
from .postponed import Postponed
from .sequence import OneSequence

UNSEEN = (
    "{} reads the vision tower, and the tower ran without it: set the attention implementation and compile before the "
    "`with` block, not inside"
)
TOO_LATE = "{0}.block: the model uses what block {2} puts out, and block {1} comes behind it: answer with None there"


class Tower:
    """While active, asks the method in each vision block, behind its attention or its MLP, what to go on with.

    It is asked about units of one shape together. Behind the attention: a block adds its MLP's output to what it has
    kept from before, at full length. So the tokens that go on enter through the norm in front of the MLP, the MLP's
    output is kept back and zeros go on in its place, and the block's output is replaced by those tokens plus what was
    kept back, scaled as the block scales it. Units of which different numbers are left are padded to the one with the
    most, and what is padded is no key. Where the model uses the outputs of several blocks, those of earlier ones follow
    the tokens that later ones leave. ``current`` returns the record of the images at hand; its ``form`` knows how
    tokens lie in the tower's tensors.
    """

    def __init__(self, adapter: Adapter, method: Method, watch: Watch, current: Callable[[], Encoding]) -> None:
        self.adapter, self.method, self.watch, self.current = adapter, method, watch, current
        vision = adapter.geometry.vision
        assert vision is not None
        self._vision, self._inner = vision, Postponed(adapter.inner_projectors)
        self._exit = ExitStack()

    def __enter__(self) -> Tower:
        family, blocks = self.adapter.family, self.adapter.vision_blocks
        with ExitStack() as stack:
            attentions = (getattr(block, family.vision_attention) for block in blocks)
            stack.enter_context(Interception(dict.fromkeys(attentions, self._on_attention)))
            for number, block in enumerate(blocks):
                if self.method.block_part == "attention":
                    norm, mlp = getattr(block, family.vision_norm), getattr(block, family.vision_mlp)
                    stack.callback(norm.register_forward_pre_hook(partial(self._before_mlp, number)).remove)
                    stack.callback(mlp.register_forward_hook(self._behind_mlp).remove)
                if family.order is not None:
                    before = partial(self._before_block, number)
                    stack.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
                # First of the block's hooks, so that hidden states that transformers records are those that go on.
                behind = partial(self._behind_block, number)
                stack.callback(block.register_forward_hook(behind, prepend=True).remove)
            if self._vision.joined_blocks or self._vision.inner_blocks:
                stack.enter_context(self._inner)
                stack.callback(self.adapter.vision_tower.register_forward_hook(self._behind_tower).remove)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._exit.close()

    def _before_block(self, number: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        """Of a tower of one sequence: what the block is told of that which is left."""
        encoding, vision = self.current(), self._vision
        with self.watch("method"):
            if encoding.form is None:
                encoding.form = OneSequence(encoding, self.method.name, args[0])
            windowed = vision.window is not None and number not in vision.full_blocks
            return args, kwargs | encoding.form.told(kwargs, encoding.read, windowed=windowed)

    def _on_attention(self, kernel: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        encoding = self.current()
        if encoding.form is None:
            encoding.form = Batched(encoding, q, mask)
        heads: dict[Heads, Tensor] = {"queries": q, "keys": k, "values": v}
        mask = encoding.form.attends(self.method.name, module, heads, mask, kwargs["scaling"])
        return kernel(module, q, k, v, mask, **kwargs)

    def _asked(self, number: int, tokens: Tensor) -> Tensor | None:
        """The tokens with which the units go on, as they lie in the tower; None if with those they have."""
        encoding = self.current()
        form: Form | None = encoding.form
        if form is None or form.scaling is None:
            raise VisibenchError(UNSEEN.format(self.method.name))
        counts, places = encoding.inside_counts, form.places
        with self.watch("method"):
            views = [BlockView(number, tokens, encoding, inside, form) for inside in encoding.inside]
            decisions = [self._answer(inside, view) for inside, view in zip(encoding.inside, views, strict=True)]
            left = None
            if any(decision is not None for decision in decisions):
                every = zip(encoding.inside, views, decisions, strict=True)
                left = form.laid([v.tokens if d is None else inside.going_on(d, v.tokens) for inside, v, d in every])
        form.asked(tokens)
        behind_attention = self.method.block_part == "attention"
        encoding.block_pairs.append(form.pairs)
        encoding.block_tokens.append((counts, encoding.inside_counts if behind_attention else counts))
        encoding.block_places.append((places, form.places if behind_attention else places))
        return left

    def _answer(self, inside: Inside, view: BlockView) -> BlockCut | BlockMerge | None:
        decision = self.method.block(view)
        if decision is None:
            return None
        if view.block > self._vision.feature_block:
            raise VisibenchError(TOO_LATE.format(self.method.name, view.block, self._vision.feature_block))
        inside.check(decision, self.method.name)
        return decision

    def _before_mlp(self, number: int, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        left = self._asked(number, *args)
        self.current().form.going_on = left
        return None if left is None else (left,)

    def _behind_mlp(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor | None:
        form: Form = self.current().form
        if form.going_on is None:
            return None
        form.mlp_output = output
        return output.new_zeros(form.shape)

    def _behind_block(self, number: int, module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor | None:
        encoding, scale = self.current(), self.adapter.family.vision_scale
        form: Form = encoding.form
        if self.method.block_part == "mlp":
            left = self._asked(number, output)
        else:
            left, form.going_on = form.going_on, None
            if left is not None:
                made, form.mlp_output = form.mlp_output, None
                assert made is not None
                left = left + (made if scale is None else getattr(module, scale) * made)
        if number in (*self._vision.joined_blocks, *self._vision.inner_blocks):
            for inside in encoding.inside:
                inside.outputs[number] = form.tokens(inside, output if left is None else left)
        if number + 1 == len(self.adapter.vision_blocks):
            return form.whole(self.method.name, output if left is None else left)
        return left

    def _behind_tower(self, module: nn.Module, args: tuple, output: Any) -> None:
        encoding, blocks = self.current(), self._vision.inner_blocks
        if blocks:
            made = zip(self._inner.forwards, blocks, strict=True)
            output.deepstack_features = [encoding.form.projected(projector, block) for projector, block in made]
            return
        (inside,) = encoding.inside
        # The first of the hidden states is the embedding.
        states = enumerate(output.hidden_states, start=-1)
        output.hidden_states = tuple(inside.outputs.get(block, state) for block, state in states)
