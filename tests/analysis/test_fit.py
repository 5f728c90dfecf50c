"""Fitted hyperparameters against the searches done by hand, on whole attention maps."""

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import visibench
from support import IMAGE, collate, make_batch, make_llava
from torch.distributions import Categorical, kl_divergence
from visibench.analysis import fit
from visibench.errors import InputError, OptionError, VisibenchError
from visibench.evals.settings import method_spec
from visibench.models.adapters import Adapter

EQUAL = [(5, 9, 1), (3, 12, 1)]
RAGGED = [(5, 9, 1), (3, 12, 2)]
LAYERS = 10


# ---- FitPrune -------------------------------------------------------------------------------------------------------


def lightest(mass, least):
    """The largest set of lightest tokens whose removal leaves at least ``least``, by trying all sizes."""
    order = sorted(range(len(mass)), key=lambda token: float(mass[token]))
    sizes = (n for n in range(len(order) + 1) if float(sum(mass[order[n:]])) >= least)
    return {*order[: max(sizes, default=0)]}


def two_masses(attention, visual, text):
    """Mean over queries of the largest weight over heads, by visual token; ``attention``: (heads, L, L)."""
    peak = attention.double().amax(0)
    return [peak[rows][:, visual].mean(0) for rows in (visual, text)]


def counts_by_hand(model, sample, alpha):
    """Visual tokens at each layer's input if each layer may lose ``alpha``; layer by layer with eager attention."""
    decoder, inputs = model.model.language_model, []
    hook = decoder.layers[0].register_forward_pre_hook(lambda m, args, kwargs: inputs.append(args[0]), with_kwargs=True)
    dense = model(**sample, output_attentions=True).attentions
    hook.remove()
    is_visual = sample["input_ids"][0] == IMAGE
    is_text = ~is_visual & is_visual.cumsum(0).bool()
    (hidden,), positions, counts = inputs, torch.arange(len(is_visual)), []
    places = lambda mask: mask[positions].nonzero()[:, 0]  # noqa: E731
    everywhere = places(is_visual), places(is_text)
    for layer, attended in zip(decoder.layers, dense, strict=True):
        visual, text = places(is_visual), places(is_text)
        counts.append(len(visual))
        mask = torch.full((len(positions),) * 2, torch.finfo(hidden.dtype).min).triu(1)[None, None]
        rope = decoder.rotary_emb(hidden, positions[None])
        weights = layer.self_attn(layer.input_layernorm(hidden), position_embeddings=rope, attention_mask=mask)[1][0]
        hidden = layer(hidden, position_embeddings=rope, attention_mask=mask, position_ids=positions[None])
        whole, now = two_masses(attended[0], *everywhere), two_masses(weights, visual, text)
        gone = [lightest(m, (1 - alpha) * float(w.sum())) for m, w in zip(now, whole, strict=True)]
        stays = torch.ones(len(positions), dtype=torch.bool)
        stays[visual[[*set.intersection(*gone)]]] = False
        hidden, positions = hidden[:, stays], positions[stays]
    return counts


def macs(counts, width=48, kv=24, ffn=64):
    """Of q, k, v, o, two products of attention and three FFN matrices, on visual tokens alone."""
    return sum(n * width * (2 * width + 2 * kv + 3 * ffn) + 2 * n * n * width for n in counts)


def schedule_by_hand(by_sample, target):
    """Tokens left at each layer as shares of the prompt's, with deletion stopped once the target is met, or None."""
    dense = sum(macs([counts[0]] * LAYERS) for counts in by_sample)
    for last in range(LAYERS):
        stopped = [counts[: last + 1] + [counts[last]] * (LAYERS - 1 - last) for counts in by_sample]
        if sum(map(macs, stopped)) <= (1 - target) * dense:
            total = sum(counts[0] for counts in stopped)
            return [sum(column) / total for column in zip(*stopped, strict=True)]
    return None


@pytest.mark.parametrize("rows", [EQUAL, RAGGED])
def test_fitprune_is_the_search_by_hand(rows, llava):
    samples, eager, steps = make_batch(rows), make_llava(attention="eager"), 8
    grid = {k / steps: [counts_by_hand(eager, sample, k / steps) for sample in samples] for k in range(1, steps + 1)}
    out_of = max(counts[0] for counts in grid[1.0])
    alphas = []
    for target in (0.2, 0.4, 0.6, 0.8):
        plans = {alpha: schedule_by_hand(counts, target) for alpha, counts in grid.items()}
        reached = [plan is not None for plan in plans.values()]
        assert reached == sorted(reached), "more alpha spares more, on these samples"
        alpha = next(alpha for alpha, plan in plans.items() if plan is not None)
        found = fit.fitprune_deletions(llava, samples, target=target, tolerance=1 / steps)
        assert found.outcome["alpha"] == alpha
        left = [round(out_of * share) for share in plans[alpha]]
        assert list(found.method.deletions) == [a - b for a, b in pairwise(left)]
        assert found.method.out_of == out_of
        assert found.outcome["visual_tokens"] == pytest.approx(sum(left) / LAYERS)
        assert found.outcome["reduction"] == pytest.approx(1 - macs(left) / macs([out_of] * LAYERS))
        alphas.append(alpha)
    assert len({*alphas}) > 2


def test_a_batch_is_fitted_like_its_rows(llava):
    samples = make_batch([(5, 30, 1), (3, 5, 2)])
    settings = {"target": 0.5, "tolerance": 0.05}
    assert fit.fit("fitprune", llava, [collate(samples)], **settings) == fit.fit("fitprune", llava, samples, **settings)


@pytest.mark.parametrize("rows", [EQUAL, RAGGED])
def test_the_fitted_schedule_is_what_fitprune_does(rows, llava):
    samples = make_batch(rows)
    tokens = []
    for target in (0.1, 0.5, 0.88):
        found = fit.fit("fitprune", llava, samples, target=target, tolerance=0.03)
        method, out_of = found.method, found.method.out_of
        gone = [sum(method.deletions[:layer]) for layer in range(LAYERS)]
        for sample in samples:
            with visibench.prune(llava, method) as session:
                llava(**sample)
            (counts,) = session.trace.visual_counts().tolist()
            assert counts == [counts[0] - counts[0] * n // out_of for n in gone]
        # Half a token a layer, of which the compute is at most twice that of a token's share.
        assert found.outcome["reduction"] >= target - 1 / out_of
        assert method_spec.parse(str(method)) == method
        tokens.append(found.outcome["visual_tokens"])
    assert tokens == sorted(tokens, reverse=True)
    assert len({*tokens}) == len(tokens)


def test_a_bare_decoder_is_fitted_with_a_layout(golden_llama, golden_inputs):
    ids = torch.arange(5, 45)[None] % golden_llama.config.vocab_size
    layout = visibench.TokenLayout.from_spans(40, visual=[(5, 29)])
    found = fit.fit("fitprune", golden_llama, [{"input_ids": ids}], layout, target=0.4)
    assert found.method.out_of == 24
    with visibench.prune(golden_llama, found.method, layout=layout) as session:
        golden_llama(input_ids=ids)
    counts = session.trace.visual_counts()
    assert counts.double().mean() == pytest.approx(found.outcome["visual_tokens"])
    assert 0 < counts[0, -1] < 24


def test_spared_tokens_are_the_most_that_leave_enough():
    generator = torch.Generator().manual_seed(0)
    sizes = set()
    for _ in range(200):
        mass = torch.rand(2, 3, 7, generator=generator, dtype=torch.float64)
        least = mass.sum(-1) * torch.rand(2, 3, generator=generator, dtype=torch.float64) * 1.2
        gone = fit.spared(mass, least)
        for place in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
            one, enough = mass[*place], float(least[*place])
            expected = lightest(one, enough)
            assert {*gone[*place].nonzero()[:, 0].tolist()} == expected
            sizes.add(len(expected))
    assert sizes == set(range(7))
    assert fit.spared(torch.rand(5), torch.tensor(0.0)).all(), "all may go where nothing must be left"
    assert not fit.spared(torch.ones(5), torch.tensor(5.1)).any()


@pytest.mark.parametrize("tolerance", [0.3, 0.01, 1e-6])
def test_bisection_ends_just_above_the_threshold(tolerance):
    for threshold in (0.0, 0.001, 0.3, 0.5, 0.77, 1.0):
        alpha, plan = fit.smallest(lambda a, t=threshold: a if a >= t else None, tolerance)
        assert alpha == plan
        assert threshold <= alpha <= threshold + tolerance
    assert fit.smallest(lambda a: None, tolerance) == (1.0, None)


def test_deletion_stops_where_the_target_is_met(llava):
    geometry = replace(Adapter(llava).geometry, layers=4)
    counts = torch.tensor([[16, 8, 4, 2], [32, 32, 16, 0]])
    assert fit.decoder_macs(counts, geometry).tolist() == [macs(row) for row in counts.tolist()]
    dense = 4 * (macs([16]) + macs([32]))
    stopped = [counts.maximum(counts[:, [layer]]) for layer in range(4)]
    spares = [1 - sum(map(macs, plan.tolist())) / dense for plan in stopped]
    assert spares == sorted({*spares}), "each layer's deletions spare something"
    for layer in range(1, 4):
        for target in (spares[layer - 1] + 1e-9, spares[layer] - 1e-9):
            assert fit.enough(counts, target, geometry).tolist() == stopped[layer].tolist()
    assert fit.enough(counts, spares[3] + 1e-9, geometry) is None


def test_fitprune_refuses_what_it_cannot_do(llava):
    samples = make_batch(EQUAL)
    for target in (0.0, 1.0, -0.5, 50.0, float("nan")):
        with pytest.raises(OptionError, match="target must lie"):
            fit.fit("fitprune", llava, samples, target=target)
    with pytest.raises(OptionError, match=r"10 layers can spare 0.9 at most"):
        fit.fit("fitprune", llava, samples, target=0.91)
    with pytest.raises(OptionError, match="tolerance"):
        fit.fit("fitprune", llava, samples, target=0.5, tolerance=0.0)


# ---- VTW ------------------------------------------------------------------------------------------------------------


def test_vtw_layer_is_the_first_below_the_threshold(llava):
    samples = make_batch(RAGGED)
    divergences = []
    for layer in range(LAYERS):
        apart = 0.0
        for sample in samples:
            dense = Categorical(logits=llava(**sample).logits[0, -1])
            with visibench.prune(llava, visibench.load_method("vtw", layer=layer)):
                apart += float(kl_divergence(dense, Categorical(logits=llava(**sample).logits[0, -1]))) / len(samples)
        divergences.append(apart)
    for threshold in (*divergences[::3], 100.0):
        threshold = threshold * 1.001
        expected = next((layer for layer in range(2, LAYERS) if divergences[layer] <= threshold), None)
        if expected is not None:
            for batches in (samples, [collate(samples)]):
                found = fit.vtw_layer(llava, batches, threshold=threshold, first=2)
                assert found.method == visibench.load_method("vtw", layer=expected)
                assert found.outcome["divergence"] == pytest.approx(divergences[expected], rel=1e-4)
    assert len({round(value, 6) for value in divergences}) > 5
    with pytest.raises(VisibenchError, match="comes nearest"):
        fit.vtw_layer(llava, samples, threshold=min(divergences) / 2, first=2)
    with pytest.raises(VisibenchError, match="no such layer"):
        fit.vtw_layer(llava, samples, threshold=1.0, first=10)


# ---- both -----------------------------------------------------------------------------------------------------------

SETTINGS = {"fitprune": {"target": 0.5}, "vtw": {"threshold": 100.0}}


@pytest.mark.parametrize("name", fit.FITS)
def test_search_leaves_the_model_as_it_was(name, llava):
    (sample,) = make_batch([(5, 9, 1)])
    before = llava(**sample).logits
    fit.fit(name, llava, [sample], **SETTINGS[name])
    assert torch.equal(llava(**sample).logits, before)


@pytest.mark.parametrize("name", fit.FITS)
def test_samples_that_cannot_be_used(name, llava):
    for rows in ([(5, 9, 0)], [(5, 9, 1), (5, 9, 0)]):
        with pytest.raises(InputError, match="without an image or without text"):
            fit.fit(name, llava, make_batch(rows), **SETTINGS[name])
    with pytest.raises(InputError, match="the last token of a prompt is visual"):
        fit.fit(name, llava, make_batch([(5, 0, 1)]), **SETTINGS[name])
    with pytest.raises(InputError, match="at least one prompt"):
        fit.fit(name, llava, [], **SETTINGS[name])


def test_what_is_not_fitted_is_refused(llava):
    with pytest.raises(OptionError, match="fastv has nothing to fit: choose one of fitprune, vtw"):
        fit.check("fastv", {})
    with pytest.raises(OptionError, match="vtw: the fit takes no target; it takes threshold, first"):
        fit.check("vtw", {"target": 0.5})
    with pytest.raises(OptionError, match="fitprune: the fit needs a target"):
        fit.check("fitprune", {})


@pytest.mark.slow
def test_the_searches_import_alone():
    subprocess.run([sys.executable, "-c", "import visibench.analysis.fit"], check=True)
