"""Small models with random weights, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

IMAGE = 63
# (prefix, text, images): different lengths, no image, one and several images.
ROWS: list[tuple[int, ...]] = [(5, 9, 1), (3, 12, 2), (4, 6, 0), (2, 20, 1), (1, 10, 3)]
LAYERS, PATCHES = 10, 16


def make_llava(
    layers: int = LAYERS, kv_heads: int = 2, seed: int = 0, attention: str = "sdpa"
) -> LlavaForConditionalGeneration:
    """A LLaVA with random weights: 16 visual tokens an image, vocabulary 64, image token 63.

    Weights are large enough for attention to be far from uniform, so that methods have something to choose.
    """
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=24, patch_size=6
    )
    text = LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        initializer_range=0.25,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    sizes: dict[str, Any] = {"image_token_id": IMAGE, "image_seq_length": PATCHES, "vision_feature_layer": -2}
    config = LlavaConfig(vision_config=vision, text_config=text, **sizes)
    config._attn_implementation = attention
    return LlavaForConditionalGeneration(config).eval()


def make_batch(rows: list[tuple[int, ...]], seed: int = 0) -> list[dict[str, Any]]:
    """One input dictionary a row; a row is (prefix length, text length, images), the images behind the prefix."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for prefix, text, images in rows:
        words = torch.randint(3, 60, (1, prefix + text), generator=generator)
        between = torch.randint(3, 60, (1, max(images - 1, 0)), generator=generator)
        parts = [words[:, :prefix]]
        for k in range(images):
            parts.append(torch.full((1, 16), IMAGE))
            parts.append(between[:, k : k + 1])
        ids = torch.cat([*parts, words[:, prefix:]], dim=1)
        sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if images:
            sample["pixel_values"] = torch.randn(images, 3, 24, 24, generator=generator)
        samples.append(sample)
    return samples


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Left pad and stack."""
    width = max(s["input_ids"].shape[1] for s in samples)
    pad = lambda t: torch.nn.functional.pad(t, (width - t.shape[1], 0))  # noqa: E731
    batch = {key: torch.cat([pad(s[key]) for s in samples]) for key in ("input_ids", "attention_mask")}
    pixels = [s["pixel_values"] for s in samples if "pixel_values" in s]
    return batch | ({"pixel_values": torch.cat(pixels)} if pixels else {})


def state(model: LlavaForConditionalGeneration) -> tuple:
    """All that pruning could leave behind on a model but changed weights: hooks, attributes, configurations."""
    modules = dict(model.named_modules())
    members = {n: {k: [*v] if isinstance(v, dict) else None for k, v in vars(m).items()} for n, m in modules.items()}
    attention = [m.config._attn_implementation for m in modules.values() if hasattr(m, "config")]
    return members, attention, model.config.to_dict(), model.generation_config.to_dict()
