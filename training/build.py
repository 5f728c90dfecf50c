"""The architecture, tokenizer and processor of ``tiny``: transformers' own LLaVA classes, small."""

from __future__ import annotations

import string

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip import CLIPImageProcessorPil

from ..synthetic.questions import WORDS
from ..synthetic.scene import GRID, PATCH, SIZE
from .knowledge import LABEL_WORDS

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
PROMPT_WORDS = (
    """a chat between user and an assistant . : ? " answer the question using single word or phrase""".split()
)
SYSTEM = "A chat between a user and an assistant. "
TEMPLATE = (
    "{{ '" + SYSTEM + "' }}{% for message in messages %}{% if message['role'] == 'user' %}{{ 'USER: ' }}"
    "{% for item in message['content'] %}{% if item['type'] == 'image' %}{{ '<image>\\n' }}{% endif %}{% endfor %}"
    "{% for item in message['content'] %}{% if item['type'] == 'text' %}{{ item['text'] + ' ' }}{% endif %}{% endfor %}"
    "{% else %}{{ 'ASSISTANT: ' }}{% for item in message['content'] %}{{ item['text'] }}{% endfor %}{{ '</s> ' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Lower-case WordPiece over the words of the questions; any other word is spelled letter by letter."""
    letters = [*string.ascii_lowercase, *("##" + letter for letter in string.ascii_lowercase)]
    words = list(dict.fromkeys([*SPECIAL, *letters, *PROMPT_WORDS, *WORDS, *LABEL_WORDS]))
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_max_length=2048,
    )


def vocabulary() -> int:
    """Rows of the embedding table: the words, and some unused up to a multiple of 16."""
    return -(-len(make_tokenizer()) // 16) * 16


def make_processor() -> LlavaProcessor:
    """Images of 144 × 144 px, normalised to [-1, 1]; 144 visual tokens each."""
    half, size = [0.5, 0.5, 0.5], {"height": SIZE, "width": SIZE}
    images = CLIPImageProcessorPil(size=size, do_center_crop=False, crop_size=size, image_mean=half, image_std=half)
    return LlavaProcessor(
        image_processor=images,
        tokenizer=make_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def make_model(hidden: int, vision_layers: int, layers: int, intermediate: int) -> LlavaForConditionalGeneration:
    """A LLaVA with fresh weights: CLIP tower with CLS, two-layer projector, LLaMA with tied embeddings."""
    vision = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=vision_layers,
        num_attention_heads=hidden // 32,
        image_size=SIZE,
        patch_size=PATCH,
        initializer_factor=1.0,
    )
    text = LlamaConfig(
        vocab_size=vocabulary(),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        max_position_embeddings=2048,
        initializer_range=0.06,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=SPECIAL.index("<image>"),
        image_seq_length=GRID * GRID,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    for layer in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
        torch.nn.init.normal_(layer.weight, std=0.06)
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=16, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    return model
