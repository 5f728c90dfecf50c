"""Tensor-level pieces of the decoder-side methods against slow versions of the same definitions."""

import math

import numpy as np
import pytest
import torch
import visibench
from visibench.engine.trace import Trace
from visibench.errors import OptionError
from visibench.methods import clusters, dart, pieces, sparsevlm, transprune
from visibench.models.adapters import Geometry

GEOMETRY = Geometry(layers=10, hidden=48, heads=4, kv_heads=2, head_size=12, intermediate=64, vocabulary=64)


def peaks_by_hand(tokens, clusters, noise):
    """DPC-kNN in plain Python: columns of the centres, best first, and for each token the number of its centre."""
    n, size = len(tokens), len(tokens[0])
    distance = [[math.dist(a, b) / math.sqrt(size) for b in tokens] for a in tokens]
    density = []
    for i in range(n):
        nearest = sorted(distance[i])[:clusters]
        density.append(math.exp(-sum(d * d for d in nearest) / clusters) + noise[i])
    largest = max(max(row) for row in distance)
    gap = [min([distance[i][j] for j in range(n) if density[j] > density[i]], default=largest) for i in range(n)]
    centres = sorted(range(n), key=lambda i: -density[i] * gap[i])[:clusters]
    cluster = [min(range(clusters), key=lambda c: distance[i][centres[c]]) for i in range(n)]
    for number, centre in enumerate(centres):
        cluster[centre] = number
    return centres, cluster


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("count", "wanted"), [(23, 5), (17, 2), (9, 7), (1, 1)])
def test_density_peaks_equal_the_definition_in_every_row(seed, count, wanted):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(4, count, 6, generator=generator) + 3 * torch.randn(4, 1, 6, generator=generator)
    noise = torch.rand(4, count, generator=generator) * 1e-3
    centres, cluster = clusters.density_peaks(tokens, wanted, noise)
    for row in range(4):
        expected = peaks_by_hand(tokens[row].tolist(), wanted, noise[row].tolist())
        assert (centres[row].tolist(), cluster[row].tolist()) == expected


def test_a_centre_heads_its_cluster_among_equal_tokens():
    tokens = torch.tensor([[[0.0, 0.0], [0.0, 0.0], [5.0, 5.0], [0.0, 0.0]]])
    centres, cluster = clusters.density_peaks(tokens, 4)
    assert sorted(centres[0].tolist()) == [0, 1, 2, 3]
    assert cluster[0, centres[0]].tolist() == [0, 1, 2, 3]


def test_distances_are_euclidean_and_zero_to_itself():
    tokens = torch.randn(2, 40, 7, dtype=torch.float64)
    exact = torch.cdist(tokens, tokens, compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(clusters.squared_distances(tokens) * 7, exact.square())
    far = torch.randn(1, 30, 7) + 1000
    assert clusters.squared_distances(far).diagonal(dim1=1, dim2=2).eq(0).all()


def test_two_tokens_are_as_far_from_each_other_both_ways():
    """Rounding does not decide which of two nearest neighbours is the denser."""
    tokens = torch.randn(3, 41, 97)
    squared = clusters.squared_distances(tokens)
    assert torch.equal(squared, squared.transpose(1, 2))
    near = torch.randn(200, 1, 97)
    three = torch.cat([near, near + 0.1 * torch.randn(200, 1, 97), torch.randn(200, 1, 97)], dim=1)
    centres, _ = clusters.density_peaks(three, 2)
    assert centres.eq(torch.tensor([0, 1])).all()


def test_pooled_tokens_are_sums_or_means_of_their_clusters():
    tokens = torch.tensor([[[1.0], [2.0], [4.0], [100.0]]])
    cluster = torch.tensor([[0, 2, 0, -1]])
    assert clusters.pooled(tokens, cluster, 3, mean=False).flatten().tolist() == [5, 0, 2]
    assert clusters.pooled(tokens, cluster, 3, mean=True).flatten().tolist() == [2.5, 0, 2]


def test_ranks_do_not_depend_on_padding():
    generator = torch.Generator().manual_seed(0)
    sizes, ranks = [(6, 20), (9, 5), (3, 3)], [4, 5, 1]
    matrices = torch.zeros(3, 12, 20)
    for row, ((height, width), rank) in enumerate(zip(sizes, ranks, strict=True)):
        left, right = torch.rand(height, rank, generator=generator), torch.rand(rank, width, generator=generator)
        matrices[row, :height, :width] = left @ right
        assert torch.linalg.matrix_rank(matrices[row, :height, :width]) == rank
    rows, columns = torch.tensor(sizes).T
    assert pieces.matrix_rank(matrices, rows, columns).tolist() == ranks


class View:
    """What methods read of the input of a decoder layer."""

    def __init__(self, layout, tokens):
        self.layout, self.tokens, self.present = layout, tokens, layout.visual.present
        self.hidden = layout.visual.pick(tokens, 1)

    def scored(self, macs):
        self.macs = macs


def ragged_layout():
    rows = [((3, 9), 15), ((1, 4), 9), (None, 6), ((0, 5), 6)]
    return visibench.TokenLayout.batch(
        [visibench.TokenLayout.from_spans(length, visual=[span] if span else []) for span, length in rows]
    )


def test_raters_equal_the_definition_in_ragged_rows():
    layout, tokens = ragged_layout(), torch.randn(4, 15, 8, generator=torch.Generator().manual_seed(1))
    view = View(layout, tokens)
    raters = sparsevlm.find_raters(view)
    for row in range(4):
        visual, text = (tokens[row, s.mask[row]].double().numpy() for s in (layout.visual, layout.text))
        found = raters[row, : len(text)].tolist()
        assert not raters[row, len(text) :].any()
        assert view.macs[row] == len(visual) * len(text) * 8
        if not len(visual):
            continue
        share = np.zeros(len(text))
        for v in visual:
            weights = np.exp(text @ v - (text @ v).max())
            share += weights / weights.sum() / len(visual)
        assert found == (list(share > share.mean()) if len(text) > 1 else [True])


@pytest.mark.parametrize(("visual", "text"), [(2, 3), (4, 0), (0, 4), (9, 9)])
def test_pivots_have_the_largest_norms(visual, text):
    layout, norms = ragged_layout(), torch.rand(4, 15, generator=torch.Generator().manual_seed(2))
    column, there = dart.pivots(norms, layout, visual, text)
    ordered, present = dart.left_to_right(column, there)
    for row in range(4):
        expected = []
        for tokens, count in ((layout.visual, visual), (layout.text, text)):
            own = tokens.mask[row].nonzero().flatten().tolist()
            expected += sorted(own, key=lambda c: -norms[row, c])[:count]
        assert column[row, there[row]].tolist() == expected
        assert ordered[row, present[row]].tolist() == sorted(expected)


# ---- schedules ----------------------------------------------------------------------------------------------------


def test_fitprune_schedules_leave_the_published_averages():
    """Visual tokens averaged over the inputs of 32 layers."""
    averages = {50: 301.8, 60: 245.0, 70: 187.9, 80: 130.6, 90: 72.8}
    for ratio, average in averages.items():
        schedule = visibench.load_method("fitprune", ratio=ratio).schedule
        left = [576 - sum(schedule[:layer]) for layer in range(32)]
        assert sum(left) / 32 == pytest.approx(average, abs=0.05)


def counts_of(model, method, visual):
    layout = visibench.TokenLayout.from_spans(visual + 24, visual=[(4, 4 + visual)])
    with visibench.prune(model, method, layout=layout) as session:
        model(inputs_embeds=torch.randn(1, visual + 24, 32, generator=torch.Generator().manual_seed(3)))
    assert isinstance(session.trace, Trace)
    return session.trace.visual_counts()[0].tolist()


def test_schedules_out_of_576_scale_with_the_image(golden_llama):
    whole = counts_of(golden_llama, visibench.load_method("fitprune", ratio=80), 576)
    half = counts_of(golden_llama, visibench.load_method("fitprune", ratio=80, out_of=576), 288)
    assert half == [math.ceil(count / 2) for count in whole]
    sparse = counts_of(golden_llama, visibench.load_method("sparsevlm", tokens=192, out_of=576), 288)
    # 150 kept of 288, and of the 138 others 42 in 5 clusters; 100 of 155, 17 in 2; 55 of 102, 15 in 2.
    assert sparse == [288] * 3 + [155] * 4 + [102] * 9 + [57] * 16


def test_change_between_layer_inputs_decides_also_right_behind_a_cut(golden_llama):
    """Cuts at layers 3 and 4: the states that entered layer 3 are compared with theirs, of the tokens that stayed."""
    layout = visibench.TokenLayout.from_spans(60, visual=[(4, 44)])
    states = {}
    method = visibench.load_method("v2drop", cuts=(3, 4, 9), ratios=(0.6, 0.5, 0.0))
    with visibench.prune(golden_llama, method, layout=layout) as session:
        hooks = [
            layer.register_forward_pre_hook(lambda m, a, i=i: states.update({i: a[0][0]}))  # behind the cut
            for i, layer in enumerate(golden_llama.model.layers)
        ]
        golden_llama(inputs_embeds=torch.randn(1, 60, 32, generator=torch.Generator().manual_seed(1)))
        for hook in hooks:
            hook.remove()
    trace, number = session.trace, list(range(40))
    for layer in (3, 4, 9):
        alone = golden_llama.model.layers[layer - 1]
        length = states[layer - 1].shape[0]
        place = torch.tensor([*range(4), *[4 + j for j in number], *range(44, 60)])[None]
        rope = golden_llama.model.rotary_emb(states[layer - 1][None], position_ids=place)
        after = alone(states[layer - 1][None], position_embeddings=rope, position_ids=place)[0]
        assert length == 20 + len(number)
        change = (after - states[layer - 1]).norm(dim=1)[4 : 4 + len(number)].tolist()
        count = max(1, int(len(number) * {3: 0.6, 4: 0.5, 9: 0.0}[layer]))
        best = sorted(sorted(range(len(number)), key=lambda i: -change[i])[:count])
        number = [number[i] for i in best]
        assert trace.kept(layer)[0].nonzero().flatten().tolist() == number


def test_rank_rule_keeps_in_proportion_to_the_rank(golden_llama):
    method = visibench.load_method("sparsevlm", rank="release", scale=2.0, bias=1.0, after=(3,), recycle=0)
    kept = counts_of(golden_llama, method, 100)[-1]
    assert kept % 2 == 1
    assert 3 <= kept <= 41  # at most 20 raters
    paper = visibench.load_method("sparsevlm", rank="paper", scale=0.5, after=(3,), recycle=0)
    rank = (kept - 1) // 2
    assert counts_of(golden_llama, paper, 100)[-1] == 100 - (100 - rank) // 2


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pyramiddrop", {"cuts": (8, 16)}, "2 cuts need as many ratios"),
        ("pyramiddrop", {"ratios": (0.5, 0.6, 0.1)}, "must fall"),
        ("pyramiddrop", {"cuts": (16, 8, 24)}, "must rise"),
        ("pyramiddrop", {"scorer": "last"}, "'next' or 'stage'"),
        ("pyramiddrop", {"cuts": (0, 8, 16), "scorer": "stage"}, "cuts must be >= 1"),
        ("v2drop", {"cuts": (3, 17)}, "2 cuts need as many ratios, not 3"),
        ("v2drop", {"cuts": (17, 3, 22)}, "must rise"),
        ("v2drop", {"cuts": (0, 17, 22)}, "cuts must be >= 1"),
        ("v2drop", {"ratios": (0.5, 1.5, 0.0)}, r"must lie in \[0, 1\]"),
        ("vtw", {"layer": -1}, ">= 0"),
        ("dart", {"layer": 0, "keep": 0.5}, ">= 1"),
        ("dart", {"keep": 0.5, "visual_pivots": 0, "text_pivots": 0}, "at least one pivot"),
        ("dart", {"keep": 0.5, "order": "set"}, "'position' or 'norm'"),
        ("fitprune", {}, "exactly one"),
        ("fitprune", {"ratio": 75}, "50, 60, 70, 80, 90"),
        ("fitprune", {"deletions": (3, -1)}, ">= 0"),
        ("fitprune", {"ratio": 60, "out_of": 100}, "less than all"),
        ("sparsevlm", {}, "exactly one"),
        ("sparsevlm", {"tokens": 100}, "192, 128, 96, 64"),
        ("sparsevlm", {"tokens": 192, "after": (2, 6)}, "need as many counts"),
        ("sparsevlm", {"counts": (3, 2, 1), "after": (6, 2, 15)}, "must rise"),
        ("sparsevlm", {"tokens": 192, "positions": "keep"}, "needs recycle=0"),
        ("sparsevlm", {"rank": "paper"}, r"scale in \[0, 1\]"),
        ("sparsevlm", {"tokens": 192, "layers": "deep"}, "'given' or 'scaled'"),
    ],
)
def test_bad_options_raise_one_line_that_names_the_method(name, options, message):
    with pytest.raises(OptionError, match=message) as caught:
        visibench.load_method(name, **options)
    assert str(caught.value).startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("pyramiddrop", {}),
        ("v2drop", {}),
        ("vtw", {}),
        ("dart", {"tokens": 8, "layer": 12}),
        ("fitprune", {"ratio": 60}),
        ("sparsevlm", {"tokens": 64}),
    ],
)
def test_too_few_layers_raise_and_scaling_helps(name, options):
    with pytest.raises(OptionError, match=r"10 layers: choose other layers or layers='scaled'"):
        visibench.load_method(name, **options).check(GEOMETRY)
    visibench.load_method(name, **options, layers="scaled").check(GEOMETRY)


def test_scaled_layers():
    method = visibench.load_method("pyramiddrop", layers="scaled")
    assert [method.at(layer, GEOMETRY) for layer in (0, 1, 2, 8, 16, 24, 31, 32)] == [0, 1, 1, 3, 5, 8, 9, 10]
    with pytest.raises(OptionError, match=r"scaled to 1\+1\+2 names a layer twice"):
        visibench.load_method("pyramiddrop", cuts=(2, 3, 6), layers="scaled").check(GEOMETRY)


# ---- PACT ---------------------------------------------------------------------------------------------------------


def centres_by_hand(distance, cutoff):
    """From dense to thin, each token that is farther than the cutoff from all centres so far."""
    density = [sum(math.exp(-((d / 2) ** 2)) for d in row) for row in distance]
    found = []
    for i in sorted(range(len(distance)), key=lambda i: -density[i]):
        if all(distance[i][j] > cutoff for j in found):
            found.append(i)
    return sorted(found)


@pytest.mark.parametrize("cutoff", [0, 0.3, 0.8, 1.2, 2])
def test_centres_are_those_of_one_token_after_the_other(cutoff):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 40, 4, generator=generator, dtype=torch.float64)
    distance = (1 - pieces.cosine(tokens)).clamp(min=0)
    counts = (40, 25, 0)
    there = torch.arange(40) < torch.tensor(counts)[:, None]
    found = clusters.centres(distance, there, cutoff)
    for row, count in enumerate(counts):
        expected = centres_by_hand(distance[row, :count, :count].tolist(), cutoff)
        assert found[row].nonzero().flatten().tolist() == expected


def test_tokens_up_to_the_last_visual_one():
    one = visibench.TokenLayout.from_spans(9, visual=[(2, 4), (6, 7)])
    layout = visibench.TokenLayout.batch([one, visibench.TokenLayout.from_spans(5, visual=[(1, 2)])])
    assert pieces.up_to_visual(layout).tolist() == [[True] * 7 + [False] * 2, [False] * 4 + [True] * 2 + [False] * 3]


# ---- TransPrune ---------------------------------------------------------------------------------------------------


def test_transprune_ratios_follow_the_authors():
    assert transprune.by_power(1, 3) == transprune.RATIOS
    assert transprune.by_power(0, 4) == (1, 1, 1, 1)
    assert transprune.by_power(2, 3) == (0.765625, 0.390625, 0.015625)
    assert list(transprune.by_power(1, 6)) == sorted(transprune.by_power(1, 6), reverse=True)
