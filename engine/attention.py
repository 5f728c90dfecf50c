"""Attention maths: the function registered with transformers, and the few extra rows that methods ask for.

The registered function runs the model's own kernel. Extra rows cost O(rows · L); an L × L map never exists.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import UnsupportedModelError
from .layout import TokenLayout, TokenSet
from .packing import Before, Packing

# Rows of weights that are in memory at one time.
BLOCK = 256
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


for _name in ("eager", "sdpa", "flash_attention_2", "flash_attention_3"):
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


def repeat_heads(tensor: Tensor, heads: int) -> Tensor:
    """(B, kv heads, L, d) → (B, heads, L, d)."""
    return tensor if tensor.shape[1] == heads else tensor.repeat_interleave(heads // tensor.shape[1], dim=1)


@dataclass(frozen=True)
class Logits:
    """How a kernel makes logits of products of queries and keys: times ``scaling``, then capped at ``cap``.

    ``mask``: bool or added (B or 1, 1, L, keys), the layer's own, of all its queries; None: causal by place. ``bias``:
    (B, keys), added to the logits of all queries; None: nothing.
    """

    scaling: float
    cap: float | None = None
    mask: Tensor | None = None
    bias: Tensor | None = None

    @property
    def by_place(self) -> bool:
        """Whether they are scaled products, and who sees whom is a matter of places."""
        return self.mask is None and self.cap is None and self.bias is None

    def of(self, products: Tensor) -> Tensor:
        """Logits, without the mask and the bias."""
        logits = products * self.scaling
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def biased(self, rule: Tensor, keys: TokenSet, before: int) -> Tensor:
        """A ``rule`` (B, 1, n, ``before`` + k) for compact ``keys`` behind cached places, with their bias in it."""
        if self.bias is None:
            return rule
        bias = torch.cat([self.bias[:, :before], keys.pick(self.bias[:, before:], 1)], dim=1)
        return rule + bias[:, None, None].to(rule.dtype)

    def seen(self, queries: Tensor) -> Tensor | None:
        """Bool (B, R, keys): what new tokens see that stand at ``queries``, int (B, R), among all keys."""
        if self.mask is None:
            return None
        mask = self.mask
        mask = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2  # a bias may be in it
        shown = mask[:, 0].expand(len(queries), -1, -1)
        rows = queries - (shown.shape[2] - shown.shape[1])
        return shown.gather(1, rows[:, :, None].expand(-1, -1, shown.shape[2]))


def cap_of(module: Any, given: Mapping[str, Any]) -> float | None:
    """The soft cap with which ``module`` calls its kernel, if the kernel takes one."""
    return None if implementation_of(module.config) == "sdpa" else given.get("softcap")


def row_weights(query: Tensor, key: Tensor, columns: Tensor | None, valid: Tensor | None, logits: Logits) -> Tensor:
    """Post-softmax weights (B, H, R, L), fp32, of ``query`` rows (B, H, R, d) on ``key`` (B, kv heads, L, d).

    ``columns``: int (B, R), where the rows stand; None: they are the last R. ``valid``: bool (B, L); None: all count.
    """
    (batch, heads, rows, size), (kv_heads, length) = query.shape, key.shape[1:3]
    plain = logits.by_place and columns is None and valid is None
    if plain and rows == 1 and heads == kv_heads:
        q, k = query.reshape(batch * heads, size, 1), key.flatten(0, 1)
        products = torch.baddbmm(query.new_empty(()), k, q, beta=0, alpha=logits.scaling)
        return fine(products).softmax(1).view(batch, heads, 1, length)
    # Query heads that share keys stand one below the other, so that no key is repeated.
    q, k = query.reshape(batch * kv_heads, -1, size), key.flatten(0, 1).transpose(1, 2)
    if plain and (rows == 1 or heads == kv_heads):
        rule = query.new_empty(()) if rows == 1 else _later(rows, length, query)
        products = torch.baddbmm(rule, q, k, beta=int(rows > 1), alpha=logits.scaling)
        return fine(products).softmax(-1).view(batch, heads, rows, length)
    products = fine(torch.bmm(q, k)).view(batch, heads, rows, length)
    column = torch.arange(length, device=key.device)
    own = column[-rows:].expand(batch, -1) if columns is None else columns
    visible = logits.seen(own)
    if visible is None:
        visible = column <= own[:, :, None]
        visible = visible if valid is None else visible & valid[:, None, :]
    visible = visible | (column == own[:, :, None])
    products = logits.of(products) if logits.bias is None else logits.of(products) + logits.bias[:, None, None, :length]
    return products.masked_fill(~visible[:, None], float("-inf")).softmax(-1)


def _later(rows: int, length: int, like: Tensor) -> Tensor:
    """(R, L): minus infinity where one of the last R of L tokens would see a later one, 0 elsewhere."""
    size = -(-length // 512) * 512
    return _above_diagonal(size, like.dtype, like.device).as_strided((rows, length), (size, 1), (length - rows) * size)


@lru_cache(maxsize=4)
def _above_diagonal(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(size, size): minus infinity above the diagonal, 0 elsewhere. A table that layers share, of no batch."""
    with torch.inference_mode(False):
        return torch.full((size, size), float("-inf"), dtype=dtype, device=device).triu(1)


def fine(logits: Tensor) -> Tensor:
    """The same in fp32, or in fp64 if they are: half precision is too coarse for a ranking."""
    return logits if logits.dtype == torch.float64 else logits.float()


def weights_of(
    query: Tensor, key: Tensor, rows: TokenSet, layout: TokenLayout, before: Before | None, logits: Logits
) -> Tensor:
    """Weights (B, H, R, L) of the ``query`` of ``rows``; what was cached before takes its share."""
    if before is None and layout.is_full and rows.span is not None and rows.span[1] == layout.width and logits.by_place:
        return row_weights(query, key, None, None, logits)
    return _at(query, key, rows.index, layout, before, logits)


def weights_in_blocks(
    query: Tensor, key: Tensor, rows: TokenSet, layout: TokenLayout, before: Before | None, logits: Logits
) -> Iterator[tuple[Tensor, Tensor]]:
    """The same in blocks, and which of their rows count."""
    if rows.span is not None and rows.counts[0] <= BLOCK:
        yield weights_of(query, key, rows, layout, before, logits), rows.present
        return
    for first in range(0, max(rows.counts), BLOCK):
        block = slice(first, first + BLOCK)
        index, present = rows.index[:, block], rows.present[:, block]
        yield _at(query[:, :, block], key, index, layout, before, logits), present


def _at(
    query: Tensor, key: Tensor, index: Tensor, layout: TokenLayout, before: Before | None, logits: Logits
) -> Tensor:
    """The same of query rows standing at ``index``, int (B, R)."""
    cached = places(before)
    keys = key if before is None else torch.cat([before.keys, key], dim=2)
    return row_weights(query, keys, index + cached, counting(layout, before), logits)[..., cached:]


def counting(layout: TokenLayout, before: Before | None) -> Tensor:
    """Bool (B, p + L): which keys count."""
    return layout.valid if before is None else before.seen(layout.valid)


def places(before: Before | None) -> int:
    """Those held before."""
    return 0 if before is None else int(before.keys.shape[2])


def subset_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: TokenSet,
    keys: TokenSet,
    logits: Logits,
    cached: tuple[Tensor, Tensor, Tensor | None] | None = None,
) -> Tensor:
    """Attention (B, H, n, d) of the ``queries`` over the ``keys`` alone, both as compact tensors.

    ``cached``: keys and values (B, kv heads, p, d) that all queries see besides, and which of them count, bool (B, p).
    """
    heads = query.shape[1]
    q = queries.pick(query, 2)
    k, v = keys.pick(key, 2), keys.pick(value, 2)
    if cached is None and queries is keys and keys.is_even and logits.by_place:
        k, v = repeat_heads(k, heads), repeat_heads(v, heads)
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=logits.scaling)
    rule = _rule(queries, keys, logits, cached, query.dtype)
    rule = logits.biased(rule, keys, 0 if cached is None else cached[0].shape[2])
    if cached is not None:
        k, v = torch.cat([cached[0], k], dim=2), torch.cat([cached[1], v], dim=2)
    k, v = repeat_heads(k, heads), repeat_heads(v, heads)
    if logits.cap is None:
        return scaled_dot_product_attention(q, k, v, attn_mask=rule, scale=logits.scaling)
    return (logits.of(q @ k.transpose(-1, -2)) + rule).softmax(-1, dtype=torch.float32).to(v.dtype) @ v


def _rule(queries: TokenSet, keys: TokenSet, logits: Logits, cached: Any, dtype: torch.dtype) -> Tensor:
    """(B, 1, n, p + k): 0 for what compact queries see of what was cached and of compact keys, else minus infinity."""
    before = 0 if cached is None else cached[0].shape[2]
    shown = logits.seen(queries.index + before)
    if shown is None:
        rule = queries.sees(keys, dtype)
        if cached is None:
            return rule
        seen = rule.new_zeros(len(rule), before)
        seen = seen if cached[2] is None else seen.masked_fill(~cached[2], float("-inf"))
        return torch.cat([seen[:, None, None].expand(-1, -1, rule.shape[2], -1), rule], dim=3)
    visible = shown.gather(2, (keys.index + before)[:, None, :].expand(-1, shown.shape[1], -1))
    visible = torch.cat([shown[..., :before], visible & keys.present[:, None, :]], dim=2)
    # Places past a row's count see something, so that no row of the softmax is empty; they are thrown away later.
    hidden = ~(visible | ~queries.present[:, :, None])[:, None]
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
