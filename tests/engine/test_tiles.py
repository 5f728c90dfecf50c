"""LLaVA-NeXT's tiles as the official codes of methods treat them: what enters the decoder, built by hand."""

import pytest
import torch
import visibench
from tiled import PATCHES, Tiling
from units import TILE, VISUAL, collate, model_of, sample_of
from visibench.evals.settings.method_spec import parse
from visibench.methods import Forward, Merge, Method
from visibench.models.adapters import Adapter

# Heights and widths: without padding, padded above and below, padded at the sides, and two images in a row.
ROWS = [[(24, 48)], [(60, 24)], [(40, 30)], [(20, 44)], [(40, 30), (24, 48)]]
every_row = pytest.mark.parametrize("sizes", [pytest.param(row, marks=pytest.mark.slow) for row in ROWS[:2]] + ROWS[2:])
pytestmark = pytest.mark.filterwarnings("ignore")


class ByHand:
    """The vision side of one row, tile by tile, by the model's own modules; one entry an image in each list."""

    def __init__(self, sample, sizes):
        model = model_of("llava_next", "eager").model
        pinpoints, keys = model.config.image_grid_pinpoints, []
        self.tilings = [Tiling(size, pinpoints, TILE) for size in sizes]
        counts = [tiling.units for tiling in self.tilings]
        pixels = torch.cat([tiles[:n] for tiles, n in zip(sample["pixel_values"], counts, strict=True)])
        block = model.vision_tower.encoder.layers[-2]
        hook = block.self_attn.k_proj.register_forward_hook(lambda m, args, output: keys.append(output))
        with torch.no_grad():
            tower = model.vision_tower(pixels, output_hidden_states=True, output_attentions=True)
        hook.remove()
        heads = keys[0].unflatten(2, (4, -1)).mean(2)
        cut = lambda values: values.split(counts)  # noqa: E731
        self.features, self.keys = cut(tower.hidden_states[-2][:, 1:]), cut(heads[:, 1:])
        self.cls = cut(tower.hidden_states[-2][:, :1])
        self.last = cut(tower.attentions[-2].sum(1)[:, 0, 1:])
        self.first = cut(tower.attentions[0].sum(1)[:, 0, 1:])
        self.received = cut(tower.attentions[-2].mean((1, 2))[:, 1:])
        self.project = model.multi_modal_projector

    def in_order(self, image, kept, *, padding=True):
        """Features of the whole image's ``kept`` patches, then those of its tiles."""
        places = self.tilings[image].places(padding=padding)
        return [self.features[image][tile, patch] for tile, patch in places if patch in kept[tile]]


def entered(method, sample):
    """(V, D): the visual tokens that enter the decoder, and the whole of it, (L, D)."""
    model, seen = model_of("llava_next", "eager"), []
    with torch.no_grad(), visibench.prune(model, method):
        layer = Adapter(model).layers[0]
        hook = layer.register_forward_pre_hook(lambda m, args, kwargs: seen.append(args[0]), with_kwargs=True)
        model(**sample)
        hook.remove()
    return seen[0][0]


def check(method, sample, sizes, images):
    """``images``: for each the vectors that enter in its place, (n, D)."""
    model, ids = model_of("llava_next", "eager"), sample["input_ids"][0]
    wanted, number = [], 0
    for place, token in enumerate(ids.tolist()):
        if token != VISUAL:
            wanted.append(model.get_input_embeddings()(ids[place])[None])
        elif ids[place - 1] != VISUAL:
            wanted.append(images[number])
            number += 1
    assert number == len(sizes)
    found, wanted = entered(method, sample), torch.cat(wanted)
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def best(scores, count):
    return {*scores.topk(count).indices.tolist()}


@every_row
@pytest.mark.parametrize(
    ("text", "scores"), [("vispruner:tokens=6,important=1", "last"), ("hiprune:tokens=6,alpha=0,middle=0", "received")]
)
def test_methods_that_take_padding_and_no_newlines(sizes, text, scores):
    sample = sample_of("llava_next", 7, sizes)
    with torch.no_grad():
        hand, images = ByHand(sample, sizes), []
        for image in range(len(sizes)):
            kept = [best(tile, 6) for tile in getattr(hand, scores)[image]]
            images.append(hand.project(torch.stack(hand.in_order(image, kept))))
    check(parse(text), sample, sizes, images)


@every_row
def test_holov_goes_through_all_tiles_without_newlines(sizes):
    """One run, whose tokens enter by falling attention."""
    sample = sample_of("llava_next", 7, sizes)
    with torch.no_grad():
        hand, images = ByHand(sample, sizes), []
        for image in range(len(sizes)):
            places = hand.tilings[image].places(padding=False)
            attention = torch.stack([hand.last[image][place] for place in places])
            features = torch.stack([hand.features[image][place] for place in places])
            images.append(hand.project(features[attention.topk(9).indices]))
    check(parse("holov:tokens=9,runs=1"), sample, sizes, images)


class Doubled(Method):
    """All patches, of padding too, with other contents."""

    name, hook_points, by_unit, vision_blocks = "doubled", ("projector",), True, ()
    newlines, unpad = "drop", False

    def begin(self, layout, geometry):
        forward = Forward()
        forward.projected = lambda view: Merge(view.present, replaced=2 * view.projected)
        return forward


@every_row
def test_patches_of_padding_enter_with_the_contents_that_a_method_gives_them(sizes):
    sample = sample_of("llava_next", 7, sizes)
    with torch.no_grad():
        hand = ByHand(sample, sizes)
        every = [{*range(PATCHES)}] * 5
        images = [2 * hand.project(torch.stack(hand.in_order(image, every))) for image in range(len(sizes))]
    check(Doubled(positions="renumber"), sample, sizes, images)


def test_newlines_compete_with_patches_under_pyramiddrop():
    sample, model = sample_of("llava_next", 7, ROWS[2]), model_of("llava_next", "eager")
    with torch.no_grad():
        (packed,) = model.model.get_image_features(sample["pixel_values"], sample["image_sizes"]).pooler_output
        with visibench.prune(model, parse("pyramiddrop:cuts=2+3,ratios=0.5+0.1")) as session:
            model(**sample)
    is_newline, trace = (packed == model.model.image_newline).all(1), session.trace
    assert trace.visual_counts()[0, 1:4].tolist() == [len(packed), len(packed) // 2, len(packed) // 10]
    assert not trace.kept(3)[0][is_newline].all()


@every_row
def test_visionzip_has_the_whole_image_first_then_patches_of_tiles_then_their_cls_then_what_was_merged(sizes):
    sample = sample_of("llava_next", 7, sizes)
    with torch.no_grad():
        hand, images = ByHand(sample, sizes), []
        for image in range(len(sizes)):
            kept = [best(scores, 4) for scores in hand.last[image]]
            merged = [contextual(*parts, 2) for parts in zip(hand.features[image], hand.keys[image], kept, strict=True)]
            patches = hand.in_order(image, kept)
            whole, tiles = patches[:4], patches[4:]
            order = [hand.cls[image][0, 0], *whole, *merged[0], *tiles, *hand.cls[image][1:, 0]]
            images.append(hand.project(torch.stack([*order, *(token for tile in merged[1:] for token in tile)])))
    check(parse("visionzip:tokens=7,contextual=2"), sample, sizes, images)


def contextual(features, keys, kept, count):
    """Of the patches that are not ``kept`` every so many-th, plus the mean of those most like it."""
    rest = [patch for patch in range(PATCHES) if patch not in kept]
    step = len(rest) // count
    targets = rest[: count * step : step]
    groups = {target: [] for target in targets}
    for patch in rest:
        if patch not in targets:
            likeness = [torch.cosine_similarity(keys[patch], keys[target], dim=0) for target in targets]
            groups[targets[int(torch.stack(likeness).argmax())]].append(features[patch])
    return [features[target] + (torch.stack(near).mean(0) if near else 0) for target, near in groups.items()]


@every_row
@pytest.mark.parametrize(("text", "alpha"), [("keep=0.5", 0.5), ("keep=0.8,alpha=0.2", 0.2), ("keep=0.3,alpha=1", 1.0)])
def test_hired_shares_its_budget_by_what_the_whole_image_shows(sizes, text, alpha):
    sample, rate = sample_of("llava_next", 7, sizes), float(text[5:8])
    with torch.no_grad():
        hand, images = ByHand(sample, sizes), []
        for image, tiling in enumerate(hand.tilings):
            tiles = tiling.units - 1
            total = int((1 + tiles) * PATCHES * rate)
            whole = min(int(total * alpha), PATCHES)
            seen = best(hand.first[image][0], int(PATCHES * (1 - alpha)))
            stripes = [len(seen & {*range(n * PATCHES // tiles, (n + 1) * PATCHES // tiles)}) for n in range(tiles)]
            rest = min(total - whole, tiles * PATCHES)
            budgets = [whole] + [min(rest * stripe // max(len(seen), 1), PATCHES) for stripe in stripes]
            kept = [best(*pair) for pair in zip(hand.last[image], budgets, strict=True)]
            images.append(hand.project(torch.stack(hand.in_order(image, kept, padding=False))))
    check(parse(f"hired:{text}"), sample, sizes, images)


@every_row
def test_divprune_prunes_the_packed_sequence_newlines_included(sizes):
    sample, model = sample_of("llava_next", 7, sizes), model_of("llava_next", "eager")
    with torch.no_grad():
        packed = model.model.get_image_features(sample["pixel_values"], sample["image_sizes"]).pooler_output
    images = [tokens[farthest(tokens, len(tokens) * 2 // 5)] for tokens in packed]
    newline = model.model.image_newline
    assert any((tokens == newline).all(1).any() for tokens in images)
    check(parse("divprune:keep=0.4"), sample, sizes, images)


def farthest(tokens, count):
    distance = 1 - torch.cosine_similarity(tokens[:, None], tokens[None], dim=2)
    chosen = [int((distance + 9 * torch.eye(len(tokens))).amin(1).argmax())]
    while len(chosen) < count:
        nearest = distance[:, chosen].amin(1)
        nearest[chosen] = -9
        chosen.append(int(nearest.argmax()))
    return sorted(chosen)


def test_hired_gives_each_row_of_a_batch_what_it_gets_alone():
    model, method = model_of("llava_next"), parse("hired:keep=0.5")
    samples = [sample_of("llava_next", 5 + n, sizes, seed=n) for n, sizes in enumerate([ROWS[2], ROWS[4], []])]
    batch = collate(samples)
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), visibench.prune(model, method) as session:
        logits, counts = model(**batch).logits[:, -1], session.trace.visual_counts()
        for row, sample in enumerate(samples):
            torch.testing.assert_close(model(**sample).logits[0, -1], logits[row], atol=1e-4, rtol=1e-4)
            assert session.trace.visual_counts()[0].tolist() == counts[row].tolist()
