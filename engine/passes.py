"""One call of the model: what its tokens are, which of them each layer gets, and whether every layer came by.

Made anew for each call and thrown away after it, so that nothing of a batch outlives its cache.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..errors import InputError, VisibenchError
from ..models.adapters import Adapter
from .ahead import Ahead
from .attention import Logits, by_row, cap_of
from .cache import Held, PrunedCache, adopt
from .contract import Forward, Method
from .decisions import Join, Keep, Merge, Ranking, as_merge, check_declared, checked, cut
from .inputs import Inputs
from .layout import TokenLayout
from .packing import Before, Parts
from .segment import Aside, Deepstack, Segment, joined, parted
from .trace import Trace
from .units.rows import RowHashes
from .views import AttentionView, LayerView, Sublayer, SublayerView
from .vision.tap import VisionTap


@dataclass(frozen=True)
class Prompt:
    """Tokens that a method decides about: their ``layout``, the ``trace``, and its ``forward`` from layer 0 on."""

    layout: TokenLayout
    trace: Trace
    forward: Forward = field(default_factory=Forward)


@dataclass
class Pass:
    """One call of the model in ``session`` terms: its ``adapter``, ``method`` and ``tap``.

    ``prompt``: None where text goes on behind what is cached. ``mask``: bool (B, n), which of the new tokens count,
    None: all. ``positions``: what the model hands its rotary table. ``segments``: those of the layers that have run so
    far; ``intercepted``: how many had their attention intercepted; ``sublayers``: how many attentions and MLPs were
    seen. ``aside``: tokens that are to join a later layer. ``recorded``: whether the model keeps hidden states or
    attention maps of its layers, by row. ``deepstack``: what the model adds behind layers. ``ahead``: what the method
    made the layer at hand compute.
    """

    adapter: Adapter
    method: Method
    tap: VisionTap
    owner: Any
    inputs: Inputs
    prompt: Prompt | None
    mask: Tensor | None
    thread: int
    cache: PrunedCache | None = None
    positions: Tensor | None = None
    segments: list[Segment] = field(default_factory=list)
    intercepted: int = 0
    sublayers: int = 0
    aside: list[Aside] = field(default_factory=list)
    recorded: bool = False
    deepstack: Deepstack | None = None
    ahead: Ahead | None = None
    _before: dict[int, np.ndarray] = field(default_factory=dict)
    _hashes: RowHashes | None = None

    @property
    def listens(self) -> bool:
        """Whether the method acts in attention."""
        return "attention" in self.method.hook_points

    # ---- layers ---------------------------------------------------------------------------------------------------

    def enter_decoder(self, given: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments with which the decoder goes on: what it adds behind layers comes from here."""
        names = ("output_hidden_states", "output_attentions")
        config: Any = self.adapter.decoder.config
        self.recorded = any(given.get(name, getattr(config, name, None)) not in (None, False) for name in names)
        self.deepstack = Deepstack.of(given, len(self.adapter.layers))
        return given if self.deepstack is None else given | {"deepstack_visual_embeds": None}

    def enter_layer(self, layer: int, module: nn.Module, hidden: Tensor, given: dict[str, Any]) -> tuple[Tensor, dict]:
        """Hidden states and keyword arguments with which a decoder layer goes on."""
        self._check(layer)
        if layer == 0:
            self._begin(given)
        if layer and self.deepstack is not None:
            hidden, self.aside = self.deepstack.behind(layer - 1, self.segments[-1], hidden, self.aside)
        with self.tap.watch("method") if self.prompt is not None else nullcontext():
            held = _NOTHING if self.cache is None else self.cache.held[layer]
            segment = self._first(held, hidden) if layer == 0 else self.segments[-1]
            hidden = segment.laid(hidden) if layer == 0 else hidden
            if segment.held is not held:
                segment = self._numbered(segment.on(held))
            if self.prompt is not None:
                segment, hidden = self._decide(self.prompt, layer, module, segment, hidden, given)
                self.prompt.trace.enter(self._layout(segment), self._cached(held), held.length, segment.packing)
            self.segments.append(segment)
            return hidden, given | segment.told(self.adapter, layer, hidden, given)

    def _check(self, layer: int) -> None:
        due = len(self.segments)
        if layer != due:
            raise VisibenchError(
                f"decoder layer {layer} ran where layer {due} was due, so that pruning cannot follow: call the model "
                "itself, uncompiled, and not a part of it"
            )
        packed = due and self.segments[-1].packing is not None
        if (self.listens or packed) and self.intercepted != due:
            raise VisibenchError(_UNSEEN.format(self.method.name, due - 1))
        if "sublayers" in self.method.hook_points and self.sublayers != 2 * due:
            raise VisibenchError(
                f"{self.method.name} reads attention and MLP of every decoder layer, and those of layer {due - 1} were "
                "not run as modules of their own: this model cannot be read there"
            )

    def _begin(self, given: dict[str, Any]) -> None:
        cache = given.get("past_key_values")
        if isinstance(cache, DynamicCache):
            fresh = not cache.get_seq_length()
            self.cache = adopt(cache, len(self.adapter.layers), self.owner) if fresh else cache  # type: ignore[assignment]
        if self.prompt is None:
            return
        if self.cache is not None:
            self._count(self.cache)
        layout = self.tap.record(self.prompt.layout, self.prompt.trace, self.inputs.ids)
        encoding, pixels = self.tap.encoding, None
        if encoding is not None and encoding.pixels is not None:
            pixels = encoding.pixels, partial(encoding.rows, layout)
        self._hashes = RowHashes(layout, self.inputs.ids, self.inputs.embeddings, pixels)
        layout = replace(layout, hash_inputs=self._hashes)
        with self.tap.watch("method"):  # not earlier: now it is known which images there are
            forward = self.method.begin(layout, self.adapter.geometry)
        self.prompt = Prompt(layout, self.prompt.trace, forward)

    def _count(self, cache: PrunedCache) -> None:
        """How many places of each row count in what the layers hold, on the host, in one transfer."""
        padded = {id(held): held.valid.sum(1) for held in cache.held if held.valid is not None}
        if padded:
            self._before = dict(zip(padded, torch.stack([*padded.values()]).cpu().numpy(), strict=True))

    def _cached(self, held: Held) -> np.ndarray:
        if id(held) not in self._before:
            self._before[id(held)] = np.full(self.inputs.given.shape[0], held.length)
        return self._before[id(held)]

    def _first(self, held: Held, hidden: Tensor) -> Segment:
        assert self.positions is not None
        positions = self.positions.movedim(0, -1) if self.positions.ndim == 3 else self.positions
        positions = positions.expand(hidden.shape[0], *positions.shape[1:])
        places, layout = hidden.shape[1], None if self.prompt is None else self.prompt.layout
        return self._numbered(Segment(held, layout, places, positions, self.mask, packs=self._packs(held, places)))

    def _packs(self, held: Held, places: int) -> bool:
        """Whether rows are laid one behind the other where they differ: if nothing lies before or behind them, nobody
        asks for those of a layer, and the model is not to run as it would without a method."""
        layout = None if self.prompt is None else self.prompt.layout
        if layout is None or self.recorded or held.length or layout.width != places:
            return False
        if not min(layout.lengths) or not max(layout.visual_counts):
            return False
        return layout.is_full or not self.method.keeps_all(layout, self.adapter.geometry)

    def _numbered(self, segment: Segment) -> Segment:
        if self.method.positions != "renumber":
            return segment
        prompt = None if self.prompt is None else self.prompt.layout
        return segment.numbered(self.adapter.family.first_position, prompt)

    @staticmethod
    def _layout(segment: Segment) -> TokenLayout:
        assert segment.layout is not None
        return segment.layout

    # ---- decisions ------------------------------------------------------------------------------------------------

    def _decide(
        self, prompt: Prompt, layer: int, module: nn.Module, segment: Segment, hidden: Tensor, given: dict[str, Any]
    ) -> tuple[Segment, Tensor]:
        if not self._has_visual(segment):
            return segment, hidden
        if layer == 0:
            inside = parted(segment.padded(hidden), prompt.layout.width)[0]
            on_images = self.tap.decide(prompt.forward, prompt.layout, prompt.trace, inside)
            segment, hidden = self._apply(on_images, prompt.trace, segment, hidden)
            self.tap.used(self.inputs.encoded, again=self.cache is None)
        if type(prompt.forward).layer_input is not Forward.layer_input:
            self.ahead = Ahead(module)
            view = self._layer_view(prompt, layer, self.ahead, segment, hidden, given)
            answer = prompt.forward.layer_input(layer, view)
            decision = checked(answer, self.method.name, "layer_input", view.layout.visual.sizes)
            segment, hidden = self._apply(decision, prompt.trace, segment, hidden)
            view.hand_over(self._layout(segment), hidden)
        return segment, hidden

    def _layer_view(
        self, prompt: Prompt, layer: int, ahead: Ahead, segment: Segment, hidden: Tensor, given: dict[str, Any]
    ) -> LayerView:
        layout = self._layout(segment)
        width = layout.width

        def mask() -> Tensor | None:
            ruling = given | segment.told(self.adapter, layer, hidden, given)
            return self._carried(layer, ruling.get("attention_mask"), width, segment.held.length + width)

        before = None
        if segment.held.length and self.cache is not None:
            cached: Any = self.cache.layers[layer]
            before = self._seen_before(segment, cached.keys, cached.values)
        return LayerView(
            layer,
            layout,
            hidden if segment.packing is not None else parted(hidden, width)[0],
            ahead=ahead,
            packing=segment.packing,
            positions=parted(segment.positions, width)[0],
            final_norm=self.adapter.decoder.norm,
            read=self.adapter.read,
            told=lambda: segment.told_of_prompt(self.adapter, layer, hidden, given),
            mask=mask,
            bias=segment.prompt_bias,
            before=before,
            trace=prompt.trace,
        )

    def _carried(self, layer: int, mask: Any, queries: int, keys: int) -> Tensor | None:
        """The mask that says who sees whom among so many, None where causality and padding do."""
        is_own = mask is not None and self.adapter.layer_types[layer] in self.adapter.carried_types
        return mask[..., :queries, :keys] if is_own else None

    def _seen_before(self, segment: Segment, keys: Tensor, values: Tensor) -> Before:
        return Before(keys, values, segment.held.valid, self._cached(segment.held))

    def _apply(
        self, decision: Keep | Ranking | Merge | Join | None, trace: Trace, segment: Segment, hidden: Tensor
    ) -> tuple[Segment, Tensor]:
        """Carry out a decision: gather hidden states and make the segment that follows."""
        layout = self._layout(segment)
        if decision is None or not self._has_visual(segment):
            return segment, hidden
        if isinstance(decision, Join):
            return self._join(segment, hidden)
        if isinstance(decision, Ranking):
            best = decision.cut(layout)
            if best is None:
                return segment, hidden
            prompt, behind = parted(segment.padded(hidden), layout.width)
            after = segment.cut_with(best, decision.more)
            after, left = self._laid(after, best.gather(prompt, decision.added), behind)
            if self.ahead is not None and not decision.more:
                self.ahead.follow(hidden, left, lambda made: after.laid(best.gather(segment.padded(made))))
            return after, left
        visual, merge = layout.visual, as_merge(decision)
        prompt, behind = parted(segment.padded(hidden), layout.width)
        if merge.replaced is not None:
            prompt = visual.place(merge.replaced, prompt, dim=1)
        added = anchor = None
        if merge.added is not None:
            added, anchor = merge.added_mask(), merge.columns(visual)
        trace.host_syncs += not merge.known
        check_declared(merge, self.method, aside=isinstance(decision, Keep) and decision.aside)
        segment = segment if merge.bias is None else segment.biased(merge.bias)
        segment = segment if merge.positions is None else segment.moved(merge.positions)
        change = cut(layout, merge.mask, added, anchor, merge.order, *merge.known)
        if change is None:
            return segment, segment.laid(joined(prompt, behind))
        if isinstance(decision, Keep) and decision.aside:
            self.aside.append(segment.without(merge.mask, change, prompt))
        after = segment.cut(change, merge.added_positions, anchor)
        if merge.images is not None:
            trace.host_syncs, after = trace.host_syncs + 1, after.showing(merge.images, self.adapter)
        return self._laid(after, change.gather(prompt, merge.added), behind)

    def _join(self, segment: Segment, hidden: Tensor) -> tuple[Segment, Tensor]:
        """Take up again all that was held aside."""
        prompt, behind = parted(segment.padded(hidden), self._layout(segment).width)
        for aside in self.aside:
            segment, prompt = segment.join(aside, prompt)
        self.aside = []
        return self._laid(segment, prompt, behind)

    def _laid(self, segment: Segment, prompt: Tensor, behind: Tensor | None) -> tuple[Segment, Tensor]:
        """A new segment and its tokens."""
        return self._numbered(segment), segment.laid(joined(prompt, behind))

    def _has_visual(self, segment: Segment) -> bool:
        """Whether a row has visual tokens, there or held aside."""
        return max(self._layout(segment).visual_counts) > 0 or bool(self.aside)

    # ---- attention ------------------------------------------------------------------------------------------------

    def attend(
        self, layer: int, kernel: Callable, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any
    ) -> Any:
        """The attention of a layer: the method may read it, and replace its output."""
        self.intercepted += 1
        segment, prompt = self.segments[layer], self.prompt
        if segment.packing is not None:
            kernel = partial(by_row, segment.packing, kernel)
        if prompt is None or not self.listens or max(self._layout(segment).visual_counts) == 0:
            return kernel(module, q, k, v, mask, **kwargs)
        layout, first = self._layout(segment), segment.held.length
        parts = Parts(q, k, v, mask, first, layout.width, segment.packing)
        results: list[Any] = []  # of the kernel, run once at most

        def whole() -> Any:
            if not results:
                with prompt.trace.watch("model"):
                    results.append(kernel(module, q, k, v, mask, **kwargs))
            return results[0]

        def dense(values: Tensor | None = None) -> Tensor:
            if values is None:
                return parted(segment.padded(whole()[0]), layout.width)[0]
            with prompt.trace.watch("model"):
                return segment.padded(kernel(module, *parts.reading(values), **kwargs)[0])

        carried = self._carried(layer, mask, layout.width, first + layout.width)
        before = self._seen_before(segment, k[:, :, :first], v[:, :, :first]) if first else None
        view = AttentionView(
            layer,
            layout,
            parts,
            logits=Logits(kwargs["scaling"], cap_of(module, kwargs), carried, segment.prompt_bias),
            dense=dense,
            project=module.o_proj,
            read=self.adapter.read,
            before=before,
            trace=prompt.trace,
        )
        with prompt.trace.watch("method"):
            replaced = prompt.forward.attention(layer, view)
            if replaced is None:
                return whole()
            if self.inputs.maps:
                raise InputError(
                    f"output_attentions: {self.method.name} replaces the attention of layer {layer}, which then has no "
                    "map of weights: leave it out"
                )
            # What runs along behind the prompt attends to whatever is there.
            behind = None if segment.places == layout.width else parted(whole()[0], layout.width)[1]
            return segment.laid(joined(replaced, behind)), None

    def leave_sublayer(self, layer: int, name: Sublayer, taken: Tensor, given: Tensor) -> None:
        """Attention or MLP of a layer made ``given`` of what it has ``taken``: the method may read both."""
        self.sublayers += 1
        segment, prompt = self.segments[layer], self.prompt
        if prompt is None or max(self._layout(segment).visual_counts) == 0:
            return
        layout = self._layout(segment)
        inside, out = (parted(segment.padded(tokens), layout.width)[0] for tokens in (taken, given))
        with prompt.trace.watch("method"):
            prompt.forward.sublayer(layer, SublayerView(layer, name, layout, inside, out))

    def leave_layers(self, hidden: Tensor) -> Tensor | None:
        """What the last layer puts out, by row again; None: it is."""
        segment = self.segments[-1]
        return None if segment.packing is None else segment.padded(hidden)

    # ---- the end --------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """The call is over, complete or not: what the trace keeps holds no inputs any more."""
        if self.ahead is not None:
            self.ahead.close()
        if self._hashes is not None:
            self._hashes.close()

    def finish(self) -> None:
        """All layers have run, or raise; the cache holds what they left in it."""
        self._check(len(self.adapter.layers))
        if self.cache is None:
            return
        fed = self.cache.fed
        for layer, segment in enumerate(self.segments):
            if segment.packing is not None:
                self.cache.spread(layer, segment.packing)
        after = {key: segment.after(fed) for key, segment in {id(part): part for part in self.segments}.items()}
        padding = None
        if self.mask is not None or self.cache.padding is not None:
            padding = Held(fed, valid=self.cache.padding).with_valid(self.inputs.tokens, self.mask)
        self.cache.commit(self.inputs.tokens, [after[id(segment)] for segment in self.segments], padding)


_NOTHING = Held()
_UNSEEN = (
    "{} acts in attention, and that of layer {} ran without it: set the attention implementation and compile before "
    "the `with` block, not inside"
)
