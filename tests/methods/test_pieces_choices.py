"""What SCOPE, HoloV, HiPrune and VScan choose and merge, against brute force."""

import itertools

import numpy as np
import pytest
import torch
import visibench
from support import collate, make_batch, make_llava
from transformers import LlavaConfig, LlavaForConditionalGeneration
from visibench.methods import base, hiprune, holov, pieces, scope, vscan

ROWS = [(5, 9, 1), (3, 12, 2), (4, 6, 0)]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("count", [0, 1, 5, 12])
def test_greedy_coverage(count, add):
    similarity, weight = pieces.cosine(random(2, 12, 5)), random(2, 12, seed=1).abs()
    picked = scope.covering(similarity, weight, count, add=add)
    for image in range(2):
        chosen = []

        def covered(tokens, cos=similarity[image]):
            return torch.cat([torch.zeros(12, 1, dtype=cos.dtype), cos[:, tokens]], dim=1).amax(1).sum().item()

        for _ in range(count):
            gain = {j: covered([*chosen, j]) - covered(chosen) for j in range(12) if j not in chosen}
            factor = weight[image].tolist()
            chosen.append(max(gain, key=lambda j: gain[j] + factor[j] if add else gain[j] * factor[j]))
        assert picked[image].tolist() == chosen


@pytest.mark.parametrize(("runs", "budget"), [(1, 5), (5, 0), (5, 9), (6, 13), (7, 17), (13, 6)])
def test_runs_share_a_budget(runs, budget):
    tokens, attention = random(2, 17, 6), random(2, 17, seed=1).exp()
    attention[1, 3] = 50.0  # its run is asked for more than it has
    index = holov.runs_of(17, runs)
    pieces_of = [list(map(int, part)) for part in np.array_split(np.arange(17), runs)]
    assert [[i for i in row if i >= 0] for row in index.tolist()] == pieces_of
    scores = holov.run_scores(tokens, attention, index)
    asked = holov.allocated(scores, budget)
    keep, order = holov.taken(attention, asked, index, None)
    filled, _ = holov.taken(attention, asked, index, budget)
    assert asked.sum(1).tolist() == filled.sum(1).tolist() == [budget] * 2
    for image in range(2):
        expected, wanted = [], []
        for run in pieces_of:
            a, v = 1000 * attention[image, run], torch.zeros(len(run), dtype=torch.float64)
            if len(run) > 1:
                near = pieces.cosine(tokens[image : image + 1, run])[0].fill_diagonal_(0)
                v = ((near - near.sum(1, keepdim=True) / (len(run) - 1)) ** 2).sum(1) / (len(run) - 1)
            score = a + 0.09 * v * a.mean() / (v.mean() + 1e-6) if len(run) > 1 else a / 1000
            expected.append(score.mean().item())
        torch.testing.assert_close(scores[image], torch.tensor(expected, dtype=torch.float64))
        share = [int(s / (sum(expected) + 1e-6) * budget) for s in expected]
        for run in sorted(range(runs), key=lambda r: -expected[r])[: budget - sum(share)]:
            share[run] += 1
        assert asked[image].tolist() == share
        for run, count in zip(pieces_of, share, strict=True):
            by_attention = sorted(run, key=lambda j: -attention[image, j].item())
            wanted += run if count >= len(run) else by_attention[:count]
        got = [j for _, j in sorted((order[image, j].item(), j) for j in range(17) if keep[image, j])]
        assert got == wanted
        rest = sorted({*range(17)} - {*wanted}, key=lambda j: -attention[image, j].item())
        assert set(filled[image].nonzero().flatten().tolist()) == {*wanted, *rest[: budget - len(wanted)]}


@pytest.mark.parametrize(("across", "side", "count"), [(2, 3, 2), (3, 2, 1), (1, 6, 5), (6, 1, 1), (2, 3, 0)])
def test_windows_choose_by_themselves(across, side, count):
    scores = random(2, 36)
    chosen = vscan.in_windows(scores, (1, across * side, across * side), side, count)
    for image in range(2):
        expected = set()
        for top, left in itertools.product(range(0, 6, side), repeat=2):
            window = [r * 6 + c for r in range(top, top + side) for c in range(left, left + side)]
            expected |= set(sorted(window, key=lambda j: -scores[image, j].item())[:count])
        assert set(chosen[image].nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("quota", ["floor", "ceil"])
@pytest.mark.parametrize(
    ("grid", "side"), [((1, 7, 11), 4), ((1, 3, 9), 4), ((1, 2, 2), 6), ((2, 5, 6), 3), ((1, 1, 9), 2)]
)
def test_windows_of_any_shape_give_what_is_highest_until_each_is_full_or_half_the_budget_is_there(grid, side, quota):
    """The remainder of a side belongs to its last window."""
    frames, rows, columns = grid
    scores, size = random(2, frames * rows * columns), frames * rows * columns
    for tokens in range(1, size):
        method = visibench.load_method("vscan", tokens=tokens, window=side, quota=quota)
        limit, local, spread = method.split(grid)
        down, across = max(rows // side, 1), max(columns // side, 1)
        share = tokens // 2 / (frames * down * across)
        assert limit == max(1, {"floor": int, "ceil": lambda value: -int(-value // 1)}[quota](share))
        mask = vscan.in_windows(scores, grid, side, limit)
        mask = base.top(scores, torch.full((2,), local), mask)
        for image in range(2):
            taken, held = [], {}
            for token in sorted(range(size), key=lambda j: -scores[image, j].item()):
                frame, place = divmod(token, rows * columns)
                row, column = divmod(place, columns)
                window = frame, min(row // side, down - 1), min(column // side, across - 1)
                if held.get(window, 0) < limit and len(taken) < tokens // 2:
                    taken.append(token)
                    held[window] = held.get(window, 0) + 1
            assert mask[image].nonzero().flatten().tolist() == sorted(taken)
        assert local + spread == method.unit_left(grid) <= tokens
        assert local + spread == tokens or quota == "floor"


def test_others_are_absorbed_by_the_kept_token_they_are_most_like():
    tokens, kept = random(2, 9, 4), torch.tensor([[1, 4, 7], [0, 2, 8]])
    merged = vscan.absorbed(tokens, kept)
    for image in range(2):
        near = pieces.cosine(tokens[image : image + 1])[0]
        for place, token in enumerate(kept[image].tolist()):
            others = [j for j in range(9) if j not in kept[image] and near[j, kept[image]].argmax() == place]
            mean = tokens[image, [token, *others]].mean(0)
            torch.testing.assert_close(merged[image, place], mean)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_attention_received_is_that_of_the_map_with_and_without_cls(kind):
    vision = make_llava(layers=1).config.vision_config.to_dict() | {"model_type": f"{kind}_vision_model"}
    own = {"vision_use_head": False} if kind == "siglip" else {}
    strategy = {"clip": "default", "siglip": "full"}[kind]
    text = make_llava(layers=1).config.text_config
    config = LlavaConfig(
        vision_config=vision | own,
        text_config=text,
        image_token_id=63,
        vision_feature_layer=-2,
        vision_feature_select_strategy=strategy,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model, (sample,) = LlavaForConditionalGeneration(config).eval(), make_batch([(5, 9, 2)])
    maps = model.model.vision_tower(sample["pixel_values"], output_attentions=True).attentions
    seen = {}

    class Look(type(visibench.load_method("hiprune", tokens=4))):
        def score(self, view):
            seen.update({block: view.received(block) for block in self.blocks_received(view.vision)})
            return super().score(view)

    with visibench.prune(model, Look(tokens=4, alpha=1.0, middle=0)) as session:
        model(**sample)
    assert session.trace.visual_counts()[0].tolist() == [8]
    for block, number in {-2: 0, -1: 1}.items():
        torch.testing.assert_close(seen[block], maps[number].mean((1, 2))[:, kind == "clip" :])


def test_anchors_bring_their_neighbours_along():
    """On a grid of 4 × 4; the first patch of a row has the last one above on its left, and corners lack neighbours."""
    for anchor, expected in ((5, {1, 4, 5, 6, 9}), (4, {0, 3, 4, 5, 8}), (0, {0, 1, 4}), (15, {11, 14, 15})):
        scores = torch.zeros(1, 16, dtype=torch.float64).index_fill(1, torch.tensor([anchor]), 1)
        assert set(hiprune.around(scores, 1, 4)[0].nonzero().flatten().tolist()) == expected
    two = torch.zeros(1, 16, dtype=torch.float64).index_fill(1, torch.tensor([5, 15]), 1)
    assert hiprune.around(two, 2, 4).sum() == 8
    assert not hiprune.around(two, 0, 4).any()


def test_anchors_and_buffers_beyond_the_budget_stay_by_attention(llava):
    """round(8 · 1 / 5) = 2 anchors would bring up to 10 patches."""
    method = visibench.load_method("hiprune", tokens=8, alpha=1.0, layers="scaled")
    assert method.anchors(16) == 2
    with visibench.prune(llava, method) as session:
        llava(**collate(make_batch(ROWS)))
    assert session.trace.visual_counts()[:, 0].tolist() == [8, 16, 0]
