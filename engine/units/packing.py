"""Which units the images of a prompt are made of: by what the tower was given, or by a processor's inputs alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from torch import Tensor

from ...models.adapters import Adapter
from .shapes import Packed, Units


def units_of(adapter: Adapter, shapes: Sequence[Sequence[int]], arguments: Mapping[str, Any]) -> Units:
    """Units of frames and patches ``shapes`` (N, 3), packed into images by the ``arguments`` of their encoder."""
    family, config, vision = adapter.family, adapter.model.config, adapter.geometry.vision
    assert vision is not None
    side = round(vision.merged**0.5)
    tokens = tuple((frames, rows // side, columns // side) for frames, rows, columns in shapes)
    if family.packing is None:
        images = tuple(Packed.whole(prod(grid)) for grid in tokens)
    else:
        packed = family.packing(adapter.model.base_model, vision, arguments)
        images = tuple(Packed(source.numpy(), units, padded.numpy()) for source, units, padded in packed)
    order = None if family.order is None else family.order(config, Tensor(shapes).long()).numpy()
    return Units(tokens, images, order)


def units_in(adapter: Adapter, inputs: Mapping[str, Any], visual_tokens: int) -> Units:
    """The units of ``inputs``, as a processor makes them, with so many visual tokens; nothing runs."""
    family, vision = adapter.family, adapter.geometry.vision
    assert vision is not None
    if family.packing is not None:
        number = sum(units for _, units, _ in family.packing(adapter.model.base_model, vision, inputs))
    elif vision.tokens:
        number = visual_tokens // vision.tokens
    else:
        assert family.grids is not None
        return units_of(adapter, family.grids(vision, (None, inputs.get("image_grid_thw")), inputs).tolist(), inputs)
    return units_of(adapter, [patches_of(adapter)] * number, inputs)


def patches_of(adapter: Adapter) -> tuple[int, int, int]:
    """Frames, rows and columns of patches of an image or tile, in a family where all are of one size."""
    vision = adapter.geometry.vision
    assert vision is not None
    side = round(vision.patches**0.5)
    return (1, side, side)
