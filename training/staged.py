"""A decoder whose layers follow the stages: visual tokens enter late and leave early.

Semantics, for training and inference alike. A prompt is text and, for every image, its V visual tokens in order. With
``enter``, ``exit`` and ``sink``, at the input of layer ``l`` (0 is the first, whose input are the embeddings)

* ``l < enter``: of each image there is its first visual token and no other (``sink="visual"``), or none
  (``sink="bos"``: text is left with its own first token);
* ``enter <= l < exit``: all V visual tokens are there;
* ``l >= exit``: none of them is there, the first included.

"First" means of those visual tokens that the decoder is given, should some have been dropped before. Where a token is
there, it takes part as any token: it attends to the tokens before it that are there, is attended to by those behind it,
goes through the MLP, and what the layer made of it is the next layer's input. So the sink is a token like others from
layer 0 to ``exit``. A token that is not there costs nothing: no query, no key or value, no MLP, no mask.

What is held aside does not change: the other V - 1 (or V) visual tokens join at the input of layer ``enter`` as they
came from the projector, each between the neighbours and at the position id that it has in the plain prompt. Position
ids never change, neither of those that enter nor of the text when others leave. Hidden states of tokens that leave are
dropped. The last norm and the head see the text alone, unless ``exit`` is the number of layers: then nothing leaves.

A row without visual tokens is not touched. ``enter=0, exit=layers`` is the plain decoder, bit for bit. ``enter`` is
less than ``exit``: without layers that show the image there is nothing to train.

Here, in training, all rows of a batch have their V visual tokens at the same places, so staging is cutting and joining
along the sequence, and gradients reach the projector through every token that is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Staging:
    """Layers ``enter`` to ``exit`` - 1 see the image; ``sink`` is what stands in for it before: "visual" or "bos"."""

    enter: int
    exit: int
    sink: str = "visual"

    def __post_init__(self) -> None:
        if self.sink not in ("visual", "bos"):
            raise ValueError(f'sink: "visual" or "bos", not {self.sink!r}')
        if not 0 <= self.enter < self.exit:
            raise ValueError(f"enter ({self.enter}) must not be negative and must be less than exit ({self.exit})")

    def there(self, layer: int, visual: int) -> int:
        """How many of an image's ``visual`` tokens layer ``layer`` has: the first ones, always."""
        if layer >= self.exit:
            return 0
        if layer >= self.enter:
            return visual
        return min(visual, 1) if self.sink == "visual" else 0


def staged_forward(
    decoder: nn.Module, tokens: Tensor, positions: Tensor, before: int, visual: int, staging: Staging, **packing: Any
) -> Tensor:
    """Hidden states (B, L', D) behind the last norm, of the L' tokens that are there in the end.

    ``tokens`` (B, L, D) are the embeddings of the plain prompt and ``positions`` (B, L) their position ids: ``before``
    of text, ``visual`` of the image, text. ``packing`` goes to the attention function.
    """
    core: Any = decoder
    hidden, there, rotary = tokens, visual, core.rotary_emb(tokens, position_ids=positions)
    for number, layer in enumerate(core.layers):
        now = staging.there(number, visual)
        if now != there:
            # The first `now` stay or join, as embedded; the text behind them moves up.
            joining = tokens[:, before + there : before + now]
            hidden = torch.cat([hidden[:, : before + min(there, now)], joining, hidden[:, before + there :]], dim=1)
            places = torch.cat([positions[:, : before + now], positions[:, before + visual :]], dim=1)
            there, rotary = now, core.rotary_emb(tokens, position_ids=places)
        hidden = layer(hidden, attention_mask=None, position_embeddings=rotary, use_cache=False, **packing)
    return core.norm(hidden)
