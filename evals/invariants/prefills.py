"""What must hold of a prefill under any method: against the dense model, each row alone, and what options promise."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from ...engine import TokenLayout, prune
from ...engine.trace import Trace
from ...methods import Method
from ...methods.base import Ranked, Scored
from ...models.adapters import Adapter, Geometry
from .miniature import LAYERS, PATCHES, ROWS, collate, make_batch, make_llava


class Broken(AssertionError):
    """An invariant that does not hold; the message says what was found."""


def hold(condition: Any, message: str) -> None:
    """Raise :class:`Broken` with the message unless the condition holds."""
    if not condition:
        raise Broken(message)


def same(one: Any, other: Any, what: str) -> None:
    """Raise :class:`Broken` unless both are the same, to the bit."""
    equal = torch.equal(one, other) if isinstance(one, Tensor) else one == other
    hold(equal, f"{what} differ" if isinstance(one, Tensor) else f"{what} differ: {one} and {other}")


def close(one: Tensor, other: Tensor, what: str, tolerance: float = 1e-4) -> None:
    """Raise :class:`Broken` unless all numbers agree to ``tolerance``, absolute and relative 1e-4."""
    apart = float((one - other).abs().max())
    hold(torch.allclose(one, other, atol=tolerance, rtol=1e-4), f"{what} differ by up to {apart:.3g}")


class Run(NamedTuple):
    """One prefill: logits (B, L', vocabulary), trace, cache, and for each decoder layer the positions it was given."""

    logits: Tensor
    trace: Trace
    cache: list[int]
    positions: list[list[Tensor]]

    @property
    def last(self) -> Tensor:
        """Logits (B, vocabulary) of the last token."""
        return self.logits[:, -1]


class Bench:
    """Miniature models, each made when first needed, and one batch of all kinds of rows under each method."""

    def __init__(self, llava: Any = None) -> None:
        self.llava = llava or make_llava()
        self._runs: dict[str, Run] = {}

    @cached_property
    def eager(self) -> Any:
        """The same weights with attention written out."""
        return make_llava(attention="eager")

    @cached_property
    def half(self) -> Any:
        """The same weights in bfloat16."""
        half: Any = make_llava()
        return half.to(torch.bfloat16)

    @cached_property
    def grouped(self) -> list[Any]:
        """With one head of keys for all queries, and with one for each."""
        return [make_llava(kv_heads=heads, attention="eager") for heads in (1, 4)]

    @cached_property
    def geometry(self) -> Geometry:
        """Of these models."""
        return Adapter(self.llava).geometry

    def run(self, method: Method) -> Run:
        """The prefill of all kinds of rows in one batch, run once for each method."""
        key = f"{type(method).__qualname__} {method}"
        if key not in self._runs:
            self._runs = {key: prefill(self.llava, method, collate(make_batch(ROWS)))}
        return self._runs[key]


def places(batch: dict[str, Any]) -> Tensor:
    """Positions counted without padding, as in ``generate``: the norms of rotated keys depend on them."""
    return (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)


def prefill(model: Any, method: Method, batch: dict[str, Any]) -> Run:
    """One prefill under the method."""
    given: list[list[Tensor]] = [[] for _ in range(LAYERS)]
    with torch.no_grad(), prune(model, method) as session:
        # Registered behind the session's own hooks, they see what the layers get.
        hooks = [
            layer.register_forward_pre_hook(lambda m, a, k, i=i: given[i].append(k["position_ids"]), with_kwargs=True)
            for i, layer in enumerate(session.adapter.layers)
        ]
        output = model(**batch, position_ids=places(batch), use_cache=True)
        for hook in hooks:
            hook.remove()
    return Run(output.logits, session.trace, [layer.keys.shape[2] for layer in output.past_key_values.layers], given)


# ---- a batch, its rows, and its inputs ------------------------------------------------------------------------------


def row_alone(bench: Bench, method: Method) -> None:
    """a row of a batch equals the row alone: logits, kept tokens, compute"""
    from ..compute import flops

    run = bench.run(method)
    scale, compute = run.last.abs().max(), flops.executed(run.trace, bench.geometry).total()
    for row, sample in enumerate(make_batch(ROWS)):
        alone = prefill(bench.llava, method, sample)
        apart = (run.last[row] - alone.last[0]).abs().max()
        hold(apart < 1e-5 * scale, f"row {row}: logits are {float(apart / scale):.2g} of the largest apart")
        for of in ("kv_lengths", "visual_counts", "attention_pairs", "scoring_macs"):
            same(
                getattr(run.trace, of)()[row], getattr(alone.trace, of)()[0], f"row {row}: {of} in the batch and alone"
            )
        macs = flops.executed(alone.trace, bench.geometry).total()
        same(macs, [compute[row]], f"row {row}: multiply-adds alone and in the batch")
        for layer in range(LAYERS):
            kept, width = run.trace.kept(layer)[row], alone.trace.kept(layer).shape[1]
            same(
                kept[:width],
                alone.trace.kept(layer)[0],
                f"row {row}, layer {layer}: tokens kept in the batch and alone",
            )
            hold(not kept[width:].any(), f"row {row}, layer {layer}: tokens kept that the row does not have")


def without_images(bench: Bench, method: Method) -> None:
    """rows without an image are dense, to the bit"""
    batch = collate(make_batch([(4, 6, 0), (7, 9, 0)]))
    run = prefill(bench.llava, method, batch)
    with torch.no_grad():
        dense = bench.llava(**batch, position_ids=places(batch)).logits
    same(run.logits, dense, "logits under the method and of the dense model")
    hold(not run.trace.visual_counts().any(), "visual tokens were counted where there are none")
    hold(not run.trace.scoring_macs().any(), "scoring work was counted where there is nothing to score")


def inputs_decide(bench: Bench, method: Method) -> None:
    """the result depends on the inputs alone, and leaves torch's generator as it was"""
    run = bench.run(method)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    again = prefill(bench.llava, method, collate(make_batch(ROWS)))
    same(torch.get_rng_state(), before, "states of torch's generator before and after")
    same(again.logits, run.logits, "logits of two runs on the same inputs")
    for layer in range(LAYERS):
        same(again.trace.kept(layer), run.trace.kept(layer), f"tokens kept at layer {layer} in two runs")


def scores_are_numbers(bench: Bench, method: Method) -> None:
    """no score is NaN, of a method that ranks tokens by a score"""
    if not isinstance(method, Ranked):
        return
    seen: list[Tensor] = []

    def choose(self: Any, scores: Tensor, view: Any, count: Tensor) -> Any:
        seen.append(scores[view.present])
        return chosen(self, scores, view, count)

    def image_tokens(self: Any, view: Any) -> Any:
        seen.append(self.score(view)[view.present])
        return of_images(self, view)

    kind: Any = type(method)
    chosen, of_images = kind.choose, getattr(kind, "image_tokens", Scored.image_tokens)
    with patch.object(kind, "choose", choose), patch.object(kind, "image_tokens", image_tokens, create=True):
        prefill(bench.llava, method, collate(make_batch(ROWS)))
    nans = sum(int(scores.isnan().sum()) for scores in seen)
    hold(not nans, f"{nans} of {sum(scores.numel() for scores in seen)} scores are NaN: where do they come from?")


def eager_agrees(bench: Bench, method: Method) -> None:
    """eager and SDPA attention agree"""
    eager = prefill(bench.eager, method, collate(make_batch(ROWS)))
    close(eager.last, bench.run(method).last, "logits with eager attention and with SDPA", 2e-4)


# ---- which tokens there are -----------------------------------------------------------------------------------------


def counts_promised(bench: Bench, method: Method, dtype: torch.dtype | None = None) -> None:
    """as many tokens stay as the options promise; where they promise no number, the inputs decide"""
    for model in (bench.llava, bench.half):
        if dtype in (None, model.dtype):
            _counts_promised(model, method, bench.geometry)


def _counts_promised(model: Any, method: Method, geometry: Geometry) -> None:
    counts = []
    for seed in range(3):
        batch = collate(make_batch(ROWS, seed=seed))
        batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
        run = prefill(model, method, batch)
        same(run.logits.dtype, model.dtype, "types of logits and model")
        hold(run.logits.isfinite().all(), f"logits that are not finite, in {model.dtype}")
        counts.append(run.trace.visual_counts())
    promised = method.visual_counts(run.trace.prompt, geometry)
    if promised is None:
        differ = any(not torch.equal(counts[0], other) for other in counts[1:])
        hold(differ, "left() promises no numbers, but the same tokens stay for all inputs")
        hold((counts[0].diff(dim=1) <= 0).all(), "tokens come back at a later layer")
        return
    for count in counts:
        for row in range(len(ROWS)):
            told = f"row {row}: left() promises {promised[row].tolist()} visual tokens by layer"
            hold(torch.equal(count[row], promised[row]), f"{told}, there are {count[row].tolist()}")


def caches_fit(bench: Bench, method: Method) -> None:
    """KV caches hold what the trace says: the text, and the visual tokens that are left"""
    run = bench.run(method)
    same(run.cache, run.trace.kv_lengths().amax(0).tolist(), "lengths of KV caches and of the trace")
    text = torch.tensor([prefix + text + max(images - 1, 0) for prefix, text, images in ROWS])
    cached = run.trace.kv_lengths() - run.trace.visual_counts()
    same(cached, text[:, None].expand(-1, LAYERS), "text tokens in the caches and in the prompt")


def layers_run_once(bench: Bench, method: Method) -> None:
    """each layer runs once and reads at most one number back to the host"""
    run = bench.run(method)
    same([len(given) for given in run.positions], [1] * LAYERS, "runs of each layer and one")
    hold(run.trace.host_syncs <= LAYERS + 1, f"{run.trace.host_syncs} numbers were read back by {LAYERS} layers")


def order_and_positions(bench: Bench, method: Method) -> None:
    """tokens keep their order, and get the positions of the policy"""
    run = bench.run(method)
    prompt, place = run.trace.prompt, (run.trace.prompt.valid.cumsum(1) - 1).clamp(min=0)
    for layer, layout in enumerate(run.trace.layouts):
        for row in range(len(ROWS)):
            valid, at_first = layout.valid[row], prompt.valid[row]
            visual, number = layout.visual.mask[row][valid], layout.visual_id[row][valid]
            stays, where = number >= 0, f"row {row}, layer {layer}"
            _in_order(method, run.trace, number[stays], where)
            given = _of_row(run.positions[layer][0], layout, row)
            if method.positions == "renumber":
                same(given.tolist(), list(range(len(given))), f"{where}: positions and numbers from 0")
                continue
            was_visual, was = prompt.visual.mask[row][at_first], place[row][at_first]
            same(given[stays], was[was_visual][number[stays]], f"{where}: positions of visual tokens now and at first")
            same(given[~visual], was[~was_visual], f"{where}: positions of text tokens now and at first")
            rise = given[~visual] if method.reorders else given
            hold((rise.diff() > 0).all(), f"{where}: positions that do not rise")


def _of_row(positions: Tensor, layout: TokenLayout, row: int) -> Tensor:
    """Those of the tokens of ``row``: of padded rows (B or 1, L), or of all rows one behind the other, (1, N)."""
    if positions.shape[1] == layout.width:
        return positions.expand(layout.rows, -1)[row][layout.valid[row]]
    return positions[0].split(layout.lengths)[row]


def _in_order(method: Method, trace: Trace, number: Tensor, where: str) -> None:
    """The visual tokens ``number`` of a row rise; where they may not, none comes twice and images stay apart."""
    if not method.reorders:
        hold((number.diff() > 0).all(), f"{where}: visual tokens out of order")
        return
    hold(len(number.unique()) == len(number), f"{where}: a visual token comes twice")
    hold((number.div(PATCHES, rounding_mode="floor").diff() >= 0).all(), f"{where}: tokens of two images mix")


def acts(bench: Bench, method: Method, everything: Method | None = None) -> None:
    """the method changes rows with images, unless its options keep everything"""
    batch, run = collate(make_batch(ROWS)), bench.run(method)
    with torch.no_grad():
        dense = bench.llava(**batch, position_ids=places(batch)).logits[:, -1]
    changed = (run.last - dense).abs().amax(1) > 1e-3
    pruned = everything != method
    expected = [pruned and images > 0 for _, _, images in ROWS]
    same(changed.tolist(), expected, "rows that change and rows with images")
    hold(pruned or torch.equal(run.last, dense), "logits differ from the dense model's though all tokens stay")
