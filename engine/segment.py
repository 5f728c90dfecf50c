"""A segment: a run of decoder layers whose inputs hold the same tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .layout import TokenLayout


@dataclass
class Segment:
    """Decoder layers whose inputs hold the same tokens. ``own``: the session, not the model, rules here."""

    layout: TokenLayout
    positions: Tensor
    rope: Any
    mask: Tensor | None
    own: bool = True
    valid: Tensor | None = None
    length: int = 0
    next_position: Tensor | None = None
    step: dict[str, Any] = field(default_factory=dict)

    @property
    def ruling(self) -> dict[str, Any]:
        """What its layers are told in prefill."""
        return ruling(self.mask, self.rope, self.positions)


def ruling(mask: Tensor | None, rope: Any, positions: Tensor) -> dict[str, Any]:
    """What a layer is told. Layers take positions of one axis alone, to tell packed sequences apart."""
    return {
        "attention_mask": mask,
        "position_embeddings": rope,
        "position_ids": positions if positions.ndim == 2 else None,
    }
