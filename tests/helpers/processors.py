"""Processors of families with a tokenizer of bytes, and miniatures that go with them: models that can be asked."""

from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from zlib import crc32

import torch
import transformers
from decoders import decoder_model, rows_of
from families import FAMILIES, collate
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    GotOcr2ImageProcessor,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES as IMAGE_PROCESSORS
from visibench.evals.answers.generate import picture_hash
from visibench.models import LoadedModel
from visibench.models.geometry import synthetic_inputs

TURNS = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{{ IMAGE if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %} ASSISTANT:"
)
LLAVA = {"patch_size": 6, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}


def tokenizer(special, named=None):
    """Of bytes, so that nothing is lost; it writes BOS in front."""
    alphabet = ["<pad>", "<s>", "</s>", *special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytes_alone = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = decoders.ByteLevel()
    bytes_alone.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    given = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=bytes_alone, **given, extra_special_tokens=named or {})
    fast.add_tokens(special, special_tokens=True)
    return fast


def _turns(processor, image):
    processor.chat_template = TURNS.replace("IMAGE", repr(image))
    return processor


def _llava(side):
    images = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return _turns(LlavaProcessor(images, tokenizer(["<image>"]), **LLAVA), "<image>")


def _llava_next(side):
    square = {"height": side, "width": side}
    shapes = FAMILIES["llava_next"]["image_grid_pinpoints"]
    images = LlavaNextImageProcessor(size={"shortest_edge": side}, crop_size=square, image_grid_pinpoints=shapes)
    return _turns(LlavaNextProcessor(images, tokenizer(["<image>"]), **LLAVA), "<image>")


def _internvl(side, max_patches=1):
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    size = {"height": side, "width": side}
    images, videos = GotOcr2ImageProcessor(size=size, max_patches=max_patches), InternVLVideoProcessor(size=size)
    made = InternVLProcessor(images, tokenizer([*named.values()], named), videos, image_seq_length=16)
    return _turns(made, "<IMG_CONTEXT>")


def _qwen2_5_vl(side, patch=3):
    special = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    sizes = {"patch_size": patch, "merge_size": 2, "size": {"shortest_edge": side**2, "longest_edge": side**2}}
    images, videos = Qwen2VLImageProcessor(**sizes), Qwen2VLVideoProcessor(**sizes)
    made = Qwen2_5_VLProcessor(images, tokenizer(special), videos)
    return _turns(made, "<|vision_start|><|image_pad|><|vision_end|>")


# Of images with sides of so many pixels; 24 make 16 tokens.
PROCESSORS = {"llava": _llava, "llava_next": _llava_next, "internvl": _internvl, "qwen2_5_vl": _qwen2_5_vl}
MADE = {
    "llava_next": partial(_llava_next, 24),
    "internvl": partial(_internvl, 48, max_patches=3),
    "qwen2_5_vl": partial(_qwen2_5_vl, 60, patch=6),
}
TOKENS = {
    "llava_next": {"image_token_index": "<image>"},
    "internvl": {"image_token_id": "<IMG_CONTEXT>"},
    "qwen2_5_vl": {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    },
}


def askable(kind):
    """A miniature of a family with random weights, and a processor that it understands."""
    processor, sizes = MADE[kind](), deepcopy(FAMILIES[kind])
    sizes |= {name: processor.tokenizer.convert_tokens_to_ids(token) for name, token in TOKENS[kind].items()}
    sizes["text_config"] |= {"vocab_size": len(processor.tokenizer)}
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    for name, weights in model.named_parameters():
        if weights.ndim > 1 and "language_model" not in name and "lm_head" not in name:
            torch.nn.init.normal_(weights, std=0.2)  # or images hardly matter
    return LoadedModel(kind, model, processor)


def save_askable(kind, folder):
    """The same as a checkpoint, for ``from_pretrained``."""
    loaded = askable(kind)
    loaded.model.save_pretrained(folder)
    loaded.processor.save_pretrained(folder)
    return folder


# ---- every family ---------------------------------------------------------------------------------------------------


@dataclass(repr=False)
class MadeUp(LoadedModel):
    """A miniature of any family that is asked with made-up tokens and pixels: those of question and image, by hash.

    Its image processor is the family's own, which knows how it would cut an image; nothing goes through it.
    """

    def inputs(self, questions, images, key=None):
        (text, visual), *_ = rows_of(self.name)
        seeds = [
            crc32(f"{question}{picture_hash(pictures)}".encode())
            for question, pictures in zip(questions, images, strict=True)
        ]
        return collate([synthetic_inputs(self.adapter, 1, text, visual, seed) for seed in seeds])


def made_up(kind):
    """The miniature ``kind`` of :mod:`decoders`."""
    words = tokenizer([])
    (images, *_) = [
        IMAGE_PROCESSORS[kind][backend] for backend in ("torchvision", "pil") if backend in IMAGE_PROCESSORS[kind]
    ]
    processor = SimpleNamespace(
        tokenizer=words,
        batch_decode=words.batch_decode,
        chat_template=None,
        image_processor=getattr(transformers, images)(),
    )
    return MadeUp(kind, decoder_model(kind, "sdpa"), processor)
