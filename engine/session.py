"""The session: hooks in, hooks out, and everything that tokens which leave must take with them.

One prefill runs through *segments*: runs of decoder layers whose inputs hold the same tokens. The first segment is the
model's own business; for every later one the session supplies positions, rotary table and mask, in prefill and in
decoding, where the layers of a segment share one length of KV cache.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from ..errors import InputError, UnsupportedModelError, VisibenchError
from ..models.adapters import Adapter
from .attention import Interception, attention_mask, implementation_of
from .contract import Forward, Method
from .decisions import Keep, Merge, as_merge
from .features import FeatureStore
from .layout import TokenLayout, cut
from .segment import Segment, ruling
from .trace import Trace, Watch, unwatched
from .views import AttentionView, LayerView
from .vision.rows import row_hashes
from .vision.tap import VisionTap

_active: WeakSet[nn.Module] = WeakSet()


class PruningSession:
    """A model under a pruning method; use :func:`prune`. ``trace`` is the record of the latest prefill."""

    def __init__(
        self,
        model: PreTrainedModel,
        method: Method,
        layout: TokenLayout | None = None,
        watch: Watch = unwatched,
        features: FeatureStore | None = None,
    ) -> None:
        if not isinstance(method, Method):
            raise VisibenchError(
                f"expected a method, got {type(method).__name__}: create one with visibench.load_method(name, …)"
            )
        self.model, self.method, self.layout, self.watch = model, method, layout, watch
        self.features = features
        self.adapter = Adapter(model)
        implementation_of(self.adapter.decoder.config)  # known, or refused
        self.geometry = self.adapter.geometry
        self._tap = VisionTap(self.adapter, method, watch, features)
        method.check(self.geometry)
        self._trace: Trace | None = None
        self._segments: list[Segment] = []  # of each decoder layer
        self._current: Segment  # the latest one, set at decoder layer 0
        self._inputs: dict[str, Any] = {}
        self._cache: weakref.ref | None = None
        self._padding: Tensor | None = None
        self._positions: Tensor  # of the latest call of the model's rotary table
        self._forward = Forward()
        self._decoding = False
        self._exit = ExitStack()

    @property
    def trace(self) -> Trace:
        """Record of the latest prefill."""
        if self._trace is None:
            raise VisibenchError("nothing has been traced yet: call the model inside the `with` block first")
        return self._trace

    # ---- entering and leaving ---------------------------------------------------------------------------------

    def __enter__(self) -> PruningSession:
        decoder = self.adapter.decoder
        if decoder in _active:
            raise VisibenchError("this model is already being pruned: leave the first `with visibench.prune(…)` block")
        with ExitStack() as stack:
            _active.add(decoder)
            stack.callback(_active.discard, decoder)
            hook = partial(_hooked, stack)
            hook(self.model.register_forward_pre_hook, self._on_model)
            hook(decoder.rotary_emb.register_forward_pre_hook, self._on_rotary)
            for number, layer in enumerate(self.adapter.layers):
                hook(layer.register_forward_pre_hook, partial(self._on_layer, number))
            if "attention" in self.method.hook_points:
                modules = {
                    layer.self_attn: partial(self._on_attention, i) for i, layer in enumerate(self.adapter.layers)
                }
                stack.enter_context(Interception(modules))
            stack.enter_context(self._tap)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._exit.close()
        self._segments, self._cache = [], None
        self._tap.forget()

    # ---- what the model hands us ------------------------------------------------------------------------------

    def _on_model(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before a forward of the whole model: tell prefill from decoding, and begin a prefill."""
        inputs = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        if inputs.get("labels") is not None:
            raise InputError("labels cannot be given under prune(): pruned logits are shorter; compare the last ones")
        mask, cache = inputs.get("attention_mask"), inputs.get("past_key_values")
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise InputError("prune() needs a 2D attention mask (batch, length), 1 for tokens and 0 for left padding")
        self._padding = mask
        self._decoding = cache is not None and cache.get_seq_length() > 0
        if self._decoding:
            if self._cache is None or self._cache() is not cache:
                raise InputError("the KV cache is not that of the latest prompt run inside this `with` block")
            return
        _check_cache(cache)
        self._tap.begin((inputs.get("mm_encoder_outputs") or {}).get("image"))
        layout = self._prompt_layout(inputs)
        self._trace = Trace(layout, self.geometry.layers, self.watch)
        with self.watch("method"):
            self._forward = self.method.begin(layout, self.geometry)
        self._segments, self._cache = [], None
        self._inputs = dict(inputs)

    def _on_rotary(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Positions as the model has them, (B, L) or (3, B, L): not every family hands them on to its layers."""
        self._positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]

    def _on_layer(self, layer: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        if self._decoding:
            segment = self._segments[layer]
            if not segment.own:
                return (hidden, *args), kwargs
            return (hidden, *args), kwargs | self._decode_step(segment, layer, hidden)
        if layer == 0:
            self._current = self._first_segment(hidden, kwargs)
        with self.watch("method"):
            segment, hidden = self._prefill_layer(layer, module, hidden)
        self._segments.append(segment)
        self.trace.enter(segment.layout)
        if not segment.own:
            return (hidden, *args), kwargs
        return (hidden, *args), kwargs | segment.ruling

    # ---- prefill ----------------------------------------------------------------------------------------------

    def _first_segment(self, hidden: Tensor, kwargs: dict[str, Any]) -> Segment:
        if self._trace is None or self.trace.layouts:
            raise InputError("under prune() call the model itself, not a part of it")
        cache = kwargs.get("past_key_values")
        self._cache = None if cache is None else weakref.ref(cache)
        encoding = self._tap.encoding
        self.trace.grids = None if encoding is None else encoding.grids
        positions = self._positions.movedim(0, -1) if self._positions.ndim == 3 else self._positions
        positions = positions.expand(hidden.shape[0], *positions.shape[1:])
        patches = self.geometry.vision.tokens if self.geometry.vision else 1
        hashes = partial(
            row_hashes, self.trace.prompt, self._inputs, None if encoding is None else encoding.pixels, patches
        )
        layout = replace(self.trace.prompt, hash_inputs=hashes)
        return Segment(layout, positions, kwargs["position_embeddings"], kwargs["attention_mask"], own=False)

    def _prompt_layout(self, inputs: dict[str, Any]) -> TokenLayout:
        ids, embeddings, valid = inputs.get("input_ids"), inputs.get("inputs_embeds"), self._padding
        given = ids if ids is not None else embeddings
        if given is None:
            raise InputError("give the model input_ids or inputs_embeds")
        if self.layout is not None:
            layout = self.layout.expand(given.shape[0])
            if layout.width != given.shape[1]:
                raise InputError(f"the layout has {layout.width} tokens, the input {given.shape[1]}")
            if valid is not None and not torch.equal(valid.bool().cpu(), layout.valid.cpu()):
                raise InputError(
                    "the layout's padding differs from the attention mask: build it with TokenLayout.batch"
                )
        elif ids is None or self.adapter.image_token is None:
            raise InputError(
                "cannot tell which tokens are visual: pass input_ids with image tokens to a multimodal model, "
                "or layout=visibench.TokenLayout.from_spans(length, visual=[(start, end)])"
            )
        else:
            layout = TokenLayout.from_masks(
                ids == self.adapter.image_token, torch.ones_like(ids) if valid is None else valid
            )
        return layout.to(given.device)

    def _prefill_layer(self, layer: int, module: nn.Module, hidden: Tensor) -> tuple[Segment, Tensor]:
        segment = self._current
        if max(segment.layout.visual_counts) == 0:
            return segment, hidden
        if layer == 0:
            segment, hidden = self._apply(self._tap.decide(self._forward, segment.layout, self.trace), segment, hidden)
            if self._cache is not None:  # without one, generate runs the same images again for each new token
                self._tap.forget()
        if type(self._forward).layer_input is not Forward.layer_input:
            view = LayerView(layer, module, segment, hidden, self.adapter.decoder.norm, self.trace)
            segment, hidden = self._apply(self._forward.layer_input(layer, view), segment, hidden)
        self._current = segment
        return segment, hidden

    def _apply(self, decision: Keep | Merge | None, segment: Segment, hidden: Tensor) -> tuple[Segment, Tensor]:
        """Carry out a decision: gather hidden states and make the segment that follows."""
        if decision is None or max(segment.layout.visual_counts) == 0:
            return segment, hidden
        visual = segment.layout.visual
        merge = as_merge(decision)
        if merge.replaced is not None:
            hidden = visual.place(merge.replaced, hidden, dim=1)
        added = anchor = None
        if merge.added is not None:
            added = merge.added_mask()
            anchor = visual.total[:, None] - 1 if merge.anchors is None else merge.anchors
            token = torch.where(anchor < 0, -1 - anchor, anchor).clamp(max=visual.index.shape[1] - 1)
            anchor = visual.index.gather(1, token.expand(added.shape)) - (anchor < 0).long()
        self.trace.host_syncs += 1
        change = cut(segment.layout, merge.mask, added, anchor)
        if change is None:
            return segment, hidden
        hidden = change.gather(hidden, merge.added)
        alike = lambda places: _on_every_axis(places, segment.positions)  # noqa: E731
        if self.method.positions == "renumber":
            positions = alike((change.layout.valid.cumsum(1) - 1).clamp(min=0))
        else:
            places = self._added_positions(merge)
            positions = change.gather(segment.positions, None if places is None else alike(places))
        return self._segment(change.layout, positions, hidden), hidden

    def _added_positions(self, merge: Merge) -> Tensor | None:
        if merge.added is not None and merge.added_positions is None:
            raise VisibenchError(f"{self.method.name}: new tokens need added_positions, or positions='renumber'")
        return merge.added_positions

    def _segment(self, layout: TokenLayout, positions: Tensor, hidden: Tensor) -> Segment:
        valid = None if layout.is_full else layout.valid
        mask = attention_mask(self._implementation, valid, layout.width, layout.width, hidden)
        rope = self.adapter.rotary(hidden, positions)
        return Segment(
            layout, positions, rope, mask, valid=valid, length=layout.width, next_position=positions[:, -1:] + 1
        )

    @property
    def _implementation(self) -> str:
        return implementation_of(self.adapter.decoder.config)

    # ---- attention --------------------------------------------------------------------------------------------

    def _on_attention(
        self, layer: int, kernel: Callable, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any
    ) -> Any:
        segment = self._segments[layer]
        if self._decoding or max(segment.layout.visual_counts) == 0:
            return kernel(module, q, k, v, mask, **kwargs)

        def dense(values: Tensor) -> Tensor:
            with self.watch("model"):
                return kernel(module, q, k, values, mask, **kwargs)[0]

        view = AttentionView(layer, segment.layout, (q, k, v), kwargs["scaling"], dense, self.trace)
        with self.watch("method"):
            replaced = self._forward.attention(layer, view)
        return (view.output if replaced is None else replaced), None

    # ---- decoding ---------------------------------------------------------------------------------------------

    def _decode_step(self, segment: Segment, layer: int, hidden: Tensor) -> dict[str, Any]:
        """Positions, rotary table and mask of new tokens in a segment; made once for all its layers."""
        if layer > 0 and self._segments[layer - 1] is segment:
            return segment.step
        assert segment.next_position is not None
        queries = hidden.shape[1]
        steps = torch.arange(queries, device=hidden.device).expand(hidden.shape[0], -1)
        positions = segment.next_position + _on_every_axis(steps, segment.positions)
        segment.next_position = segment.next_position + queries
        new = torch.ones_like(steps, dtype=torch.bool)
        if self._padding is not None and self._padding.shape[1] >= queries:
            new = self._padding[:, -queries:].bool()
        segment.length += queries
        if segment.valid is not None:
            segment.valid = torch.cat([segment.valid, new], dim=1)
        mask = attention_mask(self._implementation, segment.valid, queries, segment.length, hidden)
        segment.step = ruling(mask, self.adapter.rotary(hidden, positions), positions)
        return segment.step


def _on_every_axis(places: Tensor, positions: Tensor) -> Tensor:
    """Int (B, n) in the form of ``positions``, (B, L) or (B, L, 3), as text has them: the same on every axis."""
    return places if positions.ndim == 2 else places[..., None].expand(-1, -1, positions.shape[2])


def _hooked(stack: ExitStack, register: Callable, hook: Callable) -> None:
    stack.callback(register(hook, with_kwargs=True).remove)


def _check_cache(cache: Any) -> None:
    if cache is None:
        return
    if not isinstance(cache, DynamicCache) or any(getattr(layer, "is_sliding", False) for layer in cache.layers):
        raise UnsupportedModelError(
            f"prune() needs a DynamicCache with full attention, not {type(cache).__name__}: "
            "leave cache_implementation unset and use a model without sliding-window layers"
        )


def prune(
    model: PreTrainedModel,
    method: Method,
    layout: TokenLayout | None = None,
    *,
    watch: Watch = unwatched,
    features: FeatureStore | None = None,
) -> PruningSession:
    """Context manager: inside, ``model(...)`` and ``model.generate(...)`` run under ``method``.

    Parameters
    ----------
    model
        A supported Hugging Face model with its language-model head, e.g. ``LlavaForConditionalGeneration``, or a bare
        decoder such as ``LlamaForCausalLM`` together with ``layout``.
    method
        From :func:`visibench.load_method`.
    layout
        Which tokens are visual. Needed where it cannot be read from ``input_ids``.
    watch
        For timing: called with ``"method"`` around the work of the method in prefill, and inside that with ``"model"``
        around the attention that the model computes in any case; returns a context manager.
    features
        Where to share outputs of the vision tower between sessions on this model. Methods that change the tower run it.

    The session's ``trace`` records the latest prefill. Pruned prefills return logits for the tokens that are left; the
    text after the image stands at the end. On exit, also after an exception, the model is exactly as it was.
    Raises :class:`~visibench.errors.VisibenchError` for nested use, an unsupported model or cache, and options that
    cannot act on this model.
    """
    return PruningSession(model, method, layout, watch, features)
