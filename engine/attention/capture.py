"""What a layer would hand to its attention kernel, made by the layer itself."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from torch import Tensor

from .kernels import Interception, Kernel
from .weights import Logits, cap_of


class _Reached(Exception):
    """A layer has come as far as its attention kernel, and need not go on."""


class Projected(NamedTuple):
    """Query (B, H, L, d), key and value (B, kv heads, L, d), and how the kernel makes logits of them (no mask)."""

    query: Tensor
    key: Tensor
    value: Tensor
    logits: Logits


def captured(layer: Any, hidden: Tensor, ruling: Mapping[str, Any]) -> Projected:
    """What ``layer`` would hand to its attention kernel.

    The layer itself computes it, so that its norms, biases, fused projections and unrotated heads are in it.
    ``ruling``: its keyword arguments, without a cache.
    """
    reached: list[Projected] = []

    def stop(kernel: Kernel, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        reached.append(Projected(query, key, value, Logits(kwargs["scaling"], cap_of(module, kwargs))))
        raise _Reached

    # Not layer(…): hooks belong to the layer's real call.
    with Interception({layer.self_attn: stop}), suppress(_Reached):
        layer.self_attn.forward(hidden_states=layer.input_layernorm(hidden), past_key_values=None, **ruling)
    return reached[0]
