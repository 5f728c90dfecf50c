"""Prefills that never run: what sizes and a method's options say about them."""

from __future__ import annotations

import torch

from ...engine import prune
from ...engine.trace import Trace
from ...errors import OptionError
from ...methods import Method
from ...models import LoadedModel
from ...models.geometry import check_prompt, grids
from .paper_flops import Work, planned

_BEFORE_THE_PROJECTOR = {"image", "tower"}


def planned_prefill(loaded: LoadedModel, method: Method, text: int, visual_tokens: int) -> Trace:
    """The trace of one prompt's prefill, from sizes and options alone; nothing runs.

    ``text``: text tokens, half of them in front of the ``visual_tokens``, whose images are those of
    :meth:`LoadedModel.synthetic_inputs`. What the method itself computes is not known and left out. Raises
    :class:`~visibench.errors.VisibenchError` for what could not run either, :class:`OptionError` where the inputs
    decide how many tokens are left.
    """
    check_prompt(1, text, visual_tokens)
    prune(loaded.model, method)  # checks that it could
    geometry, images = loaded.geometry, grids(loaded.adapter, visual_tokens)
    prefix = text // 2
    whole = torch.full((1, geometry.layers), visual_tokens)
    start = planned(whole, visual_tokens, Work(), geometry, prefix=prefix, text=text - prefix)
    counts = method.visual_counts(start.prompt, geometry)
    if counts is None or _BEFORE_THE_PROJECTOR & set(method.hook_points):
        raise OptionError(f"{method}: what it saves shows only when it runs: give --weights random")
    trace = planned(counts, visual_tokens, Work(), geometry, prefix=prefix, text=text - prefix)
    trace.grids = images
    if images is not None and geometry.vision is not None:
        trace.projected = images.prod(1).sum(0, keepdim=True) // geometry.vision.merged
    if "vision" in method.hook_points:
        trace.projected = counts[:, 0]
    return trace
