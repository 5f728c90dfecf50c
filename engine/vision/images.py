"""Methods behind the projector: they see images as these enter the decoder, whatever they are made of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ..contract import Forward, Method
from ..decisions import Merge, checked, on_images
from ..layout import TokenLayout
from ..units.encoding import Encoding
from ..units.rows import ImageRows
from ..units.shapes import ANCHOR, Group, Numbers, Packed, decided
from ..units.view import ImageView


def decided_on_images(
    forward: Forward, method: Method, layout: TokenLayout, visual: Tensor, encoding: Encoding
) -> tuple[Merge | None, Numbers]:
    """The decision about the rows (B, V), asked for images of one length together, and its cost for each row, int (B,).

    ``visual``: (B, V, D), what enters decoder layer 0. Under ``newlines="compete"`` tokens that are no feature are
    shown as well.
    """
    images, width = encoding.units.images, encoding.units.width
    shown = [image.is_feature | (method.newlines == "compete") for image in images]
    lengths = [int(own.sum()) for own in shown]
    whole = [Packed(np.where(own, own.cumsum() - 1, ANCHOR), 1, np.arange(own.sum())) for own in shown]
    rows = ImageRows(layout, whole, max(lengths))
    contents = rows.features(visual)
    firsts = [sum(image.units for image in images[:number]) for number in range(len(images))]
    macs = np.zeros(len(images), np.int64)

    def answer(group: Group) -> tuple[Tensor, Merge | None]:
        source = [images[number].moved(firsts[number] * width)[shown[number]] for number in group.units]
        units = [tuple(range(firsts[n], firsts[n] + images[n].units)) for n in group.units]
        view = ImageView(group.pick(contents), encoding, np.stack(source), units)
        decision = checked(forward.projected(view), method.name, "projected", view.sizes)
        macs[list(group.units)] += view.macs
        return view.projected, None if decision is None else on_images(decision)

    merge = decided(len(images), rows.width, _by_length(lengths), answer)
    decision = None if merge is None else rows.translate(merge, visual, anchors_stay=method.newlines != "drop")
    return decision, rows.sum(macs)


def _by_length(lengths: Sequence[int]) -> list[Group]:
    members: dict[int, list[int]] = defaultdict(list)
    for number, length in enumerate(lengths):
        members[length].append(number)
    return [Group((1, 1, length), tuple(numbers)) for length, numbers in members.items()]
