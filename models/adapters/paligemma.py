"""PaliGemma: a square image through SigLIP, and a prompt that is seen in both directions; positions begin at 1."""

from dataclasses import replace

from .gemma3 import FAMILY as _GEMMA3
from .gemma3 import siglip
from .llava import FAMILY as _LLAVA

FAMILY = replace(_GEMMA3, vision=siglip, first_position=1, token_type=0, scales_logits=True, views=_LLAVA.views)
