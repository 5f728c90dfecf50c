"""ViP-LLaVA: as LLaVA-1.5, with features of several vision blocks side by side."""

from dataclasses import replace

from .llava import FAMILY as _LLAVA

FAMILY = replace(_LLAVA, towers={"clip_vision_model": None}, variant=None)
