"""The session: hooks in, hooks out, and one record for each call of the model between them.

What outlives a call lies in the KV cache (:mod:`.cache`) and in the trace; what a call needs, in its own record
(:mod:`.passes`).
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NoReturn
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import InputError, UnsupportedModelError, VisibenchError
from ..models.adapters import Adapter
from ..models.compiled import is_compiled
from .attention import Interception, implementation_of
from .cache import OUTSIDE, PrunedCache, check_cache
from .contract import Method
from .generation import Generation, Turnstile, guarded
from .inputs import Inputs, check_videos, hidden, new_mask, prompt_layout, read
from .layout import TokenLayout
from .passes import Pass, Prompt
from .trace import Trace, Watch, unwatched
from .views import Sublayer
from .vision.features import FeatureStore
from .vision.tap import VisionTap

_active: WeakSet[nn.Module] = WeakSet()


class PruningSession:
    """A model under a pruning method; use :func:`prune`. ``trace`` is the record of the latest prefill."""

    def __repr__(self) -> str:
        return f"PruningSession({self.method} on {type(self.model).__name__})"

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
        self.geometry = self.adapter.geometry
        self._tap = fitting(self.adapter, method, watch, features)
        self._trace: Trace | None = None
        self._pass: Pass | None = None
        self._turnstile = Turnstile()
        # Held during a call of the model, and from the beginning of generate until a cache carries the state.
        self._running, self._holds = threading.RLock(), 0
        self._generation: Generation | None = None
        self._listeners: Interception | None = None  # while the block is open
        self._exit = ExitStack()

    @property
    def trace(self) -> Trace:
        """Record of the latest prefill."""
        if self._trace is None:
            raise VisibenchError("nothing has been traced yet: call the model inside the `with` block first")
        return self._trace

    def _check_videos(self) -> None:
        check_videos(self.method, self.model, supported=self.adapter.family.video_token is not None)

    def feeds(self, cache: PrunedCache) -> bool:
        """Whether a call of the model inside the block is filling ``cache`` right now."""
        return self._pass is not None and self._pass.cache is cache

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        # Reached by deep copies of the model, whose hooks lead here.
        raise VisibenchError("a model cannot be copied while it is being pruned: copy it outside the `with` block")

    # ---- entering and leaving ---------------------------------------------------------------------------------

    def __enter__(self) -> PruningSession:
        decoder = self.adapter.decoder
        if decoder in _active:
            raise VisibenchError("this model is already being pruned: leave the first `with visibench.prune(…)` block")
        _refuse_compiled(self.adapter)
        with ExitStack() as stack:
            _active.add(decoder)
            stack.callback(_active.discard, decoder)
            hook = partial(_hooked, stack)
            hook(self.model.register_forward_pre_hook, self._on_model)
            hook(self.model.register_forward_hook, self._behind_model)
            hook(partial(self.model.register_forward_hook, always_call=True), self._close)
            hook(decoder.register_forward_pre_hook, self._on_decoder)
            hook(decoder.rotary_emb.register_forward_pre_hook, self._on_rotary)
            for number, layer in enumerate(self.adapter.layers):
                hook(layer.register_forward_pre_hook, partial(self._on_layer, number))
                if number == len(self.adapter.layers) - 1:
                    hook(layer.register_forward_hook, self._behind_layers)
                if "sublayers" in self.method.hook_points:
                    hook(layer.self_attn.register_forward_hook, partial(self._behind_sublayer, number, "attention"))
                    hook(layer.mlp.register_forward_hook, partial(self._behind_sublayer, number, "mlp"))
            self._listeners = stack.enter_context(Interception(self._interceptors()))
            stack.enter_context(self._tap)
            stack.enter_context(guarded(self.model, self._around_generate, self._check_videos))
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        with self._running:  # a call in another thread ends first, so that no half of it runs unhooked
            self._exit.close()
            self._pass = self._listeners = None
            self._tap.forget()

    def _interceptors(self) -> dict[Any, Callable]:
        return {layer.self_attn: partial(self._on_attention, i) for i, layer in enumerate(self.adapter.layers)}

    @contextmanager
    def _around_generate(self, assisted: bool) -> Iterator[None]:
        self._turnstile.enter()
        before, self._generation = self._generation, Generation(assisted)
        self._hold()
        if before is None:
            self._tap.forget()
        try:
            yield
        finally:
            self._let_go()
            self._generation = before
            self._turnstile.leave()

    def _hold(self) -> None:
        self._running.acquire()
        self._holds += 1

    def _let_go(self, but: int = 0) -> None:
        while self._holds > but:
            self._holds -= 1
            self._running.release()

    # ---- what the model hands us ------------------------------------------------------------------------------

    def _on_model(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before a call of the whole model: read it, refuse it or make its record."""
        self._turnstile.enter()
        self._hold()
        try:
            if self._listeners is None:  # the block was left meanwhile
                raise VisibenchError(OUTSIDE)
            if not self._listeners.is_in_place:
                raise VisibenchError(
                    f"the attention implementation was changed inside the `with` block, and {self.method.name} acts in "
                    "attention: call set_attn_implementation before it"
                )
            if self.model.training and any(
                getattr(part, "gradient_checkpointing", False) for part in self.model.modules()
            ):
                raise UnsupportedModelError(
                    "gradient checkpointing runs layers a second time, on tokens that are gone by then: switch it off"
                )
            arguments = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
            maps = bool(getattr(self.adapter.decoder.config, "output_attentions", False))
            self._pass = self._begin(read(arguments, self._generation, maps=maps))
        except BaseException:
            self._let_go(but=self._holds - 1)
            self._turnstile.leave()
            raise

    def _begin(self, inputs: Inputs) -> Pass:
        if inputs.videos:
            self._check_videos()
        check_cache(inputs.cache, self, self.adapter.layer_types)
        cache = inputs.cache if isinstance(inputs.cache, PrunedCache) else None
        fed, padding = (0, None) if cache is None else (cache.fed, cache.padding)
        mask, prompt = new_mask(inputs, fed, padding), None
        hides = hidden(inputs, fed, padding)
        if cache is not None and hides is not None:
            cache.hide(hides)
        if not fed or inputs.images:
            prompt = self._prompt(inputs, mask, self.layout if not fed else None)
            layout = prompt.layout
            mask = None if layout.is_full else layout.valid
            if mask is not None and inputs.drafts:
                mask = torch.cat([mask, mask.new_ones(layout.rows, inputs.drafts)], dim=1)
        elif mask is not None:
            mask = None if inputs.is_step or bool(mask.all()) else mask.bool()
        return Pass(self.adapter, self.method, self._tap, self, inputs, prompt, mask, threading.get_ident())

    def _prompt(self, inputs: Inputs, mask: Tensor | None, given: TokenLayout | None) -> Prompt:
        # Nobody knows whose features a caller hands over; those of generate are the latest seen.
        self._tap.begin(None if self._generation is None else inputs.encoded)
        layout = prompt_layout(inputs, mask, given, self.adapter.visual_tokens)
        trace = self._trace = Trace(layout, self.geometry.layers, self.watch)
        trace.has_videos = inputs.videos
        if self.adapter.family.views is not None:
            trace.views = partial(self.adapter.family.views, self.model.config)
        return Prompt(layout, trace)

    def _on_decoder(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, kwargs if self._pass is None else self._pass.enter_decoder(kwargs)

    def _on_rotary(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Positions as the model has them, (B, L) or (3, B, L): not every family hands them on to its layers."""
        if self._pass is not None and self._pass.positions is None:
            self._pass.positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]

    def _on_layer(self, layer: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        if self._pass is None or self._pass.thread != threading.get_ident():
            raise InputError("under prune() call the model itself, not a part of it")
        hidden, kwargs = self._pass.enter_layer(layer, module, hidden, kwargs)
        return (hidden, *args), kwargs

    def _behind_layers(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        assert self._pass is not None
        laid = self._pass.leave_layers(output[0] if isinstance(output, tuple) else output)
        return (laid, *output[1:]) if isinstance(output, tuple) and laid is not None else laid

    def _on_attention(self, layer: int, kernel: Callable, module: nn.Module, *qkv_mask: Any, **kwargs: Any) -> Any:
        assert self._pass is not None
        return self._pass.attend(layer, kernel, module, *qkv_mask, **kwargs)

    def _behind_sublayer(
        self, layer: int, name: Sublayer, module: nn.Module, args: tuple, kwargs: dict, output: Any
    ) -> None:
        assert self._pass is not None
        taken = args[0] if args else kwargs["hidden_states"]
        self._pass.leave_sublayer(layer, name, taken, output[0] if isinstance(output, tuple) else output)

    def _behind_model(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        assert self._pass is not None
        self._pass.finish()

    def _close(self, module: nn.Module, args: tuple, kwargs: dict, output: Any = None) -> None:
        """Behind a call of the whole model, also one that failed."""
        if self._pass is None or self._pass.thread != threading.get_ident():
            return
        self._pass.close()
        # Without a cache, nothing but the hooks prunes the next token of generate.
        bare, self._pass = self._pass.cache is None, None
        self._let_go(but=int(self._generation is not None and bare))
        self._turnstile.leave()


def _hooked(stack: ExitStack, register: Callable, hook: Callable) -> None:
    stack.callback(register(hook, with_kwargs=True).remove)


def fitting(
    adapter: Adapter, method: Method, watch: Watch = unwatched, features: FeatureStore | None = None
) -> VisionTap:
    """The hooks of a method on the vision side of a model.

    Raises :class:`~visibench.errors.VisibenchError` where the method cannot act on the model.
    """
    _check_attention(adapter, method)
    tap = VisionTap(adapter, method, watch, features)
    method.check(adapter.geometry)
    return tap


def _check_attention(adapter: Adapter, method: Any) -> None:
    """Raise :class:`UnsupportedModelError` unless the decoder's layers can be told who sees whom, and how much."""
    implementation = implementation_of(adapter.decoder.config)
    if "flash" in implementation and method.biases_keys:
        raise UnsupportedModelError(
            f"{method.name} adds to the attention logits of keys, and {implementation} cannot: load the model with "
            "attn_implementation='sdpa'"
        )
    if "flash" in implementation and adapter.carried_types & {*adapter.layer_types}:
        raise UnsupportedModelError(
            f"{type(adapter.model).__name__} has layers that attend within a window, or in both directions, and "
            f"{implementation} goes by places, which a cut moves: load the model with attn_implementation='sdpa'"
        )


def _refuse_compiled(adapter: Adapter) -> None:
    """Raise for compiled modules, in which hooks and attention functions are fixed when they are traced.

    Not for a compiled ``forward`` of what stands beside the attention in a layer: hooks go round it, none inside.
    """
    free = {*adapter.beside_attention()}
    for name, module in adapter.model.named_modules():
        compiled = module._compiled_call_impl is not None or (is_compiled(module) and module not in free)
        if compiled or "_orig_mod" in module._modules:
            raise UnsupportedModelError(
                f"cannot prune a compiled model ({name or type(module).__name__} is): pass it as it was before "
                "torch.compile, or load it with compile=True"
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
    text after the image stands at the end. KV caches carry what was pruned: a conversation goes on with its cache, with
    new images too, as long as the block is open. On exit, also after an exception, the model is exactly as it was.
    Raises :class:`~visibench.errors.VisibenchError` for nested use, an unsupported model or cache, and options that
    cannot act on this model.
    """
    return PruningSession(model, method, layout, watch, features)
