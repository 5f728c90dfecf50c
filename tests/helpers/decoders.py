"""Miniatures of families for the tests of methods in the decoder: random weights, one entry a family.

Rows of a batch are (text tokens, visual tokens), of two images of any shape (text tokens, (visual tokens, …)).
"""

import pytest
import torch
from families import BY_TOKEN, TEXT, VISION, collate
from transformers import AutoConfig, AutoModelForImageTextToText
from visibench.models.adapters import Adapter
from visibench.models.geometry import synthetic_inputs

TOWER = VISION | {"num_hidden_layers": 3, "num_attention_heads": 4}
CLIP = TOWER | {"model_type": "clip_vision_model", "image_size": 24}
SIGLIP = TOWER | {"model_type": "siglip_vision_model", "image_size": 24, "vision_use_head": False}
PIXTRAL = TOWER | {"model_type": "pixtral", "image_size": 48, "head_dim": 8}
VIT = VISION | {"depth": 3, "num_heads": 4, "out_hidden_size": 48}
LLAMA = TEXT | {"model_type": "llama"}
HEADS = TEXT | {"head_dim": 12}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}}
IMAGE, VIDEO = 63, 62
IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
QWEN = IDS | {"vision_start_token_id": 61, "vision_end_token_id": 60}
GLM = IDS | dict.fromkeys(("image_start_token_id", "video_start_token_id"), 61)
GLM |= dict.fromkeys(("image_end_token_id", "video_end_token_id"), 60)
PINPOINTS = {"image_grid_pinpoints": [[24, 48], [48, 24], [48, 48]]}

ONEVISION = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
ONEVISION |= {"image_grid_pinpoints": [[24, 24], [24, 48], [48, 24], [48, 48]]}
TILES = TOWER | {"image_size": 24}

CONFIGS = {
    "vipllava": {
        "image_token_id": IMAGE,
        "vision_config": CLIP,
        "text_config": LLAMA,
        "vision_feature_layers": [-2, -3],
    },
    "llava_onevision": IDS | ONEVISION | {"vision_config": SIGLIP, "text_config": TEXT | {"model_type": "qwen2"}},
    "qwen2_vl": QWEN
    | {
        "vision_config": {
            "depth": 3,
            "embed_dim": 32,
            "hidden_size": 48,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": 6,
        },
        "text_config": TEXT | MROPE,
    },
    "smolvlm": {"image_token_id": IMAGE, "scale_factor": 2, "vision_config": TILES, "text_config": LLAMA},
    "idefics3": {"image_token_id": IMAGE, "scale_factor": 2, "vision_config": TILES, "text_config": LLAMA},
    "llava": {"image_token_id": IMAGE, "vision_config": CLIP, "text_config": LLAMA},
    "llava_next": {
        "image_token_id": IMAGE,
        "vision_config": CLIP,
        "text_config": HEADS | {"model_type": "mistral", "sliding_window": 24},
    }
    | PINPOINTS,
    "llava_next_video": IDS | PINPOINTS | {"vision_config": CLIP, "text_config": LLAMA},
    "video_llava": IDS | {"image_seq_length": 16, "vision_config": CLIP, "text_config": LLAMA},
    "internvl": {
        "image_token_id": IMAGE,
        "image_seq_length": 16,
        "vision_config": TOWER | {"image_size": [48, 48], "patch_size": [6, 6]},
        "text_config": HEADS | {"model_type": "qwen3"},
    },
    "qwen2_5_vl": QWEN
    | {"vision_config": VIT | {"window_size": 24, "fullatt_block_indexes": [1]}, "text_config": TEXT | MROPE},
    "qwen3_vl": QWEN
    | {
        "vision_config": VIT | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 2]},
        "text_config": HEADS | MROPE,
    },
    "glm4v": GLM | {"vision_config": VIT | {"image_size": 48}, "text_config": TEXT | MROPE},
    "mistral3": {
        "image_token_index": IMAGE,
        "vision_config": PIXTRAL,
        "text_config": HEADS | {"model_type": "mistral", "sliding_window": None},
    },
    "gemma3": {
        "image_token_index": IMAGE,
        "mm_tokens_per_image": 4,
        "vision_config": SIGLIP,
        "text_config": HEADS | {"model_type": "gemma3_text", "sliding_window": 8, "query_pre_attn_scalar": 12},
    },
    "paligemma": {
        "image_token_index": IMAGE,
        "projection_dim": 48,
        "vision_config": SIGLIP | {"projection_dim": 48},
        "text_config": HEADS | {"model_type": "gemma"},
    },
    "deepseek_vl": {"image_token_id": IMAGE, "vision_config": SIGLIP, "text_config": LLAMA},
    "aya_vision": {
        "image_token_index": IMAGE,
        "downsample_factor": 2,
        "vision_feature_select_strategy": "full",
        "vision_config": SIGLIP,
        "text_config": HEADS | {"model_type": "cohere2", "sliding_window": 8},
    },
    "cohere2_vision": {
        "image_token_id": IMAGE,
        "downsample_factor": 2,
        "alignment_intermediate_size": 64,
        "vision_config": SIGLIP,
        "text_config": HEADS | {"model_type": "cohere2", "sliding_window": 8},
    },
}
"""Configurations by ``model_type``: a family's line of test; behind a plus, variants of it."""
LLAVA = CONFIGS["llava"]
FULL = {"vision_feature_select_strategy": "full"}
CONFIGS |= {
    "llava+cls": LLAVA | FULL,
    "llava+pixtral": LLAVA | FULL | {"vision_feature_layer": -1, "vision_config": PIXTRAL},
    "llava+blocks": LLAVA | {"vision_feature_layer": [-2, -3]},
}

TILED = [(9, 88), (6, 52), (5, 0), (12, 56)]
ROWS = dict.fromkeys(("llava_next", "llava_next_video", "llava_onevision"), TILED)
"""Of families whose images have shapes of their own; else :func:`rows_of` says it."""

KINDS = [pytest.param(kind, marks=[pytest.mark.slow] if "+" in kind else []) for kind in CONFIGS]

_models = {}


def miniature(kind, config, attention):
    """Random weights, large enough on the vision side for images to matter."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind.partition("+")[0], **config)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=attention).eval()
    for name, weights in model.named_parameters():
        if weights.ndim > 1 and not any(part in name for part in ("language_model", "text_model", "lm_head")):
            torch.nn.init.normal_(weights, std=0.2)
    return model


def decoder_model(kind, attention="eager"):
    """A miniature; eager attention by default, whose masks and products can be seen."""
    if (kind, attention) not in _models:
        _models[kind, attention] = miniature(kind, CONFIGS[kind], attention)
    return _models[kind, attention]


def rows_of(kind):
    """One image, two, none, and three, or one of another shape where images have any."""
    tokens = Adapter(decoder_model(kind)).geometry.vision.tokens
    alike = [(9, tokens), (6, 2 * tokens), (5, 0), (12, 3 * tokens)]
    return ROWS.get(kind) or (alike if tokens else [(9, 20), (6, (32, 4)), (5, 0), (12, 7)])


def row_samples(kind):
    """One batch of one row for each entry of :func:`rows_of`."""
    adapter = Adapter(decoder_model(kind))

    def sample(row, text, visual):
        if isinstance(visual, int):
            return synthetic_inputs(adapter, 1, text, visual, seed=row)
        parts = [synthetic_inputs(adapter, 1, text // len(visual), each, seed=row + each) for each in visual]
        return {
            key: torch.cat([part[key] for part in parts], dim=1) if key in BY_TOKEN else value
            for key, value in collate(parts).items()
        }

    return [sample(row, *entry) for row, entry in enumerate(rows_of(kind))]
