"""Compute of one prefill, in multiply-adds (MACs): what really ran, in closed form, and fvcore's count of the same.

And that of the decoding which follows, where each layer attends to as many tokens as its KV cache really holds.

Papers on pruning and fvcore print multiply-adds as "FLOPs", one per multiply-add; so do our tables. Matrix products and
the patch convolution are counted; element-wise work, norms and softmax are not. Attention over n queries and m keys
counts n·m pairs a head, the masked half included, as kernels and papers do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import prod
from typing import Any

import numpy as np
from torch import Tensor, nn

from ...engine.trace import Trace
from ...models.adapters import Geometry, VisionGeometry

_NORMS = ("aten::layer_norm", "aten::batch_norm", "aten::group_norm")


@dataclass(frozen=True)
class Flops:
    """MACs of a prefill, or of decoding, by component: arrays (B,) with one figure a sample, or (1,) for a batch."""

    vision_tower: np.ndarray
    projector: np.ndarray
    projections: np.ndarray
    ffn: np.ndarray
    attention: np.ndarray
    lm_head: np.ndarray
    scoring: np.ndarray

    def components(self) -> dict[str, list[float]]:
        """MACs by component, one figure a sample."""
        return {f.name: getattr(self, f.name).tolist() for f in fields(self)}

    def total(self) -> list[float]:
        """MACs of each sample."""
        return np.sum([getattr(self, f.name) for f in fields(self)], axis=0).tolist()


def executed(trace: Trace, geometry: Geometry, logits: int | None = 1) -> Flops:
    """What one traced prefill really computed, per sample.

    ``logits``: positions for which the LM head ran; 1 in ``generate``, None for all that are left as in ``model(...)``.
    """
    tokens = trace.kv_lengths().double().numpy()
    head = tokens[:, -1] if logits is None else np.full(len(tokens), float(logits))
    pairs, scoring = (work.double().numpy().sum(1) for work in (trace.attention_pairs(), trace.scoring_macs()))
    return _prefill(geometry, _vision(trace, geometry.vision, trace.tower), tokens.sum(1), pairs, scoring, head)


def executed_by_batch(trace: Trace, geometry: Geometry, logits: int | None = 1) -> Flops:
    """What one traced prefill computed for its whole batch, as arrays (1,).

    Rows of unequal length are laid one behind the other, so the layers' own work is the sum of :func:`executed`. More
    is what runs on padded rows all the same: scoring, attention that a method computes itself, logits of all positions,
    and everything where a cache holds something already. What a method multiplies by itself (``view.scored``) counts as
    if every row were the largest.
    ``logits``: as there, of each row.
    """
    tower, projector = (np.array([macs.sum()]) for macs in _vision(trace, geometry.vision, trace.batch_tower))
    if geometry.vision is not None and geometry.vision.one_sequence and trace.grids is not None:
        tower = np.array([call_macs(geometry.vision, trace.grids.tolist())])
    if trace.batch_projected is not None and geometry.vision is not None:
        projector = np.array([float(trace.batch_projected * geometry.vision.projector_macs)])
    tokens = trace.batch_tokens()
    last = trace.layouts[-1]
    head = last.rows * (last.width if logits is None else logits)
    sums = sum(tokens), sum(trace.batch_attention_pairs()), sum(trace.batch_scoring_macs()), head
    return _prefill(geometry, (tower, projector), *(np.array([float(work)]) for work in sums))


def _prefill(
    g: Geometry,
    vision: tuple[np.ndarray, np.ndarray],
    tokens: np.ndarray,
    pairs: np.ndarray,
    scoring: np.ndarray,
    head: np.ndarray,
) -> Flops:
    """MACs of tokens and attention pairs, both summed over layers, and of ``head`` tokens at the LM head."""
    heads, kv_heads = g.heads * g.head_size, g.kv_heads * g.head_size
    return Flops(
        vision_tower=vision[0],
        projector=vision[1],
        projections=tokens * (2 * g.hidden * heads + 2 * g.hidden * kv_heads),
        ffn=tokens * 3 * g.hidden * g.intermediate,
        attention=pairs * 2 * heads,
        lm_head=head * g.hidden * g.vocabulary,
        scoring=scoring,
    )


def _vision(trace: Trace, vision: VisionGeometry | None, inside: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """MACs of tower and projector for each row (B,); ``inside``: tokens in the tower, as a trace has them."""
    if vision is None:
        return (np.zeros(trace.prompt.rows),) * 2
    entered = trace.projected.double().numpy()
    projector = entered * vision.projector_macs
    if inside is not None:  # projectors that the tower has inside are given what is left behind its last block
        rows = [[vision_tower_macs(vision, unit) for unit in row if unit[0][0]] for row in inside.tolist()]
        return np.array([sum(row) for row in rows], dtype=float) + entered * vision.inner_macs, projector
    shown = trace.grids if trace.tower_grids is None else trace.tower_grids
    if shown is None:
        images = np.array(trace.prompt.visual_counts, dtype=float) / (vision.tokens or 1)
        return images * vision_tower_macs(vision), projector
    grids = shown.tolist()
    if trace.units_of_row is None:  # shared out by visual tokens, which is exact for one row and for rows alike
        counts = np.array(trace.prompt.visual_counts, dtype=float)
        return counts / max(counts.sum(), 1) * call_macs(vision, grids), projector
    rows = [[call_macs(vision, [grids[unit] for unit in row])] for row in trace.units_of_row]
    return np.array([sum(row) for row in rows], dtype=float), projector


def decode(trace: Trace, geometry: Geometry, steps: Any = 1) -> Flops:
    """What the first ``steps`` decoding steps after the traced prefill compute, per sample.

    ``steps``: int or int (B,). A step takes one token and gives the next; the logits of the prefill gave the first, so
    an answer of n tokens takes n - 1. Step s attends in each layer to that layer's KV cache after prefill and to s new
    tokens, its own included; methods score nothing here.
    """
    g = geometry
    cached = trace.kv_lengths().double().numpy()
    steps = np.broadcast_to(np.asarray(steps, dtype=float), len(cached))
    heads, kv_heads = g.heads * g.head_size, g.kv_heads * g.head_size
    pairs = steps * cached.sum(1) + g.layers * steps * (steps + 1) / 2
    nothing = np.zeros(len(cached))
    return Flops(
        vision_tower=nothing,
        projector=nothing,
        projections=steps * g.layers * (2 * g.hidden * heads + 2 * g.hidden * kv_heads),
        ffn=steps * g.layers * 3 * g.hidden * g.intermediate,
        attention=pairs * 2 * heads,
        lm_head=steps * g.hidden * g.vocabulary,
        scoring=nothing,
    )


def vision_tower_macs(vision: VisionGeometry, tokens: Sequence[tuple[int, int, int]] | None = None) -> float:
    """MACs of the vision tower for one image: patch convolution and all its blocks.

    ``tokens``: tokens at the attention and at the MLP of each block, CLS included, and the query-key pairs of its
    attention; None: the full image throughout.
    """
    full = vision.patches + vision.has_cls
    tokens = tokens or [(full, full, full * full)] * vision.layers
    d, mlp = vision.hidden, vision.ffn_matrices * vision.hidden * vision.intermediate
    blocks = sum(4 * n * d * d + 2 * pairs * d + m * mlp for n, m, pairs in tokens)
    return float((tokens[0][0] - vision.has_cls) * vision.patch_inputs * d + blocks)


def call_macs(vision: VisionGeometry, grids: Sequence[Sequence[int]]) -> float:
    """MACs of one call of the vision tower for images or tiles of such ``grids``.

    Where they are one sequence, attention over the whole of it counts, as eager and fused attention run it; kernels
    that go by lengths, such as flash attention's, leave out what the mask hides.
    """
    alone = sum(grid_macs(vision, grid) for grid in grids)
    if not vision.one_sequence or len(grids) < 2:
        return alone
    patches = [prod(grid) for grid in grids]
    padded = len(grids) * max(rows for _, rows, _ in grids) * max(columns for _, _, columns in grids)
    pairs = sum(patches) ** 2 - sum(count**2 for count in patches)
    return alone + vision.hidden * ((padded - sum(patches)) * vision.patch_inputs + 2 * vision.layers * pairs)


def grid_macs(vision: VisionGeometry, grid: Sequence[int]) -> float:
    """MACs of the vision tower for one image or tile of (frames, rows, columns) patches, which attend by frame."""
    frames, rows, columns = grid
    patches, d = frames * rows * columns, vision.hidden
    tokens = patches + frames * vision.has_cls
    full = frames * (rows * columns + vision.has_cls) ** 2
    linear = 4 * d * d + vision.ffn_matrices * d * vision.intermediate
    pairs = vision.layers * full
    if vision.window is not None:
        windows = frames * _squares(rows, vision.window) * _squares(columns, vision.window)
        pairs = len(vision.full_blocks) * full + (vision.layers - len(vision.full_blocks)) * windows
    inner = patches // vision.merged * vision.inner_macs
    return float(patches * vision.patch_inputs * d + vision.layers * tokens * linear + pairs * 2 * d + inner)


def _squares(length: int, window: int) -> int:
    """Sum of the squared lengths of the windows along one side; the last one may be shorter."""
    whole, rest = divmod(length, window)
    return whole * window**2 + rest**2


def counted(model: nn.Module, inputs: dict[str, Any]) -> tuple[float, dict[str, int]]:
    """MACs of ``model(**inputs)`` by fvcore's trace, and the operators that it does not count, with their numbers.

    fvcore counts fused attention, and convolutions whose padding has a name, as zero: handles are added. It counts
    norms, which are left out here.
    Tensors of ``inputs`` only; run it inside ``prune()`` to count a pruned forward.
    """
    from fvcore.nn import FlopCountAnalysis

    names, tensors = zip(*inputs.items(), strict=True)
    analysis = FlopCountAnalysis(_Everything(model, names), tensors)
    analysis.set_op_handle("aten::_convolution_mode", _convolution_macs)
    analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_macs)
    analysis.set_op_handle("aten::baddbmm", lambda inputs, outputs: prod(_sizes(inputs[1])) * _sizes(inputs[2])[-1])
    analysis.set_op_handle(**dict.fromkeys(_NORMS, lambda inputs, outputs: 0))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    return float(analysis.total()), dict(analysis.unsupported_ops())


class _Everything(nn.Module):
    """Positional tensors in, tensors out, as tracing wants them; every linear layer's output is returned as well.

    A trace drops what its outputs do not need, such as the vision blocks behind the feature layer: they did run.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        outputs: list[Tensor] = []
        linear = [m for m in self.model.modules() if isinstance(m, nn.Linear)]
        hooks = [m.register_forward_hook(lambda module, args, out: outputs.append(out)) for m in linear]
        try:
            self.model(**dict(zip(self.names, tensors, strict=True)), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return outputs


def _convolution_macs(inputs: list[Any], outputs: list[Any]) -> int:
    return prod(_sizes(outputs[0])) * prod(_sizes(inputs[1])[1:])


def _attention_macs(inputs: list[Any], outputs: list[Any]) -> int:
    query, key, value = map(_sizes, inputs[:3])
    pairs = prod(query[:-1]) * key[-2]
    return pairs * (query[-1] + value[-1])


def _sizes(value: Any) -> tuple[int, ...]:
    return tuple(value.type().sizes())
