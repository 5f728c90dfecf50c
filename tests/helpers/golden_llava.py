"""The recorded vision tower, projector and decoder as one LLaVA, and the prompts recorded with it."""

import json

import numpy as np
import torch
import visibench
from golden_support import MANIFEST
from support import GOLDEN
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

IMAGE = 0  # a word that no recorded prompt has
CLIP = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / "clip_inputs.npz").items()}


def vectors(name):
    return {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / f"{name}.npz").items()}


def make_golden_llava(dtype=torch.float32, *, whole=False):
    """The recorded tower, in front of a small random decoder or, ``whole``, of the recorded projector and decoder."""
    config = {name: json.loads((GOLDEN / f"{name}.json").read_text()) for name in ("clip", "llama")}
    tower, text = ({k: v for k, v in c.items() if k not in ("model_type", "torch_dtype")} for c in config.values())
    text |= {} if whole else {"num_hidden_layers": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**tower),
            text_config=LlamaConfig(**text),
            image_token_id=IMAGE,
            vision_feature_layer=-2,
        )
    )
    weights = {k.removeprefix("vision_model."): v for k, v in vectors("clip").items()}
    missing, unexpected = model.model.vision_tower.load_state_dict(weights, strict=False)
    assert isinstance(model.model.vision_tower, CLIPVisionModel)
    assert not missing
    assert all("position_ids" in key for key in unexpected)
    if whole:
        decoder = vectors("llama")
        model.lm_head.load_state_dict({"weight": decoder.pop("lm_head.weight")})
        model.model.language_model.load_state_dict({k.removeprefix("model."): v for k, v in decoder.items()})
        parts = vectors("llava_parts")
        linear = {
            f"linear_{ours}.{kind}": parts[f"projector.{theirs}.{kind}"]
            for ours, theirs in ((1, 0), (2, 2))
            for kind in ("weight", "bias")
        }
        model.model.multi_modal_projector.load_state_dict(linear)
    return model.eval().to(dtype)


def prompt(*images):
    """Ids of the recorded prompt around so many of the recorded images, and their pixels."""
    parts = vectors("llava_parts")
    ids = parts["prefix_ids"]
    for place, _ in enumerate(images):
        ids = torch.cat([ids, *[parts["mid_ids"]] * (place > 0), torch.full((576,), IMAGE)])
    ids = torch.cat([ids, parts["text_ids_T40"]])[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": CLIP["pixels"][[*images]]}


def whole_prompts(name):
    """Of all configurations with logits: its name, what the manifest says of it, and the numbers of the images."""
    recorded = np.load(GOLDEN / f"{name}.npz").files
    cases = {"img0_T40": (0,), "img1_T40": (1,), "2img_T40": (0, 1)}
    for config, entry in MANIFEST[name]["configs"].items():
        for case, images in cases.items():
            if f"{config}.{case}.last_logits" in recorded:
                yield config, entry, case, images


def check_whole(model, method, recorded, prefix, images):
    """Logits of the prompt, of its text and of the forced steps; returns the session for what else is recorded."""
    with visibench.prune(model, method) as session:
        out = model(**prompt(*images), use_cache=True)
        text = recorded[f"{prefix}.text_logits"]
        torch.testing.assert_close(out.logits[0, -1], recorded[f"{prefix}.last_logits"], atol=1e-4, rtol=0)
        torch.testing.assert_close(out.logits[0, -len(text) :], text, atol=1e-4, rtol=0)
        cached = [layer.keys.shape[-2] for layer in out.past_key_values.layers]
        assert session.trace.kv_lengths()[0].tolist() == cached
        if f"{prefix}.kv_len" in recorded:
            assert cached == recorded[f"{prefix}.kv_len"].tolist()
        forced = vectors("inputs")["forced_ids"].flatten()
        for token, logits in zip(forced, recorded[f"{prefix}.decode_logits"], strict=True):
            step = model(input_ids=token.view(1, 1), past_key_values=out.past_key_values, use_cache=True)
            torch.testing.assert_close(step.logits[0, -1], logits, atol=1e-4, rtol=0)
    return session
