"""What vision-side methods are made of, against brute force."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import visibench
from support import collate, make_batch, make_llava
from visibench.engine.decisions import merged
from visibench.evals.compute import flops
from visibench.methods import (
    cdpruner,
    divprune,
    grids,
    pieces,
    prumerge,
    tome,
    visionzip,
    vispruner,
)

ROWS = [(5, 9, 1), (3, 12, 2), (4, 6, 0)]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- selections ---------------------------------------------------------------------------------------------------


def test_cosine_equals_the_definition_and_survives_zeros():
    left, right = random(2, 5, 4), random(2, 3, 4, seed=1)
    expected = torch.cosine_similarity(left[:, :, None], right[:, None], dim=-1)
    torch.testing.assert_close(pieces.cosine(left, right), expected)
    left[0, 0] = 0
    assert (pieces.cosine(left)[0, 0] == 0).all()
    assert pieces.cosine(left.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("count", [0, 1, 2, 7, 12])
def test_max_min_selection(count):
    distance = 1 - pieces.cosine(random(3, 12, 5))
    picked = divprune.farthest(distance, count)
    assert picked.shape == (3, count)
    for image in range(3):
        d, expected = distance[image], []
        for _ in range(count):
            others = lambda j, chosen=expected: [i for i in (chosen or range(12)) if i != j]  # noqa: E731
            free = [j for j in range(12) if j not in expected]
            expected.append(max(free, key=lambda j, d=d, near=others: min(d[j, i].item() for i in near(j))))
        assert picked[image].tolist() == expected


@pytest.mark.parametrize("count", [0, 1, 4, 8])
def test_greedy_determinant(count):
    vectors = random(2, 12, 9)
    kernel = vectors @ vectors.mT
    picked = cdpruner.most_likely(kernel, count)
    for image in range(2):
        expected = []
        for _ in range(count):
            free = [j for j in range(12) if j not in expected]
            part = lambda j, chosen=expected, k=kernel[image]: torch.linalg.det(k[[*chosen, j]][:, [*chosen, j]])  # noqa: E731
            expected.append(max(free, key=lambda j, volume=part: volume(j).item()))
        assert picked[image].tolist() == expected


def test_greedy_determinant_goes_on_past_the_rank_without_repeating():
    vectors = random(2, 12, 3)
    picked = cdpruner.most_likely((vectors @ vectors.mT).float(), 12)
    assert picked.sort(1).values.tolist() == [list(range(12))] * 2


def test_relevance_is_scaled_within_each_image():
    values = cdpruner.scaled(cdpruner.relevance(random(2, 6, 4), random(3, 4, seed=1)))
    assert torch.allclose(values.amax(1), torch.ones(2, dtype=torch.float64), atol=1e-5)
    assert (values > 0).all()


@pytest.mark.parametrize(
    ("important", "diverse", "drop"), [(4, 3, 2), (3, 5, 8), (0, 6, 1), (5, 0, 8), (5, 15, 8), (6, 1, 3)]
)
def test_thinning_by_redundancy(important, diverse, drop):
    attention, similarity = random(2, 20, seed=2), pieces.cosine(random(2, 20, 6))
    kept = vispruner.select(attention, similarity, important, diverse, drop)
    assert kept.sum(1).tolist() == [important + diverse] * 2
    for image in range(2):
        falling = sorted(range(20), key=lambda j, a=attention[image]: -a[j])
        rest = falling[important:]
        while diverse and len(rest) > diverse:
            even, odd = rest[::2], rest[1::2]
            like = {i: max(similarity[image, i, j].item() for j in odd) for i in even}
            even = sorted(even, key=lambda i, like=like: -like[i])
            rest = even[min(drop, len(rest) - diverse) :] + odd
        expected = {*falling[:important], *(rest if diverse else [])}
        assert set(kept[image].nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("count", [0, 1, 3, 4, 9, 10])
def test_contextual_tokens(count, mean):
    features, keys = random(2, 10, 5), random(2, 10, 3, seed=1)
    merged = visionzip.contextualise(features, keys, count, mean=mean)
    assert merged.shape == (2, count, 5)
    if not count:
        return
    targets = list(range(0, 10, 10 // count))[:count]
    for image in range(2):
        groups = {t: [] for t in targets}
        for j in set(range(10)) - set(targets):
            like = [torch.cosine_similarity(keys[image, j], keys[image, t], dim=0).item() for t in targets]
            groups[targets[int(np.argmax(like))]].append(features[image, j])
        for k, (target, others) in enumerate(groups.items()):
            own = features[image, target]
            if mean:
                expected = torch.stack([own, *others]).mean(0)
            else:
                expected = own + torch.stack(others).mean(0) if others else own
            torch.testing.assert_close(merged[image, k], expected)


@pytest.mark.parametrize("normalise", [True, False])
def test_neighbour_merging(normalise):
    features, keys, attention = random(2, 9, 5), random(2, 9, 3, seed=1), random(2, 9, seed=2).softmax(1)
    kept = random(2, 9, seed=3) > 0
    merged = prumerge.merge(features, keys, attention, kept, 4, normalise=normalise)
    for image in range(2):
        x, a, k = features[image], attention[image], keys[image]
        for i in range(9):
            like = {j: torch.cosine_similarity(k[i], k[j], dim=0).item() for j in range(9) if j != i}
            near = sorted(like, key=lambda j, like=like: -like[j])[:4]
            if normalise:
                weights = a[[i, *near]] / a[[i, *near]].sum()
                expected = (weights[:, None] * x[[i, *near]]).sum(0)
            else:
                expected = x[i] + (a[near, None] * x[near]).sum(0)
            torch.testing.assert_close(merged[image, i], expected)
        torch.testing.assert_close(merged[image, 9], (a[~kept[image], None] * x[~kept[image]]).sum(0))


def test_outliers_are_above_the_upper_fence():
    scores = torch.cat([random(4, 60), random(4, 4, seed=1) * 9], dim=1)
    low, high = np.percentile(scores, [25, 75], axis=1)
    expected = [(row > q3 + 1.5 * (q3 - q1)).sum().item() for row, q1, q3 in zip(scores, low, high, strict=True)]
    assert prumerge.outliers(scores).tolist() == expected
    assert sum(expected) > 0


def test_evenly_spaced_places():
    mask = random(3, 40) > -0.5
    count = torch.tensor([0, 7, 100]).minimum(mask.sum(1))
    spread = prumerge.evenly(mask, count)
    assert not (spread & ~mask).any()
    assert torch.equal(spread.sum(1), count)
    gaps = mask[1].cumsum(0)[spread[1]].diff()
    assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("side", [1, 4, 24])
def test_grids_within_a_budget(side):
    for budget in range(1, side * side + 1):
        shapes = [(h, w) for h in range(1, side + 1) for w in range(h, min(2 * h, side) + 1) if h * w <= budget]
        most = max(h * w for h, w in shapes)
        assert grids.grid_within(budget, side) == max(shape for shape in shapes if shape[0] * shape[1] == most)
    assert [grids.grid_within(n, 24) for n in (192, 128, 64, 576) if side == 24] == [
        (12, 16),
        (8, 16),
        (8, 8),
        (24, 24),
    ][: 4 * (side == 24)]


# ---- ToMe ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_stays", [True, False])
@pytest.mark.parametrize("count", [9, 10])
def test_matching_takes_the_best_edges_and_merging_keeps_the_sum(count, first_stays):
    metric, tokens, size = random(2, count, 6), random(2, count, 5, seed=1), random(2, count, seed=2).exp()
    group = tome.matched(metric, 3, first_stays=first_stays)
    out, total = merged(tokens, size, group, count - 3)
    torch.testing.assert_close((out * total[..., None]).sum(1), (tokens * size[..., None]).sum(1))
    torch.testing.assert_close(total.sum(1), size.sum(1))
    for image in range(2):
        like = pieces.cosine(metric)[image]
        even, odd = range(2 * first_stays, count, 2), list(range(1, count, 2))
        best = {i: max(odd, key=lambda j, i=i: like[i, j]) for i in even}
        leaving = sorted(even, key=lambda i: -like[i, best[i]])[:3]
        for i in leaving:
            assert group[image, i] == group[image, best[i]]
        left = [i for i in range(0, count, 2) if i not in leaving]
        if not first_stays:
            left = sorted(left, key=lambda i: -like[i, best[i]])
        assert group[image, left + odd].tolist() == list(range(count - 3))


@pytest.mark.parametrize("patches", [16, 144, 576])
@pytest.mark.parametrize("blocks", [2, 5, 23])
def test_schedule_reaches_every_reachable_budget(patches, blocks):
    least = tome.fewest(patches, blocks)
    for target in range(least, patches + 1):
        merges, left = tome.schedule(patches, target, blocks), patches
        for r in merges:
            assert 0 <= r <= left // 2
            left -= r
        assert left == target
        assert list(merges) == sorted(merges, reverse=True)
    assert set(tome.schedule(576, 192, 23)) == {16, 17}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("proportional", [True, False])
def test_merging_by_hooks_equals_the_tower_written_out(attention, proportional):
    """Also in a model that never ran: transformers adds the hooks that record hidden states in its first forward."""
    model, method = make_llava(attention=attention), visibench.load_method("tome", tokens=5, proportional=proportional)
    (sample,) = make_batch([(4, 8, 2)])
    seen = []
    for _ in range(2):
        with visibench.prune(model, method):
            hook = model.model.multi_modal_projector.register_forward_pre_hook(
                lambda module, args: seen.append(args[0])
            )
            model(**sample)
            hook.remove()
    tower = model.model.vision_tower
    x = tower.pre_layrnorm(tower.embeddings(sample["pixel_values"]))
    size = torch.ones(x.shape[:2])
    for block, merges in zip(tower.encoder.layers[:2], (6, 5), strict=True):
        heads = lambda t: t.unflatten(2, (4, 8)).transpose(1, 2)  # noqa: E731
        normed, attn = block.layer_norm1(x), block.self_attn
        q, k, v = (heads(p(normed)) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
        logits = q @ k.mT / 8**0.5 + (size.log()[:, None, None] if proportional else 0)
        x = x + attn.out_proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
        x, size = merged(x, size, tome.matched(k.mean(1), merges, first_stays=True), x.shape[1] - merges)
        x = x + block.mlp(block.layer_norm2(x))
    assert x.shape == (2, 6, 32)
    for features in seen:
        torch.testing.assert_close(features, x[:, 1:], atol=1e-5, rtol=1e-5)


# ---- through the engine -------------------------------------------------------------------------------------------


def features_of(model, method, sample):
    seen = []
    with visibench.prune(model, method) as session:
        hook = model.model.multi_modal_projector.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        model(**sample)
        hook.remove()
    return seen[0], session


def test_pooling_averages_cells(llava):
    (sample,) = make_batch([(4, 8, 2)])
    dense, _ = features_of(llava, visibench.load_method("none"), sample)
    pooled, session = features_of(llava, visibench.load_method("pooling", tokens=4), sample)
    cells = dense.view(2, 2, 2, 2, 2, 32).mean((2, 4)).flatten(1, 2)
    torch.testing.assert_close(pooled, cells)
    assert session.trace.visual_counts().tolist() == [[8] * 10]
    assert not session.trace.kept(0).any()


def test_downsampling_equals_encoding_the_smaller_image(llava):
    (sample,) = make_batch([(4, 8, 2)])
    seen, session = features_of(llava, visibench.load_method("downsample", keep=0.5), sample)
    smaller = F.interpolate(sample["pixel_values"], (12, 24), mode="bicubic", antialias=True)
    out = llava.model.vision_tower(smaller, interpolate_pos_encoding=True, output_hidden_states=True)
    torch.testing.assert_close(seen, out.hidden_states[-2][:, 1:])
    assert session.trace.visual_counts().tolist() == [[16] * 10]


def test_work_of_a_shortened_tower_by_hand(llava):
    (sample,) = make_batch([(5, 9, 2)])
    work = lambda n, m: 4 * n * 32 * 32 + 2 * n * n * 32 + 2 * m * 32 * 48  # noqa: E731
    for name, tokens, blocks in (
        ("tome", 16, [(17, 11), (11, 6), (6, 6)]),
        ("downsample", 4, [(5, 5)] * 3),
    ):
        _, session = features_of(llava, visibench.load_method(name, tokens=5), sample)
        parts = flops.executed(session.trace, session.geometry).components()
        assert parts["vision_tower"] == [2 * (tokens * 3 * 36 * 32 + sum(work(n, m) for n, m in blocks))]
        assert parts["projector"] == [2 * (blocks[-1][1] - 1) * (32 * 48 + 48 * 48)]
    _, session = features_of(llava, visibench.load_method("tome", tokens=5), sample)
    assert flops.executed(session.trace, session.geometry).scoring.tolist() == [2 * 8 * (9 * 8 + 6 * 5)]


@pytest.mark.parametrize(
    "name", ["divprune", "fastervlm", "vispruner", "scope", "holov", "pooling", "tome", "downsample"]
)
def test_keeping_every_patch_is_dense_bit_for_bit(llava, name):
    batch = collate(make_batch(ROWS))
    dense = llava(**batch).logits
    with visibench.prune(llava, visibench.load_method(name, keep=1.0)):
        assert torch.equal(llava(**batch).logits, dense)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("divprune", {}),
        ("fastervlm", {}),
        ("visionzip", {}),
        ("vispruner", {}),
        ("scope", {}),
        ("hiprune", {"alpha": 1.0, "layers": "scaled"}),
        ("holov", {"runs": 3}),
        ("holov", {"runs": 3, "shortfall": "zeros"}),
        ("prumerge", {}),
        ("prumerge_plus", {}),
        ("cdpruner", {"condition": "none"}),
        ("pooling", {}),
        ("tome", {}),
        ("downsample", {}),
    ],
)
def test_budgets_are_met_for_each_image(llava, name, options):
    batch = collate(make_batch(ROWS))
    for tokens in (4, 6, 8, 9, 12, 16):
        with visibench.prune(llava, visibench.load_method(name, tokens=tokens, **options)) as session:
            llava(**batch)
        assert session.trace.visual_counts()[:, 0].tolist() == [tokens, 2 * tokens, 0]
