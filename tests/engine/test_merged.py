"""Tokens merged in front of the decoder and cut inside it, against a family's own layers on what was merged by hand."""

from itertools import pairwise
from math import prod

import pytest
import torch
import visibench
from tiled import SIDE, Tiling
from torch.nn.functional import cosine_similarity
from units import TILE, VISUAL, collate, model_of, samples_of
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
    "deepseek_vl": RECEIVED,
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


# ---- tiles, of which patches of padding and newlines are dropped or kept ------------------------------------------


class Tower:
    """The vision side of one row by the model's own modules: ``tokens`` (P, D) and ``scores`` (P,) of each unit."""

    def __init__(self, model, sample, tilings, early):
        adapter, weights, self.tokens = Adapter(model), [], []
        read = [adapter.vision_blocks[early], adapter.vision_blocks[adapter.geometry.vision.feature_block]]
        hooks = [
            each.self_attn.register_forward_hook(lambda m, args, output: weights.append(output[1])) for each in read
        ]
        hooks.append(adapter.projector.register_forward_hook(lambda m, args, output: self.tokens.append(output)))
        if tilings:
            model.model.get_image_features(**{name: sample[name] for name in sample if name not in WORDS})
        for hook in hooks:
            hook.remove()
        self.tokens = torch.cat(self.tokens).split([tiling.units for tiling in tilings]) if tilings else []
        # CLS asks, or all patches do where there is none.
        ask = (lambda part: part[:, :, 0, 1:]) if adapter.geometry.vision.has_cls else lambda part: part.mean(2)
        self.scores = [ask(part).mean(1).split([tiling.units for tiling in tilings]) for part in weights]


WORDS = ("input_ids", "attention_mask")


def chosen(early, late, patches, share):
    """Of a unit's ``patches`` those that VScan keeps, by windows of 2 × 2 and by the scores (P,) of two blocks."""
    budget = int(len(patches) * share)
    rows, columns = (sorted({place(patch) for patch in patches}) for place in (lambda n: n // SIDE, lambda n: n % SIDE))
    windows = {}
    for patch in patches:
        at = rows.index(patch // SIDE) // 2, columns.index(patch % SIDE) // 2
        last = len(rows) // 2 - 1, len(columns) // 2 - 1
        windows.setdefault(tuple(map(min, at, last)), []).append(patch)
    quota = max(budget // 2 // len(windows), 1)
    finalists = [patch for own in windows.values() for patch in best(early, own, quota)]
    local = best(early, finalists, budget // 2)
    return local + best(late, [patch for patch in patches if patch not in local], budget - budget // 2)


def best(scores, places, count):
    return sorted(places, key=lambda place: -float(scores[place]))[:count]


def image_tokens(tiling, image, tower, newline, share, *, padding):
    """What an image becomes, in order: contents or None where nothing stays, with ``padding`` and no newlines or so."""
    lines, contents = tiling.lines(padding=padding), {}
    every = tiling.places(padding=padding)
    for unit in range(tiling.units):
        patches = sorted(patch for at, patch in every if at == unit)
        early, late = (scores[image][unit] for scores in tower.scores)
        stays = torch.zeros(len(patches), dtype=torch.bool)
        stays[[patches.index(patch) for patch in chosen(early, late, patches, share)]] = True
        own = merged(tower.tokens[image][unit][patches], stays, [len(patches)])
        centres = [patch for patch, stay in zip(patches, stays, strict=True) if stay]
        contents |= {(unit, patch): token for patch, token in zip(centres, own, strict=True)}
    end = [] if padding else [newline]
    whole = [contents.get(place) for place in every[: len(every) - sum(map(len, lines))]]
    tiles = [token for line in lines for token in [*map(contents.get, line), *end]]
    return whole + (tiles or end)  # one newline where an image is not cut


def entering(model, sample, images):
    """(n, D) tokens that enter the decoder, with their places in the prompt (n,) and whether each is visual (n,)."""
    embed, rows, number, before = model.get_input_embeddings(), [], 0, None
    for token in sample["input_ids"][0]:
        if token != VISUAL:
            rows.append((embed(token), False))
        elif before != VISUAL:
            rows += [(content, True) for content in images[number]]
            number += 1
        before = token
    kept = [(content, place, visual) for place, (content, visual) in enumerate(rows) if content is not None]
    contents, places, visual = zip(*kept, strict=True)
    return torch.stack(contents), torch.tensor(places), torch.tensor(visual)


def decoded(model, hidden, places, visual, cuts):
    """Logits of the last token by the model's own layers: of visual tokens those stay that it attends to most."""
    decoder = Adapter(model).decoder
    for number, layer in enumerate(decoder.layers):
        count = len(hidden)
        mask = torch.full((1, 1, count, count), float("-inf")).triu(1)
        table = decoder.rotary_emb(hidden, position_ids=places[None])
        if number in cuts:
            _, weights = layer.self_attn(layer.input_layernorm(hidden[None]), table, mask)
            order = best(weights[0, :, -1].mean(0), visual.nonzero().flatten().tolist(), cuts[number])
            stays = ~visual
            stays[order] = True
            hidden, places, visual, mask = hidden[stays], places[stays], visual[stays], mask[:, :, stays][..., stays]
            places = torch.arange(len(hidden)) if cuts["positions"] == "renumber" else places
            table = decoder.rotary_emb(hidden, position_ids=places[None])
        hidden = layer(hidden[None], attention_mask=mask, position_embeddings=table)[0]
    return model.lm_head(decoder.norm(hidden))[-1]


@pytest.mark.slow
@pytest.mark.parametrize(("padding", "positions"), [(True, "renumber"), (False, "renumber"), (False, "keep")])
@pytest.mark.parametrize("cuts", [{}, {2: 7, 4: 3}])
@pytest.mark.parametrize(("kind", "attention"), [("llava_next", "cls"), ("llava_onevision", "received")])
def test_merged_tokens_of_tiles_go_through_the_models_own_layers(kind, attention, cuts, padding, positions):
    """Rows of a left padded batch: one image, two, none; images without padding and with some on either side."""
    model, samples = model_of(kind, "eager"), samples_of(kind)
    numbers = f"cuts={'+'.join(map(str, cuts))},counts={'+'.join(map(str, cuts.values()))}"
    rest = "" if padding else ",unpad=true,newlines=keep"
    method = parse(f"vscan:keep=0.5,window=2,early=0,{numbers},attention={attention},positions={positions}{rest}")
    batch = collate(samples)
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), visibench.prune(model, method) as session:
        pruned = model(**batch).logits[:, -1]
    for row, sample in enumerate(samples):
        sizes = sample["image_sizes"].tolist() if "image_sizes" in sample else []
        cut = kind == "llava_next" or len(sizes) == 1
        tilings = [Tiling(size, model.config.image_grid_pinpoints if cut else [], TILE) for size in sizes]
        with torch.no_grad():
            tower, newline = Tower(model, sample, tilings, 0), model.model.image_newline
            images = [
                image_tokens(tiling, image, tower, newline, 0.5, padding=padding)
                for image, tiling in enumerate(tilings)
            ]
            hidden, places, visual = entering(model, sample, images)
            left = {cut: count * len(images) for cut, count in cuts.items()} | {"positions": positions}
            if positions == "renumber":
                places = torch.arange(len(places))
            own = decoded(model, hidden, places, visual, left)
        assert session.trace.visual_counts()[row, 0] == visual.sum()
        torch.testing.assert_close(pruned[row], own, atol=1e-4, rtol=1e-4)
