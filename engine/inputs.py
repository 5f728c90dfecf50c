"""What the model is called with: read once, and refused by name where pruning would answer another question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, UnsupportedModelError
from .contract import Method
from .generation import VIDEO, Generation
from .layout import VISUAL, TokenLayout


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call of the model.

    ``mask``: 2D attention mask (B, columns so far and new ones) or None. ``cache``: past_key_values. ``images``:
    whether any come with this call, or videos; ``videos``: whether those do; ``encoded``: what ``generate`` made of
    them before. ``maps``: whether attention maps were asked for. ``drafts``: new tokens at the end that are no part of
    the prompt. ``is_step``: whether they are what ``generate`` has just chosen.
    """

    ids: Tensor | None
    embeddings: Tensor | None
    mask: Tensor | None
    cache: Any
    images: bool
    encoded: Any
    maps: bool
    videos: bool = False
    drafts: int = 0
    is_step: bool = False

    @property
    def given(self) -> Tensor:
        """Ids (B, n), or embeddings (B, n, D)."""
        given = self.ids if self.ids is not None else self.embeddings
        if given is None:
            raise InputError("give the model input_ids or inputs_embeds")
        return given

    @property
    def tokens(self) -> int:
        """New tokens of each row, padding included."""
        return self.given.shape[1]


def read(arguments: Mapping[str, Any], generation: Generation | None, *, maps: bool) -> Inputs:
    """Inputs from the bound ``arguments`` of the model's forward.

    ``generation``: the call of ``generate`` that they are part of. ``maps``: whether the configuration asks for
    attention maps. Raises :class:`InputError` for arguments that have no meaning under pruning.
    """
    arguments = {**arguments.get("kwargs", {}), **arguments}
    if arguments.get("labels") is not None:
        raise InputError("labels cannot be given under prune(): pruned logits are shorter; compare the last ones")
    mask, kept = arguments.get("attention_mask"), arguments.get("logits_to_keep", 0)
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        raise InputError("prune() needs a 2D attention mask (batch, length), 1 for tokens and 0 for left padding")
    if isinstance(kept, Tensor):
        raise InputError(
            "logits_to_keep as a tensor names places that pruning moves: give a number, so many of the last tokens"
        )
    encoded = arguments.get("mm_encoder_outputs") or {}
    image, video = encoded.get("image"), encoded.get("video")
    videos = video is not None or arguments.get("pixel_values_videos") is not None
    inputs = Inputs(
        arguments.get("input_ids"),
        arguments.get("inputs_embeds"),
        mask,
        arguments.get("past_key_values"),
        videos or image is not None or arguments.get("pixel_values") is not None,
        video if image is None else image,
        maps=bool(arguments.get("output_attentions", maps)),
        videos=videos,
    )
    return inputs if generation is None else replace(inputs, **generation.next_call(inputs.tokens, kept, inputs.cache))


def check_videos(method: Method, model: Any, *, supported: bool) -> None:
    """Raise :class:`UnsupportedModelError` where a family's videos, or a method on them, are not supported."""
    if not supported:
        raise UnsupportedModelError(VIDEO.format(type(model).__name__))
    points, reads = {*method.hook_points}, bool(method.vision_blocks) or method.by_unit
    if {"image", "tower", "vision"} & points or ("projector" in points and reads):
        raise UnsupportedModelError(
            f"{method.name} acts on the vision side, where frames of a video are no images: choose a method that acts "
            "in the decoder, or behind the projector alone, such as divprune"
        )


def prompt_layout(
    inputs: Inputs, mask: Tensor | None, given: TokenLayout | None, visual_tokens: Sequence[int]
) -> TokenLayout:
    """Roles of the new tokens that a method decides about: all but the drafts.

    ``mask``: (B, n), of the new tokens. ``given``: the user's own layout. ``visual_tokens``: ids of images and videos.
    """
    tokens, width = inputs.given, inputs.tokens - inputs.drafts
    mask = mask if mask is None or not inputs.drafts else mask[:, :width]
    if given is not None:
        layout = given.expand(tokens.shape[0])
        if layout.width != width:
            raise InputError(f"the layout has {layout.width} tokens, the input {width}")
        if mask is not None and not torch.equal(mask.bool().cpu(), layout.valid.cpu()):
            raise InputError("the layout's padding differs from the attention mask: build it with TokenLayout.batch")
    elif inputs.ids is None or not visual_tokens:
        raise InputError(
            "cannot tell which tokens are visual: pass input_ids with image tokens to a multimodal model, "
            "or layout=visibench.TokenLayout.from_spans(length, visual=[(start, end)])"
        )
    else:
        ids = inputs.ids[:, :width] if inputs.drafts else inputs.ids
        later = inputs.cache is not None and inputs.cache.get_seq_length() > 0
        if later and mask is not None and bool((mask[:, :-1] > mask[:, 1:]).any()):
            raise InputError(
                "images in a later turn: its rows must be left padded as a whole, and generate puts the answer's last "
                "token in front of the padding: feed that token in a call of its own before, or take rows one by one"
            )
        is_visual = torch.isin(ids, ids.new_tensor(visual_tokens))
        layout = TokenLayout.from_masks(is_visual, torch.ones_like(ids) if mask is None else mask)
    span = layout.span
    if span[1] == layout.width if span else bool((layout.roles[:, -1] == VISUAL).any()):
        raise InputError(
            "the last token of a prompt is visual, and pruning could drop the token whose logits are read: put text "
            "behind the image"
        )
    return layout.to(tokens.device)


def new_mask(inputs: Inputs, fed: int, padding: Tensor | None) -> Tensor | None:
    """The part (B, n) of the attention mask that is about the new tokens behind ``fed`` cached ones; None: all count.

    ``padding``: bool (B, fed), the mask of the cached ones, None if all count.
    """
    mask, tokens = inputs.mask, inputs.tokens
    if mask is None:
        if padding is not None:
            raise InputError("rows in the KV cache are padded: give attention_mask, of all tokens so far and new ones")
        return None
    if mask.shape[1] != fed + tokens:
        raise InputError(
            f"attention_mask has {mask.shape[1]} columns, and the KV cache was fed {fed} tokens before these {tokens}"
        )
    return mask[:, fed:] if fed else mask


def hidden(inputs: Inputs, fed: int, padding: Tensor | None) -> Tensor | None:
    """Bool (B, fed): which cached tokens count, where a new turn hides some that did; None if it hides none.

    Rows of a batch that ended early were fed padding by ``generate``, and the next turn's mask says so. Its own steps
    hide nothing, and are not worth waiting for the answer.
    """
    if inputs.mask is None or not fed or inputs.is_step:
        return None
    counts = inputs.mask[:, :fed].bool()
    if padding is None:
        return None if bool(counts.all()) else counts
    more, less = torch.stack([(counts & ~padding).any(), (padding & ~counts).any()]).tolist()
    if more:
        raise InputError("attention_mask shows tokens of the KV cache that were padding when they were fed")
    return counts if less else None
