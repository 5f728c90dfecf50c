"""Which methods can act on the vision side of a model: asked before anything runs."""

from __future__ import annotations

from ...errors import UnsupportedModelError
from ...models.adapters import Adapter
from ..contract import VISION_SIDE, Method

UNTESTED = "{} acts on the vision side, and that of {} has not been tested: choose a method that acts in the decoder"


def needed(adapter: Adapter, method: Method) -> set[str]:
    """Hook points that the model's family must have been tested at: that of features, where the tower is read."""
    vision, points = adapter.geometry.vision, VISION_SIDE & set(method.hook_points)
    reads = bool(points and vision and (method.blocks_read(vision) or method.blocks_received(vision)))
    return points | ({"vision"} if reads or (points and method.by_unit) else set())


def check_side(adapter: Adapter, method: Method) -> None:
    """Raise :class:`UnsupportedModelError` where the method acts at a place at which the model's family does not."""
    vision, sides, points = adapter.geometry.vision, {*adapter.family.sides}, {*method.hook_points}
    if vision is None:
        if VISION_SIDE & points:
            raise UnsupportedModelError(
                f"{method.name} reads the vision tower, and a bare decoder has none: pass the full model"
            )
        return
    missing = needed(adapter, method) - sides
    if missing:
        behind = ", or behind the projector alone, such as divprune" * ("projector" in sides)
        raise UnsupportedModelError(UNTESTED.format(method.name, adapter.known_as) + behind)
