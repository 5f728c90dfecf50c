"""The attention function registered with transformers: it runs the model's own kernel, or hands it to who listens."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...errors import UnsupportedModelError
from ...models.support import ATTENTION
from ..packing import Packing

PREFIX = "visibench_"

Kernel = Callable[..., tuple[Tensor, Tensor | None]]
Interceptor = Callable[..., tuple[Tensor, Tensor | None]]
_interceptors: WeakKeyDictionary[nn.Module, Interceptor] = WeakKeyDictionary()


def _dispatch(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    kernel = kernel_of(module, implementation_of(module.config))
    interceptor = _interceptors.get(module)
    if interceptor is None:
        return kernel(module, query, key, value, attention_mask, **kwargs)
    return interceptor(kernel, module, query, key, value, attention_mask, **kwargs)


for _name in ATTENTION:
    if _name in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionInterface.register(PREFIX + _name, _dispatch)
        AttentionMaskInterface.register(PREFIX + _name, ALL_MASK_ATTENTION_FUNCTIONS[_name])


def implementation_of(config: Any) -> str:
    """The attention implementation that the model was loaded with, intercepted or not.

    Raises :class:`UnsupportedModelError` for one that cannot be intercepted: its masks are of a form of their own.
    """
    implementation = config._attn_implementation.removeprefix(PREFIX)
    if PREFIX + implementation not in ALL_ATTENTION_FUNCTIONS:
        raise UnsupportedModelError(
            f"attention implementation {implementation!r} cannot be observed; "
            "load the model with attn_implementation='sdpa'"
        )
    return implementation


def kernel_of(module: nn.Module, implementation: str) -> Kernel:
    """The attention function that ``module`` would use under ``implementation``."""
    if implementation == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[implementation]


class Interception:
    """While active, attention modules call ``interceptor(kernel, module, query, key, value, mask, **kwargs)``.

    Inside another one on the same modules it takes that one's place for the time being.
    """

    def __init__(self, modules: Mapping[Any, Interceptor]) -> None:
        self._modules = modules
        self._configs: dict[int, tuple[Any, str]] = {}
        self._outer: dict[Any, Interceptor | None] = {}

    def __enter__(self) -> Interception:
        for module in self._modules:
            config: Any = module.config
            self._configs.setdefault(id(config), (config, config._attn_implementation))
        intercepted = [(config, PREFIX + implementation_of(config)) for config, _ in self._configs.values()]
        for config, implementation in intercepted:
            config._attn_implementation = implementation
        self._outer = {module: _interceptors.get(module) for module in self._modules}
        _interceptors.update(self._modules)
        return self

    @property
    def is_in_place(self) -> bool:
        """Whether the attention implementation is still the one set on entry."""
        return all(config._attn_implementation.startswith(PREFIX) for config, _ in self._configs.values())

    def __exit__(self, *_: object) -> None:
        for config, implementation in self._configs.values():
            config._attn_implementation = implementation
        for module, interceptor in self._outer.items():
            if interceptor is None:
                _interceptors.pop(module, None)
            else:
                _interceptors[module] = interceptor


def attention_mask(implementation: str, valid: Tensor | None, queries: int, length: int, like: Tensor) -> Tensor | None:
    """Causal mask of the last ``queries`` of ``length`` tokens, in the form that an implementation takes.

    ``valid``: bool (B, length), None if nothing is padded. A padded query sees itself, so that no row is empty.
    """
    if "flash" in implementation:
        return valid
    if implementation == "sdpa" and valid is None and queries in (1, length):
        return None
    column = torch.arange(length, device=like.device)
    row = column[-queries:, None]
    mask = (column <= row)[None]
    if valid is not None:
        mask = mask & valid[:, None, :] | (column == row)
    mask = mask[:, None]
    if implementation == "sdpa":
        return mask
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill_(
        ~mask, torch.finfo(like.dtype).min
    )


def by_row(
    packing: Packing, kernel: Kernel, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any
) -> tuple[Tensor, None]:
    """The output (1, N, H, d) of a ``kernel`` on rows laid one behind the other: of each alone.

    ``mask``: (B or 1, 1, L, L) of the padded rows; None: causal. Flash attention takes all rows in one call.
    """
    implementation = implementation_of(module.config)
    if "flash" in implementation:
        most = max(packing.lengths)
        lengths = {"cu_seq_lens_q": packing.ends, "cu_seq_lens_k": packing.ends}
        given |= lengths | {"max_length_q": most, "max_length_k": most}
        return kernel(module, query, key, value, None, **given)[0], None
    rows = []
    for row, (first, end) in enumerate(pairwise(packing.bounds)):
        length, own = end - first, (part[:, :, first:end] for part in (query, key, value))
        if mask is None:
            rule = attention_mask(implementation, None, length, length, query)
        else:
            rule = mask[row % len(mask), None, :, -length:, -length:]
        rows.append(kernel(module, *own, rule, **given)[0])
    return torch.cat(rows, dim=1), None


def carried(mask: Tensor, queries: Tensor, keys: Tensor, valid: Tensor | None, *, ordered: bool) -> Tensor:
    """The model's own ``mask`` (B or 1, 1, L, columns), bool or added to logits, at the columns that are left.

    ``queries``: int (B, n), new columns, counted from the first; ``keys``: int (B, k), columns. ``valid``: bool (B, k),
    None if nothing is padded; a padded query sees itself. ``ordered``: no token sees a later one of its own column.
    """
    mask = mask.expand(queries.shape[0], -1, -1, -1)
    mask = mask.gather(2, queries[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    mask = mask.gather(3, keys[:, None, None, :].expand(-1, *mask.shape[1:3], -1))
    if valid is None and not ordered:
        return mask
    place = torch.arange(keys.shape[1], device=keys.device)
    own = place[-queries.shape[1] :, None]
    hides = torch.zeros_like(mask[:, 0], dtype=torch.bool) if valid is None else ~valid[:, None, :]
    if ordered:
        hides = hides | (keys[:, own[:, 0], None] == keys[:, None, :]) & (place > own)
    if mask.dtype == torch.bool:
        return mask & ~hides[:, None] | (place == own)
    return mask.masked_fill(hides[:, None], torch.finfo(mask.dtype).min).masked_fill(place == own, 0)
