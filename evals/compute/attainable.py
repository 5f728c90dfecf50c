"""What of a promised speed-up a model gives at all: its plain layers on a method's own schedule of tokens.

A prefill of the model itself, without method and engine, in which each decoder layer gets as many tokens as the method
left it. A method that costs nothing, under an engine that costs nothing, is as fast as that.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from ...engine.trace import Trace
from ...methods import Method
from ...models import LoadedModel
from .timing import clock_of, undisturbed


def schedule(trace: Trace, method: Method, loaded: LoadedModel) -> list[int] | None:
    """Tokens of a row at each decoder layer, as the method left them; where rows differ, their mean.

    None where plain layers cannot follow: the method changes what the vision tower runs, or the model adds features to
    all tokens of the prompt behind some layers.
    """
    if {"image", "tower"} & set(method.hook_points) or loaded.adapter.family.deepstack:
        return None
    return [ceil(tokens / trace.prompt.rows) for tokens in trace.batch_tokens()]


def time_plain(loaded: LoadedModel, inputs: dict[str, Any], tokens: Sequence[int]) -> float:
    """Milliseconds of one prefill in which layer l gets the first ``tokens[l]`` tokens of each row."""
    clock, plain = clock_of(loaded.model.device), Plain(tokens)
    with ExitStack() as stack:
        for number, layer in enumerate(loaded.adapter.layers):
            hook = partial(plain.enter, number)
            stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        stack.enter_context(undisturbed(clock))
        start = clock.mark()
        loaded.model(**inputs, use_cache=True, logits_to_keep=1)
        end = clock.mark()
    return clock.between(start, end)


class Plain:
    """Cuts what layers are handed to their number of ``tokens``: by slices, made once for each number."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = tokens
        self._first: Tensor | None = None
        self._told: dict[int, dict[str, Any]] = {}

    def enter(self, layer: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Arguments with which a decoder layer goes on."""
        hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        if layer == 0:
            self._first, self._told = hidden, {}
        assert self._first is not None
        count, width = self.tokens[layer], hidden.shape[1]
        if count < width:
            hidden = hidden[:, :count]
        elif count > width:  # tokens that were held aside come back
            hidden = torch.cat([hidden, self._first[:, width:count]], dim=1)
        if count == self._first.shape[1]:
            return (hidden, *args), kwargs
        if count not in self._told:
            self._told[count] = _cut(kwargs, count)
        return (hidden, *args), kwargs | self._told[count]


def _cut(kwargs: dict[str, Any], count: int) -> dict[str, Any]:
    """What a layer is told about ``count`` tokens alone."""
    mask, places = kwargs.get("attention_mask"), kwargs.get("position_ids")
    return {
        "attention_mask": mask if mask is None or mask.ndim != 4 else mask[..., :count, :count],
        "position_ids": places if places is None else places[..., :count],
        "position_embeddings": tuple(part[..., :count, :] for part in kwargs["position_embeddings"]),
    }
