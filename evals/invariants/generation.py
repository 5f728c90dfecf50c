"""What must hold of generation under any method, and that the model is as before when the block is left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...engine import prune
from ...errors import InputError
from ...methods import Method
from .miniature import IMAGE, LAYERS, ROWS, collate, make_batch, state
from .prefills import Bench, close, hold, same

NEW = 6


def generate(model: Any, batch: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor]:
    """The new tokens (B, :data:`NEW`) and their logits (:data:`NEW`, B, vocabulary), greedily."""
    options |= {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "suppress_tokens": [IMAGE]}
    output = model.generate(**batch, **options, output_logits=True, return_dict_in_generate=True)
    return output.sequences[:, -NEW:], torch.stack(output.logits)


def everything_is_dense(bench: Bench, method: Method) -> None:
    """keeping everything is the dense model to the bit, in prefill and in generation"""
    batch = collate(make_batch(ROWS))
    with torch.no_grad():
        dense = bench.llava(**batch).logits
        dense_tokens, dense_logits = generate(bench.llava, batch)
        with prune(bench.llava, method) as session:
            same(bench.llava(**batch).logits, dense, f"logits under {method} and of the dense model")
            counts = session.trace.visual_counts().T.tolist()
            same(
                counts, [list(session.trace.prompt.visual_counts)] * LAYERS, "visual tokens by layer and in the prompt"
            )
            tokens, logits = generate(bench.llava, batch)
    same(logits, dense_logits, f"logits of generated tokens under {method} and of the dense model")
    same(tokens, dense_tokens, f"tokens generated under {method} and by the dense model")


def cache_changes_nothing(bench: Bench, method: Method) -> None:
    """generation with a KV cache equals generation without"""
    batch = collate(make_batch(ROWS[:4], seed=1))
    with torch.no_grad(), prune(bench.llava, method) as session:
        tokens, logits = generate(bench.llava, batch, use_cache=True)
        kept = session.trace.visual_counts()
        longer, uncached = generate(bench.llava, batch, use_cache=False)
        same(session.trace.visual_counts().tolist(), kept.tolist(), "visual tokens with a cache and without")
    close(logits, uncached, "logits with a cache and without")
    same(tokens, longer, "tokens generated with a cache and without")


def batch_generates_alike(bench: Bench, method: Method) -> None:
    """generation of a batch equals each row alone"""
    samples = make_batch(ROWS, seed=1)
    with torch.no_grad(), prune(bench.llava, method):
        together, _ = generate(bench.llava, collate(samples))
        for row, sample in enumerate(samples):
            same(
                together[row], generate(bench.llava, sample)[0][0], f"row {row}: tokens generated in a batch and alone"
            )


def chunks_are_alike(bench: Bench, method: Method) -> None:
    """a chunk of new tokens equals one at a time"""
    llava, batch = bench.llava, collate(make_batch(ROWS))
    new, mask = torch.tensor([[5, 6, 7]]).expand(len(ROWS), -1), batch["attention_mask"]
    with torch.no_grad(), prune(llava, method):
        cache = llava(**batch, use_cache=True).past_key_values
        for k in range(3):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            at = mask.cumsum(1)[:, -1:] - 1
            single = llava(input_ids=new[:, k : k + 1], attention_mask=mask, position_ids=at, past_key_values=cache)
        cache = llava(**batch, use_cache=True).past_key_values
        chunk = llava(
            input_ids=new, attention_mask=mask, position_ids=mask.cumsum(1)[:, -3:] - 1, past_key_values=cache
        )
    close(chunk.logits[:, -1], single.logits[:, -1], "logits behind a chunk and behind single tokens")


def model_is_as_before(bench: Bench, method: Method) -> None:
    """the model is as before when the block is left, also by an exception"""
    llava, batch = bench.llava, collate(make_batch(ROWS))
    with torch.no_grad():
        before, dense = state(llava), llava(**batch).logits
        with prune(llava, method):
            generate(llava, batch)
        hold(state(llava) == before, "something is left on the model behind a generation")
        with _raising(InputError), prune(llava, method):
            llava(**batch, labels=batch["input_ids"])
        hold(state(llava) == before, "something is left on the model behind refused inputs")
        for broken in (llava.model.multi_modal_projector, llava.model.language_model.layers[5].mlp):
            hook = broken.register_forward_hook(lambda *_: 1 / 0)
            with _raising(ZeroDivisionError), prune(llava, method):
                llava(**batch)
            hook.remove()
            hold(state(llava) == before, "something is left on the model behind an exception")
        same(llava(**batch).logits, dense, "logits of the dense model before and after")


@contextmanager
def _raising(kind: type[Exception]) -> Iterator[None]:
    """Raises unless an exception of this kind comes out of the block."""
    try:
        yield
    except kind:
        return
    hold(False, f"no {kind.__name__} comes out of the block")
