"""What a method may look at. Everything is computed only when asked for, and what it costs goes into the trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from . import attention
from .ahead import Ahead, Projected
from .layout import TEXT, VISUAL, TokenLayout, TokenSet
from .packing import Before, Packing, Parts
from .trace import OnHost, Trace

Edit = Callable[[Tensor], Tensor]
Norm = Callable[[Tensor], Tensor]
Sublayer = Literal["attention", "mlp"]


class DecoderView:
    layout: TokenLayout

    @property
    def present(self) -> Tensor:
        """Bool (B, V): which of the V places hold a visual token of the row."""
        return self.layout.visual.present


class LayerView(DecoderView):
    """The input of a decoder layer: B rows, L tokens, V visual tokens.

    ``layout``: the roles of all tokens. ``ahead``: what the layer is made to compute before it runs. ``final_norm``:
    the decoder's last norm, as a function. ``read``: logits (B, n, vocabulary) of hidden states (B, n, D), by that norm
    and the LM head. ``told``: the layer's keyword arguments for these tokens; ``mask``: who sees whom in it, None:
    causal by place. ``bias``: what is added to the logits of all keys. ``before``: what its cache held.
    """

    def __init__(
        self,
        layer: int,
        layout: TokenLayout,
        hidden: Tensor,
        *,
        ahead: Ahead,
        packing: Packing | None,
        positions: Tensor,
        final_norm: Norm,
        read: Norm,
        told: Callable[[], dict[str, Any]],
        mask: Callable[[], Tensor | None],
        bias: Tensor | None,
        before: Before | None,
        trace: Trace,
    ) -> None:
        self.layer, self.layout, self.final_norm, self.read = layer, layout, final_norm, read
        self._laid, self._packing = hidden, packing
        self._ahead, self._told, self._mask, self._before, self._trace = ahead, told, mask, before, trace
        self._bias, self._positions = bias, positions

    @cached_property
    def tokens(self) -> Tensor:
        """Hidden states of all tokens (B, L, D)."""
        return self._laid if self._packing is None else self._packing.spread(self._laid)

    @cached_property
    def hidden(self) -> Tensor:
        """Hidden states of the visual tokens (B, V, D)."""
        return self.layout.visual.pick(self.tokens, 1)

    @property
    def positions(self) -> Tensor:
        """Int (B, V), or (B, V, 3) where the model has three axes: positions of the visual tokens, as it gave them."""
        return self.layout.visual.pick(self._positions, 1)

    def ask(self, answer: Tensor) -> Any:
        """Read the one ``answer`` back to the host as Python has it: a bool, or numbers (B,). This waits for the
        device, and is counted like the reads of cuts."""
        self._trace.host_syncs += 1
        return answer.tolist()

    def scored(self, macs: Tensor | Sequence[int], batch: int | None = None) -> None:
        """Count int (B,) multiply-adds that the method itself spends on matrix products for each row; ``batch``: for
        all, where that is not as many for each as for the one with the most."""
        work = macs.cpu().numpy() if isinstance(macs, Tensor) else np.array(macs)
        self._trace.scored(self.layer, _with_images(self.layout, work), batch)

    def projected(self, *, rotated: bool = True) -> tuple[Tensor, Tensor, float]:
        """Queries (B, H, L, d) and keys (B, kv heads, L, d) that the layer would compute, and the scaling of products.

        With ``rotated=False`` as they are in front of the rotary embedding.
        """
        told = self._told()
        if not rotated:
            cosine, sine = told["position_embeddings"]
            told["position_embeddings"] = torch.ones_like(cosine), torch.zeros_like(sine)
        made = self._captured(told)
        return made.query, made.key, made.logits.scaling

    def attending(self) -> tuple[Tensor, Tensor, Tensor, float]:
        """The same queries and keys with values (B, kv heads, L, d), and the scaling of products."""
        query, key, value, logits = self._captured(self._told())
        return query, key, value if self._packing is None else self._packing.spread(value, 2), logits.scaling

    def _captured(self, told: dict[str, Any], rows: TokenSet | None = None) -> Projected:
        """Queries and keys of all tokens by row, values as they are laid; queries of ``rows`` count, or all."""
        ahead, laid = self._ahead, self._laid
        made = ahead.captured(laid, told, self._of_last if rows is self.layout.last else None)
        macs = _with_images(self.layout, ahead.macs * np.array(self.layout.lengths) + ahead.row_macs)
        self._trace.scored(self.layer, macs, ahead.macs * laid.shape[:2].numel() + ahead.row_macs * self.layout.rows)
        if self._packing is not None:
            spread = self._packing.spread
            made = made._replace(query=spread(made.query, 2), key=spread(made.key, 2))
        return made

    def _of_last(self, made: Norm, tokens: Tensor) -> Tensor:
        """What is ``made`` of the last token of each row, for all tokens (B, L, D) or (1, N, D) as they are laid."""
        if self._packing is not None:
            return self._packing.of_last(made, tokens)
        return made(tokens[:, -1:]).expand(-1, tokens.shape[1], -1)

    def hand_over(self, left: TokenLayout, tokens: Tensor) -> None:
        """What was projected of the tokens that are ``left`` the layer takes over; ``tokens``: its input, of these."""
        saved = self._ahead.hand_over(tokens)
        macs = _with_images(self.layout, saved * np.array(left.lengths))
        self._trace.scored(self.layer, -macs, -saved * tokens.shape[:2].numel())

    def preview(self, rows: TokenSet | None = None) -> Tensor:
        """Attention weights (B, H, R, L), fp32, that the layer would compute for ``rows`` (default: the last token)."""
        rows = rows or self.layout.last
        query, key, logits = self._asked(rows)
        return attention.weights_of(query, key, rows, self.layout, self._before, logits)

    def scan(self, rows: TokenSet) -> Iterator[tuple[Tensor, Tensor]]:
        """The same for many ``rows`` in blocks: (B, H, r, L), fp32, and which of the r rows count (B, r)."""
        query, key, logits = self._asked(rows)
        yield from attention.weights_in_blocks(query, key, rows, self.layout, self._before, logits)

    def _asked(self, rows: TokenSet) -> tuple[Tensor, Tensor, attention.Logits]:
        """Queries of the ``rows`` and keys of all tokens that the layer would compute, and how logits come of them."""
        everything, before = self.layout.everything, self._before
        queries, key, _, logits = self._captured(self._told(), rows)
        query = rows.pick(queries, 2)
        pair, width = _size(query), self.layout.width
        macs = _with_images(self.layout, pair * _pairs(rows, everything, before))
        batch = self.layout.rows * pair * max(rows.counts) * (width + attention.places(before))
        self._trace.scored(self.layer, macs, batch)
        return query, key, replace(logits, mask=self._mask(), bias=self._bias)


class AttentionView(DecoderView):
    """The attention of a decoder layer: B rows, H query heads, L tokens, d the head size.

    ``logits``: how the kernel makes them. ``dense``: the layer's own kernel on other values (B, kv heads, L, d);
    without any, on its own. ``project``: the layer's output projection, of attention outputs (B, n, H · d) with heads
    side by side: (B, n, D). ``read``: as in :class:`LayerView`.
    """

    def __init__(
        self,
        layer: int,
        layout: TokenLayout,
        parts: Parts,
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
        self._parts = parts
        self._logits, self._dense, self._before, self._trace = logits, dense, before, trace

    @property
    def _query(self) -> Tensor:
        return self._parts.seen[0]

    @property
    def _key(self) -> Tensor:
        return self._parts.seen[1]

    @property
    def _value(self) -> Tensor:
        return self._parts.seen[2]

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
        return self._weights(rows)

    def scan(self, rows: TokenSet) -> Iterator[tuple[Tensor, Tensor]]:
        """Attention weights of many ``rows`` in blocks: (B, H, r, L), fp32, and which of the r rows count (B, r)."""
        self._scored(rows)
        query, before = rows.pick(self._query, 2), self._before
        yield from attention.weights_in_blocks(query, self._key, rows, self.layout, before, self._logits)

    def received(self) -> tuple[Tensor, Tensor]:
        """Attention (B, V), fp32, that each visual token gets from visual tokens and from the text behind the image.

        The largest weight over heads, summed over queries. These stand at the end of each row; they are taken in blocks
        from there, with the keys up to the block's last row.
        """
        layout = self.layout
        self._scored_behind()
        totals: dict[int, Tensor] = {}
        for first, end, seen in self._behind():
            for role, more in _summed(self._largest(first, end, seen), layout, first).items():
                total = totals.setdefault(role, more)
                if total is not more:  # the first, of the last rows, has all columns
                    total[:, : more.shape[1]].add_(more)
        own = totals[VISUAL]
        cross = totals[TEXT] if TEXT in totals else torch.zeros_like(own)
        return (own, cross) if layout.span else (layout.visual.pick(own, 1), layout.visual.pick(cross, 1))

    def _largest(self, first: int, end: int, seen: int) -> Tensor:
        """(B, R, n): the largest weight over heads of the rows at ``first`` … ``end``, which see the first n tokens."""
        layout, before, cached = self.layout, self._before, attention.places(self._before)
        heads, kv_heads = self._query.shape[1], self._key.shape[1]
        if heads == kv_heads and attention.is_plain(layout, before, self._logits):
            return attention.largest_weights(self._query, self._key, first, end, self._logits.scaling)
        key = self._key if before is None else torch.cat([before.keys, self._key], dim=2)
        counts = attention.counting(layout, before)[:, : cached + seen]
        rows, query = layout.counted[:, first:end] + cached, self._query[:, :, first:end]
        weights = attention.row_weights(query, key[:, :, : cached + seen], rows, counts, self._logits)
        return weights.amax(1)[..., cached:]

    def contributions(self) -> attention.Contributions:
        """What each visual token contributes to the last token, weight times value, read once with all values."""
        layout, last = self.layout, self.layout.last
        self._scored(last)
        self._scored(last)  # once with the keys, once with the values
        plain = attention.is_plain(layout, self._before, self._logits)
        if plain:
            weights = attention.last_weights(self._query, self._key, self._logits.scaling)
        else:
            weights = self._weights(last).reshape(len(self._key) * self._key.shape[1], -1, layout.width)
            weights = weights.transpose(1, 2)
        sums = attention.contributions(weights, self._value, self.output)
        if plain and layout.span is not None:
            return attention.Contributions(sums, layout.rows, slice(*layout.span))
        dot, norm = (layout.visual.pick(part, 1) for part in sums.view(2, layout.rows, -1))
        whole = torch.linalg.vector_norm(self.output[:, -1], dim=(1, 2), dtype=sums.dtype).square()
        others = whole[:, None] - dot.sum(1, keepdim=True)
        sums = torch.stack([torch.cat([others, dot], dim=1), torch.cat([others, norm], dim=1)])
        return attention.Contributions(sums, layout.rows, slice(1, None))

    def on_host(self, *numbers: Tensor) -> OnHost:
        """Tensors of one type on their way to the host, to decide at the next layer's input what to cut."""
        return OnHost(numbers, self._trace)

    def _behind(self) -> list[tuple[int, int, int]]:
        """Blocks of the rows from the first visual token on, the last first: their columns, and how many keys they see.

        All keys where who sees whom is not a matter of places.
        """
        counts = zip(self.layout.visual_counts, self.layout.text_counts, strict=True)
        width, most = self.layout.width, max(map(sum, counts))
        ends = range(width, width - most, -attention.weights.BLOCK)
        causal = self._logits.mask is None
        return [(max(end - attention.weights.BLOCK, width - most), end, end if causal else width) for end in ends]

    def _scored_behind(self) -> None:
        """Weights of those rows are computed, block by block, over the keys that the block sees."""
        layout, before, size = self.layout, self._before, _size(self._query)
        there = np.array(layout.lengths) + (0 if before is None else before.counts)
        rows = np.array(layout.visual_counts) + np.array(layout.text_counts)
        pairs, batch = np.zeros_like(rows), 0
        for first, end, seen in self._behind():
            of_block = (rows - (layout.width - end)).clip(0, attention.weights.BLOCK)
            pairs += of_block * (there - (layout.width - seen))
            batch += layout.rows * (end - first) * (attention.places(before) + seen)
        self._trace.scored(self.layer, _with_images(layout, pairs * size), batch * size)

    def reread(self, edit: Edit, rows: TokenSet | None = None, onto: Tensor | None = None) -> Tensor:
        """Attention output (B, L, H, d) whose ``rows`` (default: all) read other values with the weights they have.

        ``edit`` gets the layer's values (B, kv heads, L, d) and returns those to read. This edits attention weights
        behind the softmax, column by column: a value of zero drops a column, the value of another token moves the
        column's mass there, and no map of weights is needed. All rows run on the layer's own kernel. The rows not
        named are those of ``onto``, or of the layer's own output, which may be written to.
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
        return attention.written(rows, part, onto)

    def attend(self, *parts: tuple[TokenSet, TokenSet], onto: Tensor | None = None) -> Tensor:
        """Attention output (B, L, H, d) computed in ``parts`` of (queries, keys), instead of fully.

        The queries of each part attend causally to its keys alone (a mask before the softmax), and to what was cached
        before: what is left out is not computed. Every query needs a key. Rows that are in no part are those of
        ``onto``, such as the layer's own output; without it every valid token must be in some part.
        """
        batch, heads, width, size = self._query.shape
        out = self._query.new_zeros(batch, width, heads, size) if onto is None else onto
        pairs, batch_pairs = np.zeros(self.layout.rows, dtype=np.int64), 0
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
        size, width = _size(self._query), self.layout.width + attention.places(self._before)
        macs = _with_images(self.layout, _pairs(rows, self.layout.everything, self._before) * size)
        self._trace.scored(self.layer, macs, self.layout.rows * max(rows.counts) * width * size)

    def _weights(self, rows: TokenSet) -> Tensor:
        query = rows.pick(self._query, 2)
        return attention.weights_of(query, self._key, rows, self.layout, self._before, self._logits)

    def _subset(self, values: Tensor, queries: TokenSet, keys: TokenSet) -> Tensor:
        before = self._before
        cached = None if before is None else (before.keys, before.values, before.valid)
        return attention.subset_attention(self._query, self._key, values, queries, keys, self._logits, cached)


class SublayerView(DecoderView):
    """What the attention or the MLP of a decoder layer made of its input: B rows, L tokens.

    ``name``: which of them. ``inputs``: (B, L, D) of all tokens, behind the norm in front of it. ``outputs``: the same,
    before they are added to the residual stream. ``layout``: the roles of the tokens.
    """

    def __init__(self, layer: int, name: Sublayer, layout: TokenLayout, inputs: Tensor, outputs: Tensor) -> None:
        self.layer, self.name, self.layout, self.inputs, self.outputs = layer, name, layout, inputs, outputs


def _summed(most: Tensor, layout: TokenLayout, first: int) -> dict[int, Tensor]:
    """Sums (B, n) by role of weights (B, R, n) over visual and over text rows, which stand from column ``first`` on.

    Of the visual columns where those are one run in all rows, else of all n.
    """
    rows = most.shape[1]
    if layout.span is None:
        roles = layout.roles[:, first : first + rows, None]
        return {role: (most * (roles == role)).sum(1) for role in (VISUAL, TEXT)}
    most, border = most[..., slice(*layout.span)], min(max(layout.span[1] - first, 0), rows)
    if border in (0, rows):
        return {VISUAL if border else TEXT: most.sum(1)}
    visual, text = most.split([border, rows - border], dim=1)
    return {VISUAL: visual.sum(1), TEXT: text.sum(1)}


def _size(part: Tensor) -> int:
    """Heads times head size, a number of Python's also while the model is traced."""
    return int(part.shape[1]) * int(part.shape[3])


def _pairs(queries: TokenSet, keys: TokenSet, before: Before | None) -> np.ndarray:
    return np.array(queries.counts) * (np.array(keys.counts) + (0 if before is None else before.counts))


def _batch_pairs(queries: TokenSet, keys: TokenSet, before: Before | None) -> int:
    """Pairs that compact tensors of both have: rows are padded to the one with the most."""
    return len(queries.counts) * max(queries.counts) * (max(keys.counts) + attention.places(before))


def _with_images(layout: TokenLayout, work: np.ndarray) -> np.ndarray:
    """Work on rows that have no visual tokens (left) is the batch's doing; alone they would not be asked."""
    return work * (np.array(layout.visual_counts) > 0)
