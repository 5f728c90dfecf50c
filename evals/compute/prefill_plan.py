"""Prefills that never run: what sizes and a method's options say about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from ...engine import prune
from ...engine.layout import TokenLayout
from ...engine.trace import Trace
from ...engine.units.packing import units_in
from ...engine.units.rows import ImageRows
from ...engine.units.shapes import Units
from ...errors import OptionError, VisibenchError
from ...methods import Method
from ...models import LoadedModel
from ...models.adapters import Adapter
from ...models.geometry import check_prompt, image_inputs


def planned_prefill(loaded: LoadedModel, method: Method, text: int, visual_tokens: int) -> Trace:
    """The trace of one prompt's prefill, from sizes and options alone; nothing runs.

    ``text``: text tokens, half of them in front of the ``visual_tokens``, whose images are those of
    :meth:`LoadedModel.synthetic_inputs`. What the method itself computes is not known and left out. Raises
    :class:`~visibench.errors.VisibenchError` for what could not run either, :class:`OptionError` where the inputs
    decide how many tokens are left.
    """
    check_prompt(1, text, visual_tokens)
    prune(loaded.model, method)  # checks that it could
    spans = [(text // 2, text // 2 + visual_tokens)] if visual_tokens else []
    layout, inputs = TokenLayout.from_spans(text + visual_tokens, spans), image_inputs(loaded.adapter, visual_tokens)
    trace = planned(loaded.adapter, method, layout, inputs)
    if trace is None:
        raise OptionError(f"{method}: what it saves shows only when it runs: give --weights random")
    return trace


def planned(adapter: Adapter, method: Method, layout: TokenLayout, inputs: Mapping[str, Any]) -> Trace | None:
    """The trace of a batch with this ``layout``, without what the method itself computes; None: the inputs decide.

    ``inputs``: the sizes of its images, as a processor names them; nothing runs.
    """
    units = rows = None
    if any(layout.visual_counts):
        units = units_in(adapter, inputs, sum(layout.visual_counts))
        rows = ImageRows(layout, units.images, units.width)
        layout = replace(layout, images=rows.shapes(units))
    counts = method.visual_counts(layout, adapter.geometry)
    if counts is None:
        return None
    trace = Trace(layout, adapter.geometry.layers)
    for left in counts.T.tolist():
        trace.enter(_left(layout, left))
    if units is None or rows is None:
        return trace
    return trace if _seen(trace, method, adapter, units, rows, counts[:, 0]) else None


def _left(layout: TokenLayout, counts: list[int]) -> TokenLayout:
    """The layout with so many visual tokens in each row."""
    sizes = zip(layout.lengths, layout.visual_counts, counts, strict=True)
    lengths = tuple(length - before + left for length, before, left in sizes)
    return replace(layout, facts=_unknown, width=max(lengths), lengths=lengths, visual_counts=tuple(counts), span=None)


def _unknown() -> NoReturn:
    raise VisibenchError("a plan knows how many tokens stay, and not which")


def _seen(trace: Trace, method: Method, adapter: Adapter, units: Units, rows: ImageRows, entered: Tensor) -> bool:
    """Write down what the vision side computes; ``entered``: visual tokens at layer 0, int (B,). False: not known."""
    vision, points = adapter.geometry.vision, {*method.hook_points}
    assert vision is not None
    side = round(vision.merged**0.5)
    if vision.tiled or not vision.tokens:  # else all images are alike
        trace.grids = torch.tensor([(frames, side * high, side * wide) for frames, high, wide in units.grids])
    trace.units_of_row = rows.of_row
    trace.projected = torch.from_numpy(rows.sum(np.array([*map(prod, units.grids)])))
    if "image" in points:
        small = [method.smaller(grid, vision) for grid in units.grids]
        trace.tower_grids = torch.tensor([(frames, side * high, side * wide) for frames, high, wide in small])
    if "tower" in points:
        blocks = [method.tower_tokens(replace(vision, tokens=prod(grid))) for grid in units.grids]
        if vision.window is not None or None in blocks:  # in windows the inputs decide how many pairs there are
            return False
        known = torch.tensor([[(n, m, n * n) for n, m in own] for own in blocks if own is not None])
        trace.tower = rows.group(known[:, None])
    if {"image", "tower", "vision"} & points:
        assert trace.prompt.images is not None
        loose = [sum(image.loose for image in images) for images in trace.prompt.images]
        trace.projected = entered - torch.tensor(loose) * (method.newlines == "keep")
    return True
