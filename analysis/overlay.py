"""One question under several methods: which visual tokens stay, where the last prompt token looks, and the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..engine import prune
from ..engine.contract import Forward, Method
from ..evals.compute.flops import executed
from ..methods import load_method
from ..methods.pieces import last_token_attention
from ..models import LoadedModel
from ..utils.overlay import Overlay, Strip

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..engine.contract import AttentionView, Geometry, TokenLayout

MAX_NEW_TOKENS = 32


@dataclass(frozen=True)
class Shown:
    """What a method did: its ``answer``, visual tokens T (mean over decoder layers), and executed multiply-adds."""

    method: str
    answer: str
    tokens: float
    macs: float

    def said(self) -> str:
        """In one line, whatever the answer holds."""
        compute = f"{self.macs * 1e-12:.3g} TFLOPs" if self.macs >= 1e10 else f"{self.macs * 1e-9:.3g} GFLOPs"
        answer = " ".join(self.answer.split())
        return f"{self.method}: “{answer}”  ·  T {self.tokens:.1f}  ·  {compute}"


@dataclass(frozen=True)
class LastAttention(Method):
    """Looks where the last prompt token looks; ``seen``: (B, V) by layer, mean over heads."""

    name = "last_attention"
    title = "Attention of the last token"
    hook_points = ("attention",)

    seen: list[Tensor] = field(default_factory=list, compare=False)

    def begin(self, layout: TokenLayout, geometry: Geometry) -> Forward:
        return _LastAttentionForward(self.seen)


class _LastAttentionForward(Forward):
    def __init__(self, seen: list[Tensor]) -> None:
        self.seen = seen

    def attention(self, layer: int, view: AttentionView) -> None:
        self.seen.append(last_token_attention(view, view.weights()))


@torch.inference_mode()
def overlay(
    loaded: LoadedModel, images: Sequence[Image], question: str, methods: Sequence[Method]
) -> tuple[Overlay, list[Shown]]:
    """The picture, and what each of the ``methods`` did, the dense model first.

    Raises :class:`~visibench.errors.InputError` where it is not known which place a token has in its image.
    """
    inputs = loaded.inputs([question], [list(images)])
    look = LastAttention()
    shown, strips, places = [], [], None
    for method in (load_method("none"), *methods):
        with prune(loaded.model, method) as session:
            model = session.model
            new = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)  # type: ignore[operator]
            trace = session.trace
        (answer,) = loaded.decode(new[:, inputs["input_ids"].shape[1] :])
        one = trace.show(list(images), processor=loaded.processor)
        (macs,) = executed(trace, loaded.geometry).total()
        shown.append(Shown(str(method), answer, float(trace.visual_counts().double().mean()), macs))
        strips += [Strip(shown[-1].said(), strip.kept, strip.made) for strip in one.strips]
        places = one.places
    with prune(loaded.model, look):
        loaded.model(**inputs, use_cache=False, logits_to_keep=1)
    attention = torch.stack(look.seen).mean(0)[0].double().cpu().numpy()
    assert places is not None
    return Overlay(list(images), places, strips, np.asarray(attention), question), shown
