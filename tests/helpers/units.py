"""Prompts with images of chosen shapes for the miniatures of families: token counts are those of the model itself."""

import torch
from decoders import CONFIGS as DECODERS
from decoders import miniature
from families import FAMILIES, collate

__all__ = ["TILE", "VISUAL", "collate", "model_of", "sample_of", "samples_of"]

VISUAL, BREAK = 63, 59
TILE = 24
CONFIGS = DECODERS | FAMILIES
_models = {}


def model_of(kind, attention="sdpa"):
    """A miniature, with fused attention by default."""
    if (kind, attention) not in _models:
        _models[kind, attention] = miniature(kind, CONFIGS[kind], attention)
    return _models[kind, attention]


def _tiled(sizes, generator):
    """LLaVA-NeXT and OneVision: images of (height, width) pixels."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    def tiles(kind):
        shapes = CONFIGS[kind]["image_grid_pinpoints"]
        counts = [image_size_to_num_patches(list(size), shapes, TILE) for size in sizes]
        if kind == "llava_onevision" and len(sizes) > 1:
            counts = [1] * len(sizes)
        pixels = torch.zeros(len(sizes), max(counts), 3, TILE, TILE)
        for image, count in enumerate(counts):
            pixels[image, :count] = torch.randn(count, 3, TILE, TILE, generator=generator)
        more = {"batch_num_images": torch.tensor([len(sizes)])} if kind == "llava_onevision" else {}
        return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes), **more}

    return tiles


def _whole(side):
    def images(sizes, generator):
        return lambda kind: {"pixel_values": torch.randn(len(sizes), 3, side, side, generator=generator)}

    return images


def _patches(sizes, generator):
    """Qwen: images of (rows, columns) of tokens."""

    def sequence(kind):
        vision = CONFIGS[kind]["vision_config"]
        merge, frames = vision.get("spatial_merge_size", 2), vision.get("temporal_patch_size", 2)
        grids = torch.tensor([[1, rows * merge, columns * merge] for rows, columns in sizes])
        size = 3 * frames * vision["patch_size"] ** 2
        pixels = torch.randn(int(grids.prod(1).sum()), size, generator=generator)
        return {"pixel_values": pixels, "image_grid_thw": grids}

    return sequence


def _sized(sizes, generator):
    """Mistral3: images of (rows, columns) of tokens, padded to the largest."""

    def padded(kind):
        pixels = 2 * CONFIGS[kind]["vision_config"]["patch_size"]
        sides = torch.tensor(sizes) * pixels
        images = torch.randn(len(sizes), 3, *sides.amax(0).tolist(), generator=generator)
        return {"pixel_values": images, "image_sizes": sides}

    return padded


def _nested(sizes, generator):
    """SmolVLM and Idefics3: tiles of a row."""
    return lambda kind: {"pixel_values": torch.randn(1, len(sizes), 3, TILE, TILE, generator=generator)}


# (text tokens, images) of each row.
PIXELS = {
    "llava_next": _tiled,
    "llava_onevision": _tiled,
    "qwen2_vl": _patches,
    "qwen2_5_vl": _patches,
    "qwen3_vl": _patches,
    "mistral3": _sized,
    "internvl": _whole(48),
    "vipllava": _whole(TILE),
    "deepseek_vl": _whole(TILE),
    "smolvlm": _nested,
    "idefics3": _nested,
}
_TILED = [(9, [(24, 48)]), (6, [(40, 30), (20, 44)]), (5, []), (12, [(60, 24)])]
_WHOLE = [(9, [()]), (6, [(), ()]), (5, []), (12, [(), (), ()])]
_GRIDS = [(9, [(4, 5)]), (6, [(3, 6), (2, 2)]), (5, []), (12, [(7, 1)])]
SHAPES = {
    # Without padding, padded above and below, and at the sides; and rows of two and of no images.
    "llava_next": _TILED,
    "llava_onevision": _TILED,
    "qwen2_vl": _GRIDS,
    "qwen2_5_vl": _GRIDS,
    "qwen3_vl": _GRIDS,
    "mistral3": _GRIDS,
} | dict.fromkeys(("internvl", "vipllava", "deepseek_vl", "smolvlm", "idefics3"), _WHOLE)


def sample_of(kind, text, images, seed=0):
    """One row: text, its images in the middle with a word between two of them."""
    model, generator = model_of(kind), torch.Generator().manual_seed(seed)
    more, lengths = {}, []
    if images:
        more = PIXELS[kind](images, generator)(kind)
        with torch.no_grad():
            lengths = [len(image) for image in model.model.get_image_features(**more).pooler_output]
        if len(lengths) == 1 < len(images):  # all tiles of the row together
            lengths = [lengths[0] // len(images)] * len(images)
    words = torch.randint(3, 50, (text + len(lengths),), generator=generator).tolist()
    ids = words[: text // 2]
    for place, length in enumerate(lengths):
        row = images[place][1] if kind == "mistral3" else length  # a break behind each row of an image
        ids += ([VISUAL] * row + [BREAK]) * (length // row - 1) + [VISUAL] * row
        ids += words[text + place : text + place + 1]
    ids = torch.tensor([ids + words[text // 2 : text]])
    sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}
    if "qwen" in kind:
        sample["mm_token_type_ids"] = (ids == VISUAL).int()
    return sample


def samples_of(kind, shapes=None):
    return [sample_of(kind, *row, seed=seed) for seed, row in enumerate(shapes or SHAPES[kind])]
