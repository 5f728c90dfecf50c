"""Attention of the decoder's layers: `kernels` listens to the one that the model calls, `weights` computes what methods
read of it besides.
"""

from .kernels import Interception, Kernel, attention_mask, by_row, carried, implementation_of, kernel_of
from .weights import (
    BLOCK,
    Contributions,
    Logits,
    cap_of,
    contributions,
    counting,
    fine,
    is_plain,
    largest_weights,
    last_weights,
    places,
    repeat_heads,
    row_weights,
    subset_attention,
    weights_in_blocks,
    weights_of,
    written,
)

__all__ = [
    "BLOCK",
    "Contributions",
    "Interception",
    "Kernel",
    "Logits",
    "attention_mask",
    "by_row",
    "cap_of",
    "carried",
    "contributions",
    "counting",
    "fine",
    "implementation_of",
    "is_plain",
    "kernel_of",
    "largest_weights",
    "last_weights",
    "places",
    "repeat_heads",
    "row_weights",
    "subset_attention",
    "weights_in_blocks",
    "weights_of",
    "written",
]
