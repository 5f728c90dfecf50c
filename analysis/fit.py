"""Hyperparameters that a method's authors fit to a model on a few samples, once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..engine import prune
from ..engine.layout import TokenLayout
from ..errors import VisibenchError
from ..methods import load_method
from ..models.adapters import Adapter


@torch.no_grad()
def vtw_layer(
    model: PreTrainedModel,
    samples: Sequence[dict[str, Any]],
    threshold: float = 0.003,
    first: int = 5,
    layout: TokenLayout | None = None,
) -> int:
    """The ``layer`` of VTW for ``model``: the first, from ``first`` on, at which withdrawal changes little.

    Parameters
    ----------
    samples
        Inputs of the model, one prompt each; the authors take 20.
    threshold
        Largest mean over samples of KL(dense ‖ withdrawn), in nats, between next-token distributions. The authors take
        0.003 for LLaVA-1.5-7B and 0.0005 for 13B.
    layout
        Which tokens are visual, for a bare decoder; the same for all samples.

    Raises :class:`~visibench.errors.VisibenchError` if no layer is good enough.
    """
    dense = [_next_token(model(**sample)) for sample in samples]
    divergences = {}
    for layer in range(first, Adapter(model).geometry.layers):
        with prune(model, load_method("vtw", layer=layer), layout=layout):
            withdrawn = [_next_token(model(**sample)) for sample in samples]
        apart = [(p.exp() * (p - q)).sum() for p, q in zip(dense, withdrawn, strict=True)]
        divergences[layer] = float(torch.stack(apart).mean())
        if divergences[layer] <= threshold:
            return layer
    best = min(divergences, key=divergences.__getitem__, default=None)
    nearest = (
        "the model has no such layer" if best is None else f"layer {best} comes nearest, with {divergences[best]:.3g}"
    )
    raise VisibenchError(f"vtw: no layer from {first} on reaches a divergence of {threshold:g}; {nearest}")


def _next_token(output: Any) -> Tensor:
    """Log-probabilities (vocabulary,) of the token behind the prompt, fp64."""
    return output.logits[0, -1].double().log_softmax(-1)
