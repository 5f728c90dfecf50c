"""Projectors that a tower has inside: they wait until its last block has run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn


class Postponed:
    """While active, ``modules`` put out nothing where the tower calls them, (0, D); ``forwards`` are what they do."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self.forwards: list[Callable[[Tensor], Tensor]] = []
        self._own: list[Any] = []

    def __enter__(self) -> Postponed:
        self._own = [vars(module).get("forward") for module in self._modules]
        self.forwards = [module.forward for module in self._modules]
        for module in self._modules:
            module.forward = _nothing
        return self

    def __exit__(self, *error: Any) -> None:
        for module, own in zip(self._modules, self._own, strict=True):
            del module.forward
            if own is not None:
                module.forward = own
        self.forwards = []


def _nothing(tokens: Tensor) -> Tensor:
    return tokens[:0]
