"""Images that a method makes smaller in front of the tower: what the tower is given, and where its tokens go then."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import VisibenchError
from ...models.adapters import Adapter
from ..contract import Method
from ..decisions import Merge
from ..units.encoding import Encoding
from ..units.rows import ImageRows
from ..units.shapes import Grid, Units, on_device


def shown_smaller(
    adapter: Adapter, method: Method, encoding: Encoding, pixels: Tensor, given: dict[str, Any]
) -> tuple[Tensor, dict[str, Any]] | None:
    """Pixels and keyword arguments for the tower in place of those ``given``; None: all images stay as they are.

    The ``encoding`` then knows the ``smaller`` ones. Each shape of image is asked about once.
    """
    family, config, units, vision = adapter.family, adapter.model.config, encoding.units, encoding.vision
    groups, grids, ways = units.whole, [*units.grids], family.patches
    # Images of several shapes are rows of pixels, one a patch; else there is one group.
    sizes = [prod(grid) * vision.merged for grid in grids] if len(groups) > 1 else [len(pixels)]
    parts = [*pixels.split(sizes)]
    for group in groups:
        own = [parts[unit] for unit in group.units] if len(groups) > 1 else parts
        images = torch.cat(own) if len(own) > 1 else own[0]
        if ways is not None:
            images = ways.images(config, images, _patches([group.grid], vision.merged)[0])
        small, after = method.image(images, group.grid, vision), method.smaller(group.grid, vision)
        if small is None:
            continue
        _check(method, images, small, group.grid, after)
        rows = small if ways is None else ways.rows(config, small)
        places = group.units if len(groups) > 1 else (0,)
        for place, part in zip(places, rows.chunk(len(places)), strict=True):
            parts[place] = part
        for unit in group.units:
            grids[unit] = after
    if (*grids,) == units.grids:
        return None
    pixels = torch.cat(parts) if len(parts) > 1 else parts[0]
    patches = torch.tensor(_patches(grids, vision.merged))
    order = None if family.order is None else family.order(config, patches).numpy()
    encoding.smaller = Units(tuple(grids), (), order)
    more = {} if family.smaller is None else family.smaller(config, given, pixels, patches)
    # Other tensors follow from the shapes that the images had: the tower makes its own.
    rest = {key: value for key, value in given.items() if not isinstance(value, Tensor)}
    return pixels, rest | more


def _check(method: Method, images: Tensor, small: Tensor, before: Grid, after: Grid) -> None:
    """Raise :class:`VisibenchError` unless the images that a method made are as large as it says, and smaller."""
    sides = [side // old * new for side, old, new in zip(images.shape[2:], before[1:], after[1:], strict=True)]
    wanted = (*images.shape[:2], *sides)
    if small.shape != wanted or before == after or any(new > old for old, new in zip(before, after, strict=True)):
        raise VisibenchError(
            f"{method.name}.image: of images {tuple(images.shape)}, {before} tokens, it made {tuple(small.shape)}, and "
            f"{method.name}.smaller says {after} tokens, which is {wanted}: it must be fewer, and the same"
        )


def _patches(grids: Any, merged: int) -> list[tuple[int, int, int]]:
    side = round(merged**0.5)
    return [(frames, side * rows, side * columns) for frames, rows, columns in grids]


def shown_patches(encoding: Encoding) -> Tensor:
    """Int (N, 3): frames and patches of what the tower was given."""
    assert encoding.smaller is not None
    return torch.tensor(_patches(encoding.smaller.grids, encoding.vision.merged))


def spaced(encoding: Encoding, outputs: Any) -> Any:
    """What a tower put out of the tokens of all images, (T, D) each, with zeros behind those of each image."""
    if not isinstance(outputs, Tensor):
        return [spaced(encoding, output) for output in outputs]
    assert encoding.smaller is not None
    sizes = [prod(grid) for grid in encoding.units.grids]
    firsts = np.cumsum([0, *sizes])
    places = [first + np.arange(prod(grid)) for first, grid in zip(firsts, encoding.smaller.grids, strict=False)]
    index = on_device(np.concatenate(places), outputs)
    return outputs.new_zeros(sum(sizes), *outputs.shape[1:]).index_copy_(0, index, outputs)


def renewed(encoding: Encoding, projected: Tensor, *, anchored: bool) -> Merge:
    """The decision that images made smaller are their new tokens, as they leave the projector, and nothing else.

    ``anchored``: each stands by the token in whose place :func:`spaced` has put it.
    """
    units, smaller = encoding.units, encoding.smaller
    assert smaller is not None
    same = [before == after for before, after in zip(units.grids, smaller.grids, strict=True)]
    stay = tuple(prod(grid) * own for grid, own in zip(units.grids, same, strict=True))
    new = [prod(grid) * (not own) for grid, own in zip(smaller.grids, same, strict=True)]
    place = torch.arange(max(units.width, *new), device=projected.device)
    mask, there = (place < on_device(np.array([counts]).T, projected) for counts in (stay, new))
    added, most = smaller.spread(projected), max(new)
    return Merge(
        mask[:, : units.width],
        added=added[:, :most],
        added_present=None if min(new) == most else there[:, :most],
        anchors=place[:most].expand(len(new), -1) if anchored else None,
        counts=stay,
    )


def images_of(rows: ImageRows, encoding: Encoding) -> Tensor:
    """Int (M, 3): frames and patches of what the tower was given, row by row."""
    return shown_patches(encoding)[[unit for own in rows.of_row for unit in own]]
