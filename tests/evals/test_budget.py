"""Options solved for a budget: against traces, against all other settings, and against what is known from print."""

import pytest
import torch
import visibench
from budgeting import ROWS, TURNED, Clock, open_options, traced
from support import IMAGE, collate, make_batch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from visibench.errors import OptionError
from visibench.evals.compute import budget, flops
from visibench.evals.compute.budget import Planned, Prompts, accepted, solve
from visibench.evals.settings import method_spec
from visibench.evals.settings.method_spec import MethodSpec
from visibench.evals.settings.target import Target
from visibench.methods import fitprune
from visibench.models import LoadedModel

# ---- solutions ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("cls", TURNED, ids=lambda cls: cls.name)
def test_achieved_is_what_a_trace_finds_and_no_neighbour_is_nearer(cls, llava, prompts):
    options = open_options(cls)
    spec = MethodSpec.of(cls.name, options)
    settings, _ = accepted(spec, spec.knobs()[0], prompts)
    planned = settings[0].left(prompts.layouts[0], prompts.loaded.geometry) is not None
    every = [prompts.tokens(method) for method in settings] if planned else []
    least, most = (traced(llava, method) for method in (settings[0], settings[-1]))
    for share in (0, 0.3, 0.55, 0.8, 1):
        target = least + share * (most - least)
        found = solve(cls.name, options, Target("tokens", target), prompts)
        achieved, place = traced(llava, found.method), settings.index(found.method)
        assert found.cost.tokens.mean == pytest.approx(achieved)
        others = every or [prompts.tokens(method) for method in settings[max(place - 1, 0) : place + 2]]
        assert abs(achieved - target) == pytest.approx(min(abs(other - target) for other in others), abs=1e-9)
        assert method_spec.parse(str(found.method)) == found.method


@pytest.mark.parametrize("text", ["random:layer=1", "divprune", "fitprune:layers=scaled"])
def test_prompts_may_hold_any_number_of_images(text, llava):
    rows = [(5, 9, 1), (3, 12, 3), (4, 6, 0)]
    samples = make_batch(rows)
    mixed = Prompts(LoadedModel("small", llava, None), [collate(samples)], samples[0])
    found = solve(*method_spec.split(text), Target("tokens", 12), mixed)
    assert found.cost.tokens.mean == pytest.approx(traced(llava, found.method, rows))
    assert found.cost.tokens.mean == pytest.approx(12, abs=1)
    assert mixed.dense.tokens.mean == pytest.approx(64 / 3)


@pytest.mark.parametrize(
    ("text", "knob"),
    [
        ("sparsevlm:rank=paper,layers=scaled", "scale"),
        ("sparsevlm:rank=release,after=1+4,cluster_size=1", "scale"),
        ("visipruner:layers=scaled,token_threshold=0.5", "shallow_layers"),
        ("visipruner:layers=scaled,forced=true,filter_layer=14", "filter_tokens"),
    ],
)
def test_a_method_has_several_knobs(text, knob, llava, prompts):
    found = solve(*method_spec.split(text), Target("tokens", 11), prompts)
    assert found.knob == knob
    assert found.cost.tokens.mean == pytest.approx(traced(llava, found.method))
    assert found.cost.tokens.mean == pytest.approx(11, abs=1.6)


def test_the_next_knob_is_turned_where_the_first_does_not_reach(llava, prompts):
    """Twelve shallow layers of 32 are four of ten here, and two whole layers more follow in front of any cut."""
    options = {"layers": "scaled", "shallow_layers": "12"}
    assert solve("visipruner", {"layers": "scaled"}, Target("tokens", 8), prompts).knob == "token_threshold"
    with pytest.raises(OptionError, match=r"token_threshold gives T=9.6 .* the first 6 of 10 layers$"):
        solve("visipruner", options, Target("tokens", 8), prompts)
    found = solve("visipruner", {"layers": "scaled", "token_threshold": "1000"}, Target("tokens", 8), prompts)
    assert found.knob == "shallow_layers"
    assert traced(llava, found.method) == pytest.approx(8)


@pytest.mark.parametrize("text", ["fastv:layer=2", "downsample", "vtw"])
def test_compute_is_that_of_the_nearest_setting(text, llava, prompts):
    name, options = method_spec.split(text)
    spec = MethodSpec.of(name, options)
    settings, _ = accepted(spec, spec.knobs()[0], prompts)
    macs = {}
    for method in settings:
        total = 0.0
        for sample in make_batch(ROWS):
            with visibench.prune(llava, method) as session:
                llava(**sample)
            total += flops.executed(session.trace, session.geometry).total()[0]
        macs[method] = total / len(ROWS)
    least, most = min(macs.values()), max(macs.values())
    for share in (0.1, 0.5, 0.9):
        target = least + share * (most - least)
        found = solve(name, options, Target("tflops", target * 1e-12), prompts)
        assert found.cost.tflops == pytest.approx(macs[found.method] * 1e-12)
        assert abs(macs[found.method] - target) == pytest.approx(min(abs(value - target) for value in macs.values()))


def test_compute_is_what_fvcore_counts(llava):
    (sample,) = make_batch(ROWS[:1])
    found = solve("divprune", {}, Target("tflops", 5e-6), Prompts(LoadedModel("small", llava, None), [sample], sample))
    with visibench.prune(llava, found.method):
        counted, _ = flops.counted(llava, sample)
    head = 64 * 48 * (int(sample["input_ids"].shape[1]) - 16 + found.method.tokens - 1)
    assert found.cost.tflops == pytest.approx((counted - head) * 1e-12, rel=0.01)


# ---- time -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def timed(prompts, monkeypatch):
    def under(noise):
        clock = Clock(prompts, noise)
        monkeypatch.setattr(budget, "time_prefill", clock)
        return Prompts(prompts.loaded, prompts.batches, prompts.timed), clock

    return under


def test_time_is_measured_again_once_the_setting_is_chosen(timed):
    prompts, clock = timed(0.1)
    found = solve("fastv", {"layer": 2}, Target("ms", 18), prompts)
    assert found.method.tokens == 6  # 10 + 0.2 · 16 + 0.8 · 6
    assert found.timing.median_ms == 18
    assert clock.asked.count(found.method) == 2
    assert all(clock.asked.count(method) == 1 for method in set(clock.asked) - {found.method})


def test_time_is_not_solved_within_its_noise(timed):
    prompts, _ = timed(20)
    with pytest.raises(OptionError, match=r"13.2 ms to 26 ms, no further apart than .* \(interquartile range 20 ms\)"):
        solve("fastv", {"layer": 2}, Target("ms", 18), prompts)
    prompts, _ = timed(0.1)
    with pytest.raises(OptionError, match=r"12 ms is out of reach: tokens gives 13.2 ms to 26 ms, since all 16"):
        solve("fastv", {"layer": 2}, Target("ms", 12), prompts)


def test_a_real_prefill_is_timed(prompts):
    timing = prompts.time(visibench.load_method("none"))
    assert timing.repeats == 20
    assert timing.min_ms > 0
    assert timing.batch_size == 1


@pytest.mark.parametrize("cls", TURNED, ids=lambda cls: cls.name)
def test_without_weights_a_plan_solves_what_runs_solve(cls, llava, prompts):
    """The same setting and tokens, and the compute outside the method; or a word that it must run."""
    options, inputs, half = open_options(cls), make_batch([(7, 7, 1)]), Target("tokens", 8)
    planned, run = Planned(prompts.loaded, 14, 16), Prompts(prompts.loaded, inputs, inputs[0])
    found = solve(cls.name, options, half, run)
    adapts = found.method.visual_counts(run.layouts[0], prompts.loaded.geometry) is None
    if adapts or cls.name == "flowcut":  # its entropies say when tokens leave, not how many
        with pytest.raises(OptionError, match="give --weights random"):
            solve(cls.name, options, half, planned)
        return
    plan = solve(cls.name, options, half, planned)
    assert (plan.method, plan.cost.tokens) == (found.method, found.cost.tokens)
    with torch.no_grad(), visibench.prune(llava, plan.method) as session:
        llava(**inputs[0], logits_to_keep=1)
    (scoring,) = flops.executed(session.trace, prompts.loaded.geometry).scoring
    assert plan.cost.tflops == pytest.approx(found.cost.tflops - scoring * 1e-12)


# ---- what is known --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published():
    """32 decoder layers and 576 patches of LLaVA-1.5, but narrow."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=336, patch_size=14
    )
    text = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=32, num_attention_heads=2)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=576)
    model = LlavaForConditionalGeneration(config).eval()
    words = torch.randint(3, 60, (1, 60), generator=torch.Generator().manual_seed(1))
    ids = torch.cat([words[:, :35], torch.full((1, 576), IMAGE), words[:, 35:]], dim=1)
    pixels = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(2))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return Prompts(LoadedModel("published", model, None), [inputs], inputs)


def runs(solution):
    """Layers and visual tokens, one pair for each run of layers with equally many."""
    layers = solution.cost.tokens.per_layer
    starts = [i for i, n in enumerate(layers) if i == 0 or n != layers[i - 1]]
    return [(end - start, int(layers[start])) for start, end in zip(starts, [*starts[1:], len(layers)], strict=True)]


@pytest.mark.parametrize(("tokens", "kept"), [(192, 166), (128, 98), (64, 30)])
def test_fastv_at_the_usual_budgets(tokens, kept, published):
    """(32 · T - 2 · 576) / 30, as papers that budget by the mean over layers set it."""
    found = solve("fastv", {}, Target("tokens", tokens), published)
    assert found.method == visibench.load_method("fastv", tokens=kept)


def test_pyramiddrop_reaches_192_but_neither_128_nor_64(published):
    """Its first eight layers alone contribute 8 · 576 / 32 = 144."""
    found = solve("pyramiddrop", {}, Target("tokens", 192), published)
    (_, whole), *cuts = runs(found)
    assert whole == 576
    assert [n for _, n in cuts] == pytest.approx([146, 37, 9], abs=1)
    assert found.cost.tokens.mean == pytest.approx(192, abs=0.2)
    for tokens in (128, 64):
        with pytest.raises(OptionError, match=r"T=144 to T=576, since all 576 visual tokens .* first 8 of 32 layers"):
            solve("pyramiddrop", {}, Target("tokens", tokens), published)
    assert solve("pyramiddrop", {}, Target("tokens", 270), published).method == visibench.load_method("pyramiddrop")


@pytest.mark.parametrize(("tokens", "kept"), [(192, 288), (128, 192), (64, 96)])
def test_vscan_comes_back_to_its_published_schedules(tokens, kept, published):
    found = solve("vscan", {"early": 0}, Target("tokens", tokens), published)  # the tower here has but few blocks
    assert runs(found) == [(16, kept), (16, kept // 3)]
    assert found.cost.tokens.mean == tokens


def test_v2drop_comes_back_to_its_published_schedule_and_reaches_every_usual_budget(published):
    """From (3 · 576 + 29) / 32, with one token from the first cut on, to all."""
    assert solve("v2drop", {}, Target("tokens", 202.8), published).method == visibench.load_method("v2drop")
    for tokens in (192, 128, 64):
        assert solve("v2drop", {}, Target("tokens", tokens), published).cost.tokens.mean == pytest.approx(
            tokens, abs=0.3
        )
    assert solve("v2drop", {}, Target("tokens", 576), published).cost.tokens.per_layer == [576] * 32
    with pytest.raises(OptionError, match=r"T=54\.91 to T=576"):
        solve("v2drop", {}, Target("tokens", 50), published)


def test_transprune_comes_back_to_its_published_schedule(published):
    assert solve("transprune", {}, Target("tokens", 236.25), published).method == visibench.load_method("transprune")
    assert solve("transprune", {}, Target("tokens", 192), published).cost.tokens.mean == pytest.approx(192, abs=1)
    assert solve("transprune", {}, Target("tokens", 576), published).cost.tokens.per_layer == [576] * 32
    with pytest.raises(OptionError, match=r"T=126 to T=576, since all 576 visual tokens .* first 7 of 32 layers"):
        solve("transprune", {}, Target("tokens", 64), published)


@pytest.mark.parametrize(("ratio", "mean"), [(50, 301.8), (60, 245.0), (70, 187.9), (80, 130.6), (90, 72.8)])
def test_fitprune_comes_back_to_the_shipped_schedules(ratio, mean, published):
    found = solve("fitprune", {}, Target("tokens", mean), published)
    assert found.method.deletions == fitprune.SCHEDULES[ratio]
    assert found.method.out_of == 576
    assert found.cost.tokens.mean == pytest.approx(mean, abs=0.05)


@pytest.mark.parametrize(
    ("mean", "counts"),
    [(206.5, (300, 200, 110)), (145.4, (303, 110, 36)), (82.3, (66, 30, 17))],
)
def test_sparsevlm_comes_back_to_the_authors_lists(mean, counts, published):
    found = solve("sparsevlm", {}, Target("tokens", mean), published)
    assert found.method.counts == pytest.approx(counts, abs=2)


def test_vtw_by_its_layer(published):
    assert solve("vtw", {}, Target("tokens", 288), published).method.layer == 16


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "target", "reason"),
    [
        ("pyramiddrop:layers=scaled", 4, "ratios gives T=4.8 to T=16, since all 16 visual tokens .* first 3 of 10"),
        ("pyramiddrop", 8, "cuts=8.16.24, but the model has 10 layers: .* layers='scaled'"),
        ("fitprune", 8, "the model has 10 layers: .* layers='scaled'"),
        ("fastv:layer=2", 3, "tokens gives T=3.2 to T=16"),
        ("tome", 3, "tokens gives T=4 to T=16: each of 2 vision blocks can at most halve"),
        ("pooling", 0, "tokens gives T=1 to T=16: the budget must be at least 1 token"),
        ("divprune", 17, "T=17 is out of reach: tokens gives T=0 to T=16$"),
        ("visipruner:layers=scaled", 1, "token_threshold gives .*; shallow_layers gives"),
        ("cdpruner", 8, "no CLIP text tower"),
        ("sparsevlm:after=2+6", 8, "2 layers in after need as many counts"),
        ("none", 8, "nothing to turn"),
        ("fastv:keep=0.5", 8, "keep given, which is for a budget to decide"),
        ("sparsevlm:tokens=192,out_of=576", 8, "out_of and tokens given"),
        ("sparsevlm:rank=paper,scale=0.8", 8, "rank and scale given"),
        ("fastv:lair=2", 8, "did you mean 'layer'"),
        ("fastv:layer=two", 8, "valid integer"),
    ],
)
def test_the_impossible_is_refused_with_the_reason(text, target, reason, prompts):
    with pytest.raises(OptionError, match=reason) as caught:
        solve(*method_spec.split(text), Target("tokens", target), prompts)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(method_spec.split(text)[0])


@pytest.mark.parametrize("text", ["token=4", "tokens", "tokens=many", "tokens=-1", "ms=nan", "tflops=inf"])
def test_unusable_targets(text):
    with pytest.raises(OptionError, match=r"target"):
        Target.parse(text)
