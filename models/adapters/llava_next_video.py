"""LLaVA-NeXT-Video's image side: as LLaVA-NeXT."""

from dataclasses import replace

from .llava_next import FAMILY as _LLAVA_NEXT

FAMILY = replace(_LLAVA_NEXT, sides=())
