"""Which models are supported. What was tested stands in these tables; all else is refused before anything runs.

A decoder belongs here once ``tests/models/test_support.py`` runs it: with everything kept it equals itself, behind a
cut it equals its own layers on the tokens that are left, and its compute is what is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import UnsupportedModelError

DECODERS = {
    "cohere": "Command R",
    "cohere2": "Command R7B and A",
    "gemma": "Gemma 1",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3",
    "glm4": "GLM-4-0414",
    "glm4v_text": "GLM-4.1V",
    "granite": "Granite 3",
    "llama": "Llama 2 and 3, Vicuna",
    "mistral": "Mistral",
    "phi3": "Phi-3",
    "qwen2": "Qwen2 and 2.5",
    "qwen2_5_vl_text": "Qwen2.5-VL",
    "qwen2_vl_text": "Qwen2-VL",
    "qwen3": "Qwen3",
    "qwen3_vl_text": "Qwen3-VL",
    "smollm3": "SmolLM3",
}
"""Tested text decoders, by ``model_type`` of the text configuration."""

ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")
"""Attention implementations of transformers that can be observed."""

Towers = Mapping[str, str | None]
"""Tested vision towers of a family, each with its strategy of choosing features (None: it has no choice)."""

# ---- what cannot be carried through a cut: what a message names, false where a configuration has none, and the message


def layer_types(text: Any) -> tuple[str, ...]:
    """How each layer attends, in the terms of transformers' configurations; ``text``: that of a text decoder."""
    window = getattr(text, "sliding_window", None)
    types = getattr(text, "layer_types", None)
    return tuple(types or [f"{'sliding' if window else 'full'}_attention"] * text.num_hidden_layers)


def _other_attention(text: Any) -> str:
    return ", ".join(sorted({*layer_types(text)} - {"full_attention", "sliding_attention"}))


def _experts(text: Any) -> int | None:
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    return next((number for name in names if (number := getattr(text, name, None))), None)


DECODER_LIMITS: tuple[tuple[Callable[[Any], Any], str], ...] = (
    (_other_attention, "layers attend by {}, not fully"),
    (
        # PaliGemma sets it for its prefix.
        lambda text: text.model_type == "gemma3_text" and text.use_bidirectional_attention,
        "text is seen in both directions, so that no answer can be generated",
    ),
    (
        lambda text: text.model_type == "gpt_oss",
        "attention has sinks, which scores of tokens do not follow",
    ),
    (_experts, "each layer chooses among {} experts, whose compute is not counted"),
    (
        lambda text: text.model_type not in DECODERS and text.model_type,
        f"text decoder {{!r}} has not been tested; tested: {', '.join(sorted(DECODERS))}",
    ),
)


def _tower(config: Any, towers: Towers) -> str | None:
    tower = config.vision_config.model_type
    return None if tower in towers else f"{tower!r} has not been tested; tested: {', '.join(sorted(towers))}"


def _strategy(config: Any, towers: Towers) -> str | None:
    tower, given = config.vision_config.model_type, getattr(config, "vision_feature_select_strategy", None)
    tested = towers.get(tower)
    return None if tested in (None, given) else f"{given!r} for {tower}, which was tested with {tested!r}"


def _pooling_head(config: Any, towers: Towers) -> bool:
    return getattr(config.vision_config, "vision_use_head", False)


VISION_LIMITS: tuple[tuple[Callable[[Any, Towers], Any], str], ...] = (
    (_tower, "vision tower {}"),
    (_strategy, "vision_feature_select_strategy is {}"),
    (
        _pooling_head,
        "the vision tower computes a pooling head that nothing reads and no figure counts: set vision_use_head to "
        "false in a copy of its config.json",
    ),
)


def check_configuration(config: Any, towers: Towers, name: str) -> None:
    """Raise :class:`UnsupportedModelError` unless what ``config`` describes, a model called ``name``, was tested.

    ``towers``: those tested in its family, none for a bare decoder.
    """
    text = config.get_text_config()
    facts = [message.format(value) for value_of, message in DECODER_LIMITS if (value := value_of(text))]
    if towers:
        facts += [message.format(value) for value_of, message in VISION_LIMITS if (value := value_of(config, towers))]
    if facts:
        raise UnsupportedModelError(f"{name} ({config.model_type}) cannot be pruned: {'; '.join(facts)}")
