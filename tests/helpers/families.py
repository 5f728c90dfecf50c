"""Miniatures of the families beyond LLaVA, with random weights, and batches of uneven rows for them."""

from contextlib import nullcontext

import pytest
import torch
import visibench
from transformers import AutoConfig, AutoModelForImageTextToText, masking_utils
from transformers.models.llava_next import modeling_llava_next
from transformers.models.llava_next_video import modeling_llava_next_video
from transformers.models.llava_onevision import modeling_llava_onevision
from visibench.models.adapters import Adapter
from visibench.models.geometry import synthetic_inputs

TEXT = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.25,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


VISION = {"hidden_size": 32, "intermediate_size": 48, "patch_size": 6}


FAMILIES = {
    "llava_next": {
        "image_token_index": 63,
        "image_grid_pinpoints": [[24, 48], [48, 24], [48, 48]],
        "vision_config": VISION
        | {"model_type": "clip_vision_model", "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 24},
        "text_config": TEXT | {"model_type": "llama"},
    },
    "internvl": {
        "image_token_id": 63,
        "image_seq_length": 16,
        "vision_config": VISION
        | {"num_hidden_layers": 3, "num_attention_heads": 4, "image_size": [48, 48], "patch_size": [6, 6]},
        "text_config": TEXT | {"model_type": "qwen2"},
    },
    "qwen2_5_vl": {
        "image_token_id": 63,
        "video_token_id": 62,
        "vision_start_token_id": 61,
        "vision_end_token_id": 60,
        "vision_config": VISION
        | {"depth": 3, "num_heads": 4, "out_hidden_size": 48, "window_size": 24, "fullatt_block_indexes": [1]},
        "text_config": TEXT
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}},
    },
}


# (text tokens, visual tokens) of each row: shapes of images differ, and one row has none.
ROWS = {
    "llava_next": [(9, 88), (6, 52), (5, 0), (12, 56)],
    "internvl": [(9, 16), (6, 48), (5, 0), (12, 32)],
    "qwen2_5_vl": [(9, 20), (6, 36), (5, 0), (12, 7)],
}


METHODS = [
    visibench.load_method("none"),
    visibench.load_method("random", keep=0.5, layer=1),
    visibench.load_method("fastv", keep=0.4),
    visibench.load_method("fastv", keep=0.4, positions="renumber"),
    visibench.load_method("visipruner", shallow_layers=1, layer_threshold=0.9, token_threshold=1.0),
    visibench.load_method("visipruner", shallow_layers=1, skip=True, forced=True, filter_layer=3, exit_layer=5),
    visibench.load_method("pyramiddrop", cuts=(2, 3, 5)),
    visibench.load_method("pyramiddrop", cuts=(2, 3, 5), positions="keep"),
    visibench.load_method("sparsevlm", counts=(9, 5, 2), after=(0, 2, 4)),
    visibench.load_method("dart", keep=0.5),
    visibench.load_method("vtw", layer=3),
    visibench.load_method("staged", enter=2, exit=4),
]


every_family = pytest.mark.parametrize("kind", FAMILIES)


every_method = pytest.mark.parametrize("method", METHODS, ids=str)


_models = {}


def model_of(kind, attention="sdpa"):
    if (kind, attention) not in _models:
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **FAMILIES[kind])
        model = AutoModelForImageTextToText.from_config(config, attn_implementation=attention)
        _models[kind, attention] = model.eval()
    return _models[kind, attention]


def samples_of(kind):
    adapter = Adapter(model_of(kind))
    return [synthetic_inputs(adapter, 1, text, visual, seed=row) for row, (text, visual) in enumerate(ROWS[kind])]


BY_TOKEN = {"input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"}


def collate(samples):
    """Left pad token-wise tensors; put images one behind the other, with as many tiles and as large as the largest."""
    width = max(sample["input_ids"].shape[1] for sample in samples)
    pad = torch.nn.functional.pad
    batch = {}
    for key in {key for sample in samples for key in sample}:
        parts = [sample[key] for sample in samples if key in sample]
        if key in BY_TOKEN:
            parts = [pad(part, (width - part.shape[1], 0)) for part in parts]
        elif parts[0].ndim == 5:
            tiles = max(part.shape[1] for part in parts)
            parts = [pad(part, (0, 0) * 3 + (0, tiles - part.shape[1])) for part in parts]
        elif parts[0].ndim == 4:
            tall, wide = (max(part.shape[side] for part in parts) for side in (2, 3))
            parts = [pad(part, (0, wide - part.shape[3], 0, tall - part.shape[2])) for part in parts]
        batch[key] = torch.cat(parts)
    return batch


def make_traceable(monkeypatch):
    """What fvcore, by torch's tracer, cannot look into is put in another way for one test."""
    for module in (modeling_llava_next, modeling_llava_next_video, modeling_llava_onevision):
        # While it is traced, the models' own code rounds sizes that are tensors.
        monkeypatch.setattr(module, "round", lambda value, digits: round(float(value), digits), raising=False)
    # vmap, by which Gemma 3's masks are made: the same by broadcasting.
    spread = lambda mask: lambda *places: mask(*masking_utils._non_vmap_expansion_sdpa(*places))  # noqa: E731
    monkeypatch.setattr(masking_utils, "_vmap_expansion_sdpa", spread)
    monkeypatch.setattr(masking_utils, "TransformGetItemToIndex", nullcontext)
