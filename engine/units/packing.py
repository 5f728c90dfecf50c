"""Which units the images of a prompt are made of: by what the tower was given, or by a processor's inputs alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from torch import tensor

from ...models.adapters import Adapter
from .shapes import Packed, Units


def units_of(
    adapter: Adapter, patches: Sequence[Sequence[int]] | None, number: int, arguments: Mapping[str, Any]
) -> Units:
    """Units of frames and ``patches`` (N, 3), packed into images by the ``arguments`` of their encoder.

    None: a ``number`` of them, all of one size.
    """
    family, config, vision = adapter.family, adapter.model.config, adapter.geometry.vision
    assert vision is not None
    side = round(vision.merged**0.5)
    tokens = tuple((frames, rows // side, columns // side) for frames, rows, columns in patches or ())
    tokens = tokens or (vision.shape,) * number
    if family.packing is None:
        images = tuple(Packed.whole(prod(grid)) for grid in tokens)
    else:
        packed = family.packing(adapter.model.base_model, vision, arguments)
        images = tuple(Packed(source.numpy(), units, padded.numpy()) for source, units, padded in packed)
    known = None if family.order is None or patches is None else family.order(config, tensor(patches))
    return Units(tokens, images, None if known is None else known.numpy())


def units_in(adapter: Adapter, inputs: Mapping[str, Any], visual_tokens: int) -> Units:
    """The units of ``inputs``, as a processor makes them, with so many visual tokens; nothing runs."""
    family, vision = adapter.family, adapter.geometry.vision
    assert vision is not None
    if family.packing is not None:
        number = sum(units for _, units, _ in family.packing(adapter.model.base_model, vision, inputs))
        return units_of(adapter, None, number, inputs)
    if vision.tokens:
        return units_of(adapter, None, visual_tokens // vision.tokens, inputs)
    assert family.grids is not None
    patches = family.grids(vision, (None, inputs.get("image_grid_thw")), inputs)
    return units_of(adapter, patches.tolist(), len(patches), inputs)
