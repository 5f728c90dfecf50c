"""A layer's queries and keys before it runs, and what it then need not compute again.

The layer itself projects them, so that its norms, biases, fused projections and unrotated heads are in them. Its first
norm and its projections work on each token by itself: where tokens only leave, the layer takes over what was made of
the others, and rotates it at the positions that they have then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from .attention import Interception, Kernel, Logits, cap_of

# Where these are modules of their own, and only last tokens ask, nothing else is projected to queries and values.
_OF_LAST = ("q_proj", "v_proj")
Tokens = Callable[[Tensor], Tensor]


class _Reached(Exception):
    """A layer has come as far as its attention kernel, and need not go on."""


class Projected(NamedTuple):
    """Query (B, H, L, d), key and value (B, kv heads, L, d), and how the kernel makes logits of them (no mask)."""

    query: Tensor
    key: Tensor
    value: Tensor
    logits: Logits


class Ahead:
    """What norm and projections of a decoder ``layer`` have ``made`` of its input ``tokens``, (B, L, …) each.

    ``macs``: multiply-adds that took for each token; ``row_macs``: for each row besides.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.tokens: Tensor | None = None
        self.made: dict[nn.Module, Tensor] = {}
        self.macs = self.row_macs = 0
        self._handed: dict[nn.Module, ExitStack] = {}

    def captured(
        self, hidden: Tensor, ruling: Mapping[str, Any], last: Callable[[Tokens, Tensor], Tensor] | None = None
    ) -> Projected:
        """What the layer would hand to its attention kernel; ``ruling``: its keyword arguments, without a cache.

        ``last``: of a function and tokens, what the function makes of the last token of each row, for all tokens of the
        row; queries and values may then be those. None: they are of all tokens.
        """
        reached: list[Projected] = []

        def stop(kernel: Kernel, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **rest: Any) -> Any:
            reached.append(Projected(query, key, value, Logits(rest["scaling"], cap_of(module, rest))))
            raise _Reached

        norm, attention = self.layer.input_layernorm, self.layer.self_attn
        self.tokens, self.made, self.macs, self.row_macs = hidden, {}, 0, 0
        with ExitStack() as stack:
            stack.enter_context(Interception({attention: stop}))
            stack.enter_context(suppress(_Reached))
            stack.enter_context(self._kept(norm, hidden))
            normed = norm(hidden)
            for name, module in attention.named_children():
                if last is not None and name in _OF_LAST:
                    stack.enter_context(_replaced(module, partial(self._of_last, last, module.forward)))
                else:
                    stack.enter_context(self._kept(module, normed, counted=True))
            # Not layer(…): hooks belong to the layer's real call.
            attention.forward(hidden_states=normed, past_key_values=None, **ruling)
        return reached[0]

    @contextmanager
    def _kept(self, module: nn.Module, tokens: Tensor, *, counted: bool = False) -> Iterator[None]:
        """Keep what ``module`` makes of ``tokens``, before hooks of others, which will see it again."""

        def keep(module: nn.Module, args: tuple[Any, ...], made: Any) -> None:
            if args and args[0] is tokens and isinstance(made, Tensor) and made.shape[:-1] == tokens.shape[:-1]:
                self.made[module] = made
                self.macs += counted * int(tokens.shape[-1]) * int(made.shape[-1])

        handle = module.register_forward_hook(keep, prepend=True)
        try:
            yield
        finally:
            handle.remove()

    def _of_last(self, last: Callable[[Tokens, Tensor], Tensor], forward: Tokens, tokens: Tensor) -> Tensor:
        made = last(forward, tokens)
        self.row_macs += int(tokens.shape[-1]) * int(made.shape[-1])
        return made

    def follow(self, tokens: Tensor, left: Tensor, moved: Tokens) -> None:
        """Of the ``tokens`` those are ``left`` that ``moved`` picks of whatever has their form."""
        if self.tokens is tokens:
            self.tokens, self.made = left, {module: moved(made) for module, made in self.made.items()}

    def hand_over(self, tokens: Tensor) -> int:
        """What was made of the ``tokens``, if of these, the next call of each module is answered with.

        Returns the multiply-adds that each token then does not take again.
        """
        if self.tokens is not tokens:
            self.made, self.macs = {}, 0
        self.tokens = None
        for module in self.made:
            self._handed[module] = stack = ExitStack()
            stack.enter_context(_replaced(module, partial(self._answer, module)))
        return self.macs

    def _answer(self, module: nn.Module, *_: Any, **__: Any) -> Tensor:
        self._handed.pop(module).close()
        return self.made.pop(module)

    def close(self) -> None:
        """Take back what was not asked for."""
        for stack in self._handed.values():
            stack.close()
        self.tokens, self.made, self._handed = None, {}, {}


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """While active, a call of ``module`` runs ``forward``, and its hooks."""
    own = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]
        if own is not None:
            vars(module)["forward"] = own
