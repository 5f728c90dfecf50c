"""The few rows of attention that methods ask for. They cost O(rows · L); an L × L map never exists."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..layout import TokenLayout, TokenSet
from ..packing import Before
from .kernels import implementation_of

# Rows of weights that are in memory at one time.
BLOCK = 256


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


@torch.no_grad()
def row_weights(query: Tensor, key: Tensor, columns: Tensor | None, valid: Tensor | None, logits: Logits) -> Tensor:
    """Post-softmax weights (B, H, R, L), fp32, of ``query`` rows (B, H, R, d) on ``key`` (B, kv heads, L, d).

    ``columns``: int (B, R), where the rows stand; None: they are the last R. ``valid``: bool (B, L); None: all count.
    """
    (batch, heads, rows, size), (kv_heads, length) = query.shape, key.shape[1:3]
    plain = logits.by_place and columns is None and valid is None
    if plain and heads == kv_heads:
        if rows == 1:
            return last_weights(query, key, logits.scaling).view(batch, heads, 1, length)
        return causal_weights(query, key, 0, rows, logits.scaling).view(batch, heads, rows, length)
    # Query heads that share keys stand one below the other, so that no key is repeated.
    q, k = query.reshape(batch * kv_heads, -1, size), key.flatten(0, 1).transpose(1, 2)
    if plain and rows == 1:
        products = torch.baddbmm(_nothing(query.dtype, query.device), q, k, beta=0, alpha=logits.scaling)
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
    return _softmax(products.masked_fill_(~visible[:, None], float("-inf")))


@torch.no_grad()
def causal_weights(query: Tensor, key: Tensor, first: int, end: int, scaling: float) -> Tensor:
    """The same, (B · H, R, n), of the queries (B, H, L, d) at places ``first`` … ``end``, on n keys (B, H, K, d).

    The last L of the keys stand at the places of the queries, and there are as many heads of both.
    """
    seen = key.shape[2] - query.shape[2] + end
    q, k = _folded(query, first, end), _folded(key, 0, seen, turned=True)
    return _softmax(fine(torch.baddbmm(_later(end - first, seen, query.dtype, query.device), q, k, alpha=scaling)))


@torch.no_grad()
def last_weights(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """The same, (B · kv heads, L, G), of the last query, which sees all keys; G heads share each of them."""
    nothing, k = _nothing(query.dtype, query.device), _folded(key, 0, key.shape[2])
    return fine(torch.baddbmm(nothing, k, last_of(query, 2, key.shape[1]), beta=0, alpha=scaling)).softmax(1)


def last_of(tokens: Tensor, dim: int, kv_heads: int) -> Tensor:
    """(B · kv heads, d, G): the last along ``dim``, 1 or 2, of tokens of H heads; one view where there is one row."""
    heads, size = tokens.shape[3 - dim], tokens.shape[3]
    shared = heads // kv_heads
    if len(tokens) == 1:
        head, place, unit = tokens.stride(3 - dim), tokens.stride(dim), tokens.stride(3)
        begin = tokens.storage_offset() + (tokens.shape[dim] - 1) * place
        return tokens.as_strided((kv_heads, size, shared), (shared * head, unit, head), begin)
    return tokens.select(dim, -1).reshape(-1, shared, size).transpose(1, 2)


@dataclass(frozen=True)
class Contributions:
    """What each key j contributes to the last query's attention output a, heads side by side: c_j, weight times value.

    ``sums``: 2 · B · n numbers, fp32, a · c_j and |c_j|. All c_j add up to a. ``visual``: which keys are visual tokens.
    """

    sums: Tensor
    rows: int
    visual: slice

    def of_visual(self, sums: Any) -> tuple[Any, Any, Any]:
        """a · c_j (B, V), |c_j| (B, V) and |a|² (B, 1) out of the ``sums``, here or read back to the host."""
        dot, norm = sums.reshape(2, self.rows, -1)
        return dot[:, self.visual], norm[:, self.visual], dot.sum(1)[:, None]


@torch.no_grad()
def contributions(weights: Tensor, value: Tensor, output: Tensor) -> Tensor:
    """(2, n) or (2, B, n): the sums of :class:`Contributions`.

    ``weights``: (B · kv heads, n, G), ``value``: (B, kv heads, n, d), ``output``: (B, L, H, d). Two small products and
    no copy of values in fp32.
    """
    batch, values = len(value), _folded(value, 0, value.shape[2])
    along = torch.bmm(values, last_of(output, 1, value.shape[1]))
    norms = torch.linalg.vector_norm(values, dim=2, keepdim=True, dtype=weights.dtype)
    dots, lengths = torch._foreach_mul([weights, weights], [along, norms])
    if batch == 1:
        return torch.stack([dots.sum((0, 2)), torch.linalg.vector_norm(lengths, dim=(0, 2))])
    dots, lengths = (part.unflatten(0, (batch, -1)) for part in (dots, lengths))
    return torch.stack([dots.sum((1, 3)), torch.linalg.vector_norm(lengths, dim=(1, 3))])


def _folded(tokens: Tensor, first: int, end: int, *, turned: bool = False) -> Tensor:
    """(B · H, n, d), or ``turned`` (B · H, d, n): places ``first`` … ``end`` of (B, H, L, d), a view if possible."""
    (batch, heads, _, size), (row, head, place, unit) = tokens.shape, tokens.stride()
    if batch == 1 or row == heads * head:
        shape, steps = (batch * heads, end - first, size), (head, place, unit)
        if turned:
            shape, steps = (shape[0], shape[2], shape[1]), (head, unit, place)
        return tokens.as_strided(shape, steps, tokens.storage_offset() + first * place)
    part = tokens[:, :, first:end].flatten(0, 1)
    return part.transpose(1, 2) if turned else part


def _softmax(logits: Tensor) -> Tensor:
    """In place: new memory of that size costs a CPU several times as long as the softmax."""
    return torch.softmax(logits, -1, out=logits)


@lru_cache(maxsize=8)
def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    """What products are added to that are added to nothing."""
    with torch.inference_mode(False):
        return torch.zeros((), dtype=dtype, device=device)


def _later(rows: int, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(R, L): minus infinity where one of the last R of L tokens would see a later one, 0 elsewhere."""
    size = -(-length // 512) * 512
    return _above_diagonal(size, dtype, device).as_strided((rows, length), (size, 1), (length - rows) * size)


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
    if is_plain(layout, before, logits) and rows.span is not None and rows.span[1] == layout.width:
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


def is_plain(layout: TokenLayout, before: Before | None, logits: Logits) -> bool:
    """Whether each token sees itself and all in front of it, and logits are scaled products."""
    return before is None and layout.is_full and logits.by_place


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


def written(rows: TokenSet, new: Tensor, onto: Tensor) -> Tensor:
    """``onto`` (B, L, H, d) with these ``rows`` as in ``new`` (B, H, n, d); in place where they are one run."""
    if rows.span is None:
        return rows.place(new.transpose(1, 2), onto, dim=1)
    (batch, _, heads, size), (row, place, head, unit) = onto.shape, onto.stride()
    shape, steps = (batch, heads, rows.counts[0], size), (row, head, place, unit)
    onto.as_strided(shape, steps, onto.storage_offset() + rows.span[0] * place).copy_(new)
    return onto


def _rule(queries: TokenSet, keys: TokenSet, logits: Logits, cached: Any, dtype: torch.dtype) -> Tensor:
    """(B, 1, n, p + k): 0 for what compact queries see of what was cached and of compact keys, else minus infinity."""
    before = 0 if cached is None else cached[0].shape[2]
    shown = None if logits.mask is None else logits.seen(queries.index + before)
    if shown is None:
        rule = causal_rule(queries, keys, dtype)
        if cached is None:
            return rule
        rule = rule.expand(len(cached[0]), -1, -1, -1)
        seen = rule.new_zeros(len(rule), before)
        seen = seen if cached[2] is None else seen.masked_fill(~cached[2], float("-inf"))
        return torch.cat([seen[:, None, None].expand(-1, -1, rule.shape[2], -1), rule], dim=3)
    visible = shown.gather(2, (keys.index + before)[:, None, :].expand(-1, shown.shape[1], -1))
    visible = torch.cat([shown[..., :before], visible & keys.present[:, None, :]], dim=2)
    # Places past a row's count see something, so that no row of the softmax is empty; they are thrown away later.
    hidden = ~(visible | ~queries.present[:, :, None])[:, None]
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))


def largest_weights(query: Tensor, key: Tensor, first: int, end: int, scaling: float) -> Tensor:
    """(B, R, n): of :func:`causal_weights` the largest over heads."""
    weights = causal_weights(query, key, first, end, scaling)
    return weights.amax(0, keepdim=True) if len(query) == 1 else weights.unflatten(0, query.shape[:2]).amax(1)


def causal_rule(queries: TokenSet, keys: TokenSet, dtype: torch.dtype) -> Tensor:
    """(B or 1, 1, n, k): 0 where one of ``queries`` sees one of ``keys`` causally, minus infinity elsewhere. Made once.

    Places past a row's count see something, so that no row of a softmax is empty.
    """
    if id(keys) not in queries.rules:
        queries.rules[id(keys)] = keys, _causal_rule(queries, keys, dtype)
    return queries.rules[id(keys)][1]


def _causal_rule(queries: TokenSet, keys: TokenSet, dtype: torch.dtype) -> Tensor:
    if queries.span and keys.span and keys.span[0] <= queries.span[0] and keys.span[1] == queries.span[1]:
        return _later(queries.counts[0], keys.counts[0], dtype, queries.device)[None, None]
    hidden = keys.index[:, None, :] > queries.index[:, :, None]
    if not keys.is_even:
        hidden = hidden | ~keys.present[:, None, :]
    if not queries.is_even:
        hidden = hidden & queries.present[:, :, None]
    rule = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
    return rule[:, None]
