"""Tokens merged in front of the decoder and cut inside it, against a family's own layers on what was merged by hand."""

from itertools import pairwise
from math import prod

import pytest
import torch
import visibench
from torch.nn.functional import cosine_similarity
from units import VISUAL, model_of, samples_of
from visibench.evals.settings.method_spec import parse
from visibench.models.adapters import Adapter

WHOLE = "vscan:keep=0.5,window=2,cuts=,layers=scaled"
CUT = "vscan:keep=0.8,window=2,cuts=8+24,counts=2+1,layers=scaled"
RECEIVED = ",attention=received"
KINDS = {
    "vipllava": "",
    "internvl": "",
    "smolvlm": RECEIVED,
    "idefics3": RECEIVED,
    "qwen2_vl": RECEIVED,
    "qwen2_5_vl": RECEIVED + ",early=8",
    "qwen3_vl": RECEIVED,
}
"""Families whose visual tokens are the tokens of their units, one behind the other, and what VScan reads of them."""


def merged(tokens, kept, sizes):
    """The ``kept`` ones, bool (V,), of ``tokens`` (V, D): each the mean of itself and all that is most like it."""
    rows, first = [], 0
    for size in sizes:
        own, stays = tokens[first : first + size], kept[first : first + size]
        centres = [place for place in range(size) if stays[place]]
        nearest = {
            place: max(centres, key=lambda centre, place=place: cosine_similarity(own[place], own[centre], dim=0))
            for place in range(size)
            if not stays[place]
        }
        for centre in centres:
            parts = [centre, *(place for place, goes in nearest.items() if goes == centre)]
            rows.append(own[parts].mean(0))
        first += size
    return torch.stack(rows)


def layers(decoder, hidden, places, span, visual, deep):
    """Own layers of a decoder, from one up to another, on ``hidden`` (1, n, D) at ``places``."""
    table = decoder.rotary_emb(hidden, position_ids=places)
    for number in range(*span):
        hidden = decoder.layers[number](hidden, attention_mask=None, position_embeddings=table)
        if number < len(deep):
            hidden = decoder._deepstack_process(hidden, visual[None], deep[number])
    return hidden


def by_hand(model, method, given, ids, trace):
    """Logits of the last token: visual tokens merged by hand, then the model's own layers with those that are left."""
    decoder, geometry, visual = Adapter(model).decoder, Adapter(model).geometry, ids == VISUAL
    cuts = [0, *sorted(method.at(cut, geometry) for cut in method.cuts), len(decoder.layers)]
    hidden, deep = given["inputs_embeds"].clone(), given.get("deepstack_visual_embeds") or []
    sizes = [prod(grid) for image in method.images(trace.prompt, geometry)[0] for grid in image.units]
    kept = trace.kept(0)[0]
    spread = hidden[0, visual].clone()
    spread[kept] = merged(spread, kept, sizes)
    hidden[0, visual] = spread
    places = given["position_ids"]
    places = torch.arange(len(ids))[None] if places is None else places[-3:] if places.ndim == 3 else places
    left = torch.ones_like(visual)
    for first, last in pairwise(cuts):
        stays = ~visual
        stays[visual] = trace.kept(first)[0]
        going_on = stays[left]
        hidden, places, left = hidden[:, going_on], places[..., going_on], stays
        if method.positions == "renumber":
            places = torch.arange(int(stays.sum())).expand(*places.shape[:-1], -1)
        own = [part[trace.kept(first)[0]] for part in deep]
        hidden = layers(decoder, hidden, places, (first, last), visual[stays], own)
    return model.lm_head(decoder.norm(hidden))[:, -1]


@pytest.mark.slow
@pytest.mark.parametrize("positions", ["renumber", "keep"])
@pytest.mark.parametrize("text", [WHOLE, CUT])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_tokens_go_through_the_models_own_layers(kind, text, positions):
    model, method = model_of(kind), parse(f"{text}{KINDS[kind]},positions={positions}")
    sample, seen = samples_of(kind)[1], {}  # of two images
    note = lambda m, args, kwargs: seen.update(kwargs)  # noqa: E731
    hook = Adapter(model).decoder.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        dense = model(**sample).logits[:, -1]
        hook.remove()
        with visibench.prune(model, method) as session:
            pruned = model(**sample).logits[:, -1]
        own = by_hand(model, method, seen, sample["input_ids"][0], session.trace)
    counts = session.trace.visual_counts()[0]
    assert counts[0] < (sample["input_ids"] == VISUAL).sum()
    assert (counts[-1] < counts[0]) == ("cuts=8" in text)
    torch.testing.assert_close(pruned, own, atol=1e-4, rtol=1e-4)
    assert (own - dense).abs().max() > 1e-2
