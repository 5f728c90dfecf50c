"""Video-LLaVA's image side: as LLaVA-1.5."""

from dataclasses import replace

from .llava import CLIP_OR_SIGLIP
from .llava import FAMILY as _LLAVA

FAMILY = replace(
    _LLAVA,
    vision_tower="model.image_tower",
    vision_blocks="model.image_tower.encoder.layers",
    sides=(),
    towers=CLIP_OR_SIGLIP,
    variant=None,
)
