"""Conversations in several turns, and the dense model with the columns masked that a pruned one has dropped."""

import pytest
import torch
from cases import PLAINEST, REGISTERED
from support import IMAGE


def turn(text, images=0, behind=4, seed=0):
    """New tokens of one row: ``text`` words, the images behind them, and ``behind`` words more where there are any."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 60, (1, text), generator=generator)]
    for _ in range(images):
        ids += [torch.full((1, 16), IMAGE), torch.randint(3, 60, (1, behind), generator=generator)]
    pixels = torch.randn(images, 3, 24, 24, generator=generator) if images else None
    return torch.cat(ids, 1), pixels


def feed(model, ids, cache=None, pixels=None, mask=None):
    """One call of the model; positions are counted without padding where there is a ``mask`` of all columns so far."""
    extra = {} if pixels is None else {"pixel_values": pixels}
    if mask is not None:
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        extra |= {"attention_mask": mask, "position_ids": places}
    return model(input_ids=ids, past_key_values=cache, use_cache=True, **extra)


def pad(rows):
    """(ids, mask) of rows (1, n), left padded."""
    width = max(row.shape[1] for row in rows)
    padded = [torch.nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows]
    masks = [torch.nn.functional.pad(torch.ones_like(row), (width - row.shape[1], 0)) for row in rows]
    return torch.cat(padded), torch.cat(masks)


def masked_dense(model, ids, pixels, present, positions="keep"):
    """Logits (n, vocabulary) of one row under the model's own layers, each seeing those columns that are ``present``.

    ``ids``: (1, n), all turns. ``pixels``: (images, 3, h, w). ``present``: bool (layers, n). A column that is not there
    is hidden as a key, and does not change.
    """
    decoder = model.model.language_model
    hidden = model.get_input_embeddings()(ids)
    features = torch.cat(list(model.get_image_features(pixel_values=pixels).pooler_output))
    hidden = hidden.masked_scatter((ids == IMAGE)[..., None], features)
    causal, itself = torch.ones(ids.shape[1], ids.shape[1]).tril().bool(), torch.eye(ids.shape[1]).bool()
    for layer, there in zip(decoder.layers, present, strict=True):
        place = there.cumsum(0) - 1 if positions == "renumber" else torch.arange(len(there))
        rope = decoder.rotary_emb(hidden, position_ids=place.clamp(min=0)[None])
        mask = (causal & there | itself)[None, None]
        changed = layer(hidden, attention_mask=mask, position_embeddings=rope, position_ids=place[None])
        hidden = torch.where(there[:, None], changed, hidden)
    return model.lm_head(decoder.norm(hidden))[0]


LAYERS = 10
# The others of each method come in the slow run.
REST = [pytest.param(method, marks=pytest.mark.slow) for method in REGISTERED if method not in PLAINEST]
every_method = pytest.mark.parametrize("method", [*PLAINEST, *REST], ids=str)
VISION = {"image", "tower", "vision", "projector"}
# Their choice depends on what is fed together with the image: a hash of it, or the queries of the text in front of it.
TOGETHER = {"random", "pact"}
# Text, images: of the first and of the second turn of each row. Rows are padded in the middle.
TURNS = [((5, 1), (6, 0)), ((3, 2), (2, 1)), ((4, 0), (3, 2)), ((9, 0), (7, 0))]


def in_front_of_the_decoder(method):
    return set(method.hook_points) <= VISION or getattr(method, "cut", 0) is None


def only_drops(method, traces):
    """Whether all that the method does is to drop tokens, so that the dense model with a mask is the same."""
    merged = any((layout.visual_id == -2).any() for trace in traces for layout in trace.layouts)
    replaced = any(trace.batch_attention_pairs() != _full(trace) for trace in traces)
    elsewhere = method.name in ("visipruner", "forced", "tome", "downsample", "pooling", "vscan", "pact", "flowcut")
    return not (merged or replaced or elsewhere or method.reorders)


def _full(trace):
    return [
        layout.rows * layout.width * (layout.width + places)
        for layout, places in zip(trace.layouts, trace._cached_places, strict=True)
    ]


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def batch_of(turns, which):
    rows = [turn(*row[which], seed=10 * which + number) for number, row in enumerate(turns)]
    pixels = [pixels for _, pixels in rows if pixels is not None]
    return [ids for ids, _ in rows], torch.cat(pixels) if pixels else None, rows
