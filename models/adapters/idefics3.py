"""Idefics3: as SmolVLM."""

from dataclasses import replace

from .smolvlm import FAMILY as _SMOLVLM

FAMILY = replace(_SMOLVLM, towers={"idefics3_vision": None})
