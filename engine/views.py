"""What a method may look at. Everything is computed only when asked for, and what it costs goes into the trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from ..models.adapters import VisionGeometry
from . import attention
from .encoding import Encoding
from .layout import TokenLayout, TokenSet
from .trace import Trace

Edit = Callable[[Tensor], Tensor]
Norm = Callable[[Tensor], Tensor]
Sublayer = Literal["attention", "mlp"]


@dataclass(frozen=True)
class Before:
    """What a layer's KV cache held before this prefill: text that every query reads and no method sees.

    ``keys``, ``values``: (B, kv heads, p, d). ``valid``: bool (B, p), None if all count. ``counts``: int (B,), how many
    do, on the host.
    """

    keys: Tensor
    values: Tensor
    valid: Tensor | None
    counts: Tensor

    def seen(self, behind: Tensor) -> Tensor:
        """Bool (B, p + L): which keys count, with those ``behind``, bool (B, L)."""
        valid = behind.new_ones(behind.shape[0], self.keys.shape[2]) if self.valid is None else self.valid
        return torch.cat([valid, behind], dim=1)


class LayerView:
    """The input of a decoder layer: B rows, L tokens, V visual tokens.

    ``tokens``: hidden states of all tokens (B, L, D). ``layout``: their roles. ``final_norm``: the decoder's last norm,
    as a function. ``read``: logits (B, n, vocabulary) of hidden states (B, n, D), by that norm and the LM head.
    ``told``: the layer's keyword arguments for these tokens; ``mask``: who sees whom in it, None: causal by place.
    ``before``: what its cache held.
    """

    def __init__(
        self,
        layer: int,
        module: Any,
        layout: TokenLayout,
        hidden: Tensor,
        *,
        final_norm: Norm,
        read: Norm,
        told: Callable[[], dict[str, Any]],
        mask: Callable[[], Tensor | None],
        before: Before | None,
        trace: Trace,
    ) -> None:
        self.layer, self.layout, self.tokens, self.final_norm = layer, layout, hidden, final_norm
        self.read = read
        self._module, self._told, self._mask, self._before, self._trace = module, told, mask, before, trace

    @property
    def present(self) -> Tensor:
        """Bool (B, V): which of the V places hold a visual token of the row."""
        return self.layout.visual.present

    @cached_property
    def hidden(self) -> Tensor:
        """Hidden states of the visual tokens (B, V, D)."""
        return self.layout.visual.pick(self.tokens, 1)

    def scored(self, macs: Tensor) -> None:
        """Count int (B,) multiply-adds that the method itself spends on matrix products for each row."""
        self._trace.scored(self.layer, _with_images(self.layout, macs.cpu()))

    def preview(self, rows: TokenSet | None = None) -> Tensor:
        """Attention weights (B, H, R, L), fp32, that the layer would compute for ``rows`` (default: the last token)."""
        (weights, _), *more = self.scan(rows or self.layout.last)
        return torch.cat([weights, *(weights for weights, _ in more)], dim=2) if more else weights

    def scan(self, rows: TokenSet) -> Iterator[tuple[Tensor, Tensor]]:
        """The same for many ``rows`` in blocks: (B, H, r, L), fp32, and which of the r rows count (B, r)."""
        everything, before = self.layout.everything, self._before
        projected = attention.captured(self._module, self.tokens, self._told())
        query, key = rows.pick(projected.query, 2), projected.key
        token = sum(part.shape[1] * part.shape[3] for part in projected[:3]) * self.tokens.shape[2]
        pair, width = query.shape[1] * query.shape[3], self.layout.width
        macs = token * everything.host_counts + pair * _pairs(rows, everything, before)
        batch = self.layout.rows * (width * token + pair * max(rows.counts) * (width + _places(before)))
        self._trace.scored(self.layer, _with_images(self.layout, macs), batch)
        logits = replace(projected.logits, mask=self._mask())
        for first in range(0, max(rows.counts), attention.BLOCK):
            block = slice(first, first + attention.BLOCK)
            index = rows.index[:, block]
            yield _weights(query[:, :, block], key, index, self.layout, before, logits), rows.present[:, block]


class AttentionView:
    """The attention of a decoder layer: B rows, H query heads, L tokens, d the head size.

    ``logits``: how the kernel makes them. ``dense``: the layer's own kernel on other values (B, kv heads, L, d);
    without any, on its own. ``project``: the layer's output projection, of attention outputs (B, n, H · d) with heads
    side by side: (B, n, D). ``read``: as in :class:`LayerView`.
    """

    def __init__(
        self,
        layer: int,
        layout: TokenLayout,
        qkv: tuple[Tensor, Tensor, Tensor],
        *,
        logits: attention.Logits,
        dense: Callable[..., Tensor],
        project: Norm,
        read: Norm,
        before: Before | None,
        trace: Trace,
    ) -> None:
        self.layer, self.layout = layer, layout
        self.project, self.read = project, read
        self._query, self._key, self._value = qkv
        self._logits, self._dense, self._before, self._trace = logits, dense, before, trace

    @property
    def present(self) -> Tensor:
        """Bool (B, V): which of the V places hold a visual token of the row."""
        return self.layout.visual.present

    @cached_property
    def keys(self) -> Tensor:
        """Keys after RoPE (B, H, L, d), repeated for grouped heads."""
        return attention.repeat_heads(self._key, self._query.shape[1])

    @cached_property
    def values(self) -> Tensor:
        """Values (B, H, L, d), repeated for grouped heads."""
        return attention.repeat_heads(self._value, self._query.shape[1])

    @cached_property
    def output(self) -> Tensor:
        """The layer's own attention output (B, L, H, d), before the output projection."""
        return self._dense()

    def weights(self, rows: TokenSet | None = None) -> Tensor:
        """Post-softmax attention weights (B, H, R, L), fp32, of the asked ``rows`` (default: the last token) alone."""
        rows = rows or self.layout.last
        self._scored(rows)
        return self._weights(rows.index)

    def scan(self, rows: TokenSet) -> Iterator[tuple[Tensor, Tensor]]:
        """Attention weights of many ``rows`` in blocks: (B, H, r, L), fp32, and which of the r rows count (B, r)."""
        self._scored(rows)
        blocks = (t.split(attention.BLOCK, dim=1) for t in (rows.index, rows.present))
        for index, present in zip(*blocks, strict=True):
            yield self._weights(index), present

    def reread(self, edit: Edit, rows: TokenSet | None = None, onto: Tensor | None = None) -> Tensor:
        """Attention output (B, L, H, d) whose ``rows`` (default: all) read other values with the weights they have.

        ``edit`` gets the layer's values (B, kv heads, L, d) and returns those to read. This edits attention weights
        behind the softmax, column by column: a value of zero drops a column, the value of another token moves the
        column's mass there, and no map of weights is needed. All rows run on the layer's own kernel. The rows not
        named are those of ``onto``, or of the layer's own output.
        """
        values = edit(self._value)
        if rows is None:
            return self._dense(values)
        onto = self.output if onto is None else onto
        if max(rows.counts) == 0:
            return onto
        everything, before = self.layout.everything, self._before
        part = self._subset(values, rows, everything)
        self._trace.attended(self.layer, _pairs(rows, everything, before), _batch_pairs(rows, everything, before))
        return rows.place(part.transpose(1, 2), onto, dim=1)

    def attend(self, *parts: tuple[TokenSet, TokenSet], onto: Tensor | None = None) -> Tensor:
        """Attention output (B, L, H, d) computed in ``parts`` of (queries, keys), instead of fully.

        The queries of each part attend causally to its keys alone (a mask before the softmax), and to what was cached
        before: what is left out is not computed. Every query needs a key.
        Rows that are in no part are those of ``onto``, such as the layer's own
        output; without it every valid token must be in some part.
        """
        batch, heads, width, size = self._query.shape
        out = self._query.new_zeros(batch, width, heads, size) if onto is None else onto
        pairs, batch_pairs = torch.zeros(batch, dtype=torch.int64), 0
        for queries, keys in parts:
            if max(queries.counts) == 0:
                continue
            with self._trace.watch("model"):
                part = self._subset(self._value, queries, keys)
            out = queries.place(part.transpose(1, 2), out, dim=1)
            pairs += _pairs(queries, keys, self._before)
            batch_pairs += _batch_pairs(queries, keys, self._before)
        more = onto is not None
        pairs = _with_images(self.layout, pairs) if more else pairs
        self._trace.attended(self.layer, pairs, batch_pairs, instead=not more)
        return out

    def _scored(self, rows: TokenSet) -> None:
        """Weights of ``rows`` are computed, over all columns."""
        size, width = self._query.shape[1] * self._query.shape[3], self.layout.width + _places(self._before)
        macs = _with_images(self.layout, _pairs(rows, self.layout.everything, self._before) * size)
        self._trace.scored(self.layer, macs, self.layout.rows * max(rows.counts) * width * size)

    def _weights(self, index: Tensor) -> Tensor:
        wide = index[:, None, :, None].expand(-1, self._query.shape[1], -1, self._query.shape[3])
        query = self._query.gather(2, wide)
        return _weights(query, self._key, index, self.layout, self._before, self._logits)

    def _subset(self, values: Tensor, queries: TokenSet, keys: TokenSet) -> Tensor:
        before = self._before
        cached = None if before is None else (before.keys, before.values, before.valid)
        return attention.subset_attention(self._query, self._key, values, queries, keys, self._logits, cached)


class SublayerView:
    """What the attention or the MLP of a decoder layer made of its input: B rows, L tokens.

    ``name``: which of them. ``inputs``: (B, L, D) of all tokens, behind the norm in front of it. ``outputs``: the same,
    before they are added to the residual stream. ``layout``: the roles of the tokens.
    """

    def __init__(self, layer: int, name: Sublayer, layout: TokenLayout, inputs: Tensor, outputs: Tensor) -> None:
        self.layer, self.name, self.layout, self.inputs, self.outputs = layer, name, layout, inputs, outputs

    @property
    def present(self) -> Tensor:
        """Bool (B, V): which of the V places hold a visual token of the row."""
        return self.layout.visual.present


class VisionView:
    """The output of the vision tower: N images (of all rows, in order), P patches each."""

    def __init__(self, encoding: Encoding) -> None:
        self._encoding = encoding

    @property
    def features(self) -> Tensor:
        """(N, P, Dv): what enters the projector."""
        assert self._encoding.features is not None
        return self._encoding.features

    @property
    def projected(self) -> Tensor:
        """(N, P, D): what leaves the projector; only in :meth:`~visibench.methods.Forward.projected`."""
        assert self._encoding.projected is not None
        return self._encoding.projected

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self._encoding.vision.grid

    @property
    def vision(self) -> VisionGeometry:
        """Sizes of the vision side."""
        return self._encoding.vision

    @property
    def cls(self) -> Tensor:
        """The feature (N, Dv) of the CLS token, for methods with ``vision_cls``."""
        assert self._encoding.cls is not None
        return self._encoding.cls

    @property
    def present(self) -> Tensor:
        """Bool (N, P): all true, images have no padding."""
        return torch.ones(self.features.shape[:2], dtype=torch.bool, device=self.features.device)

    def cls_weights(self, block: int = -1, *, single_head: bool = False) -> Tensor:
        """Attention weights (N, heads, P), fp32, from CLS to the patches in a vision block.

        ``block`` counts back from the block whose output the model uses as features (-1: that block itself, 0: the
        one after it). ``single_head``: weights (N, 1, P) as if the block had one head of the full width.
        """
        query, key, scaling = self._encoding.blocks[block]
        self._encoding.scored(key.shape[1] * key.shape[2] * key.shape[3])
        query = query[:, :, :1]
        if single_head:
            query, key = (t.transpose(1, 2).flatten(2)[:, None] for t in (query, key))
            scaling = query.shape[3] ** -0.5
        logits = attention.fine(query @ key.transpose(-1, -2)).squeeze(2)
        return (logits * scaling).softmax(-1)[:, :, 1:]

    def received(self, block: int = -1) -> Tensor:
        """Attention (N, P), fp32, that each patch receives in a vision block: mean over heads and all queries.

        CLS is one of the queries. For blocks that the method names in ``blocks_received``; rows are taken in blocks.
        """
        encoding = self._encoding
        got = encoding.received.get(block)
        got = attention.received(*encoding.blocks[block]) if got is None else got
        encoding.scored(encoding.vision.hidden * got.shape[1] ** 2)
        return got[:, int(encoding.vision.has_cls) :]

    def keys(self, block: int = -1) -> Tensor:
        """Keys (N, heads, P, d) of the patches in a vision block."""
        return self._encoding.blocks[block][1][:, :, 1:]

    def scored(self, macs: int) -> None:
        """Count ``macs`` multiply-adds an image that the method itself spent on matrix products."""
        self._encoding.scored(macs)


class BlockView:
    """A block of the vision tower, behind its attention or its MLP as the method says: N images, P patches each.

    ``block``: its number. ``tokens``: hidden states (N, t, Dv) of all tokens, CLS first where there is one. ``vision``:
    sizes of the tower. ``counts``: the patches of each image, on the host.
    """

    def __init__(self, block: int, tokens: Tensor, encoding: Encoding) -> None:
        assert encoding.inside.attended is not None
        self._query, self.keys, self.values, self._scaling = encoding.inside.attended
        self.block, self.tokens, self.vision = block, tokens, encoding.vision
        self.counts = tuple(count - int(self.vision.has_cls) for count in encoding.inside.counts)
        self._encoding, self._inside = encoding, encoding.inside

    @property
    def size(self) -> Tensor:
        """(N, t), fp32: how many of the image's tokens each token stands for."""
        size = self._inside.size
        return self.tokens.new_ones(self.tokens.shape[:2], dtype=torch.float32) if size is None else size

    @property
    def memory(self) -> Tensor | None:
        """(N, P): what the method set here in an earlier block, of the patches that are left; None if nothing."""
        return self._inside.memory

    @memory.setter
    def memory(self, values: Tensor) -> None:
        self._inside.memory = values

    def cls_logits(self, of: Literal["keys", "values"] = "keys") -> Tensor:
        """Logits (N, heads, t), fp32, of CLS's attention; with ``of="values"`` products of its value and each token's.

        Minus infinity where there is no token, so that a softmax over all is one over those that are there.
        """
        if of == "keys":
            logits = attention.fine(self._query @ self.keys.transpose(-1, -2)) * self._scaling
        else:
            logits = attention.fine(self.values[:, :, :1] @ self.values.transpose(-1, -2))
        width = self.keys.shape[1] * self.keys.shape[3]
        self.scored(tuple((count + 1) * width for count in self.counts))
        if self._inside.present is not None:
            logits = logits.masked_fill(~self._inside.present[:, None, None], float("-inf"))
        return logits.squeeze(2)

    def scored(self, macs: int | tuple[int, ...]) -> None:
        """Count ``macs`` multiply-adds that the method itself spent on matrix products: an int, or one of each image.

        Where images differ each is taken to be padded to the largest.
        """
        self._encoding.scored(macs)


def _weights(
    query: Tensor, key: Tensor, index: Tensor, layout: TokenLayout, before: Before | None, logits: attention.Logits
) -> Tensor:
    """Weights (B, H, R, L) of query rows standing at ``index``, int (B, R); what was cached before takes its share."""
    if before is None:
        return attention.row_weights(query, key, index, layout.valid, logits)
    cached, keys = _places(before), torch.cat([before.keys, key], dim=2)
    return attention.row_weights(query, keys, index + cached, before.seen(layout.valid), logits)[..., cached:]


def _places(before: Before | None) -> int:
    return 0 if before is None else before.keys.shape[2]


def _pairs(queries: TokenSet, keys: TokenSet, before: Before | None) -> Tensor:
    return queries.host_counts * (keys.host_counts if before is None else keys.host_counts + before.counts)


def _batch_pairs(queries: TokenSet, keys: TokenSet, before: Before | None) -> int:
    """Pairs that compact tensors of both have: rows are padded to the one with the most."""
    return len(queries.counts) * max(queries.counts) * (max(keys.counts) + _places(before))


def _with_images(layout: TokenLayout, work: Tensor) -> Tensor:
    """Work on rows that have no visual tokens (left) is the batch's doing; alone they would not be asked."""
    return work * (layout.visual.host_counts > 0)
