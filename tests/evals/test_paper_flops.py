"""Figures in print: each from its formula, each formula from a counter, and plans against prefills that really ran."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import visibench
from support import IMAGE, collate, make_batch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlamaModel, LlavaConfig, LlavaForConditionalGeneration
from visibench.cli import main
from visibench.commands.flops import published_markdown, reproductions
from visibench.evals.compute import flops, paper_flops
from visibench.evals.compute.paper_flops import FORMULAS, UNITS, Work, claims, reproduce, sizes
from visibench.evals.settings.method_spec import parse

ROOT = Path(visibench.__file__).parent
CLAIMS = claims()


def plan(*runs, rows=1):
    """(layers, tokens) … → (rows, all layers)."""
    return np.tile(np.concatenate([np.full(layers, float(n)) for layers, n in runs]), (rows, 1))


# ---- print ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: f"{c.paper}-{c.where}-{c.setting}-{c.printed}")
def test_printed_figure_follows_from_its_formula(claim):
    """Within the rounding of print; the few that do not are told apart, and stay so."""
    assert reproduce(claim).agreement == claim.agrees


def test_most_printed_figures_are_reproduced():
    differing = [(claim.paper, claim.printed) for claim in CLAIMS if claim.agrees == "differs"]
    assert differing == [
        ("FastV", "54.6"),
        ("FastV", "32.8"),
        ("SparseVLM", "2.14"),
        ("SparseVLM", "1.72"),
        ("SparseVLM", "1.30"),
        ("VisiPruner", "53.9"),
        ("VisiPruner", "62.8"),
        ("VisiPruner", "98.3"),
    ]
    assert [(c.paper, c.printed) for c in CLAIMS if c.agrees == "cut"] == [
        ("VisiPruner", "1.76"),
        ("VisiPruner", "99.9"),
    ]


@pytest.mark.parametrize(
    ("formula", "text", "runs", "tera"),
    [
        ("visual", 0, [(32, 576)], 3.817),
        ("visual", 0, [(8, 576), (8, 288), (8, 144), (8, 72)], 1.777),
        ("visual", 0, [(2, 576), (30, 288)], 2.007),
        ("visual", 0, [(2, 576), (30, 144)], 1.118),
        ("visual", 0, [(3, 576), (29, 144)], 1.208),
        ("visual", 0, [(32, 192)], 1.253),
        ("visual", 0, [(32, 128)], 0.833),
        ("visual", 0, [(32, 64)], 0.416),
        ("sequence", 118, [(32, 576)], 4.621),
        ("fastv", 36, [(32, 576)], 32 * 0.0993275),
        ("visipruner", 0, [(15, 576), (9, 10.3), (8, 0)], 1.767),
        ("visipruner", 0, [(12, 576), (12, 10.3), (8, 0)], 1.424),
        ("visipruner", 0, [(9, 576), (15, 10.3), (8, 0)], 1.080),
        ("visipruner", 0, [(32, 576)], 3.817),
    ],
)
def test_closed_forms_of_settings_on_llava_7b(formula, text, runs, tera):
    macs = FORMULAS[formula].macs(plan(*runs), sizes("llava-1.5-7b"), text)
    assert f"{macs[0] * 1e-12:.3f}" == f"{tera:.3f}"


def test_visipruner_attention_reduction():
    """Appendix M for 10.3 tokens in 10 to 15 layers, 74 text tokens, by hand."""
    geometry = sizes("llava-1.5-7b")
    macs = FORMULAS["visipruner attention"].macs
    dense = macs(plan((32, 576)), geometry, 74)[0]
    assert dense == 32 * 2 * (576**2 * 4096 + 576 * 74 * 4096)
    for layers in (10, 15):
        kept = macs(plan((24 - layers, 576), (layers, 10.3), (8, 0)), geometry, 74)[0]
        assert kept == pytest.approx(layers * (2 * 10.3**2 * 4096 + 10.3 * 74 * 4096))
        assert 0.9993 < 1 - kept / dense < 0.9997


def test_what_the_notes_say():
    geometry, seven = sizes("llava-1.5-7b"), "llava-1.5-7b"
    fitting = []
    for text in range(50, 80):
        dense, vtw = (
            FORMULAS["shortv"].macs(p, sizes(seven), text)[0] * 1e-12
            for p in (plan((32, 576)), plan((16, 576), (16, 0)))
        )
        fitting += [text] if (f"{dense:.1f}", f"{vtw:.1f}") == ("8.5", "4.7") else []
    assert fitting == list(range(63, 68))
    lengths = [n for n in range(600, 800) if f"{paper_flops.paper(plan((32, n)), geometry)[0] * 1e-12:.2f}" == "4.62"]
    assert 694 in lengths
    assert max(lengths) - min(lengths) <= 2
    front = FORMULAS["fastv"].macs(plan((2, 576), (30, 287)), geometry, 36)[0]  # 287 + 36 = 288 + 35
    assert f"{front / 32 * 1e-9:.1f}" == "54.6"
    dense = FORMULAS["mean attention"].macs(plan((32, 576)), geometry, 74)
    kept = [FORMULAS["mean attention"].macs(plan((32, n)), geometry, 74) for n in range(577)]
    assert [n for n in range(577) if f"{100 * (1 - kept[n][0] / dense[0]):.1f}" == "98.3"] == [50, 51]


# ---- formulas -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [[(6, 9)], [(2, 9), (1, 5), (3, 1)]], ids=str)
def test_paper_convention_is_what_a_decoder_of_visual_tokens_alone_computes(cuts):
    """torch counts a decoder layer by layer, each on as many tokens as the plan says."""
    config = LlamaConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4
    )
    config._attn_implementation = "eager"
    model = LlamaModel(config)
    with FlopCounterMode(display=False) as counter:
        for layers, tokens in cuts:
            for _ in range(layers):
                model(inputs_embeds=torch.randn(1, tokens, 48), use_cache=False)
    geometry = paper_flops.Geometry(6, 48, 4, 4, 12, 80, 32000)
    assert paper_flops.paper(plan(*cuts), geometry)[0] == counter.get_total_flops() / 2


def test_formulas_count_each_sample_of_a_measured_trace(llava):
    """Three rows that filter at different layers or hold no image; text is all that is not visual."""
    method = visibench.load_method("visipruner", shallow_layers=2, layer_threshold=0.9, token_threshold=3.0)
    samples = make_batch([(5, 9, 1), (3, 12, 2), (4, 6, 0)])
    with visibench.prune(llava, method) as session:
        llava(**collate(samples))
        trace, geometry = session.trace, session.geometry
    counts = trace.visual_counts().numpy()
    assert len({tuple(row) for row in counts}) == 3
    for name, formula in FORMULAS.items():
        found = paper_flops.by_formula(trace, geometry, name)
        text = [14, 16, 10]
        assert found.shape == (3,)
        for row in range(3):
            assert found[row] == formula.macs(counts[row : row + 1].astype(float), geometry, text[row])[0]
    d, m = 48, 64
    by_hand = [sum(int(n) * (4 * d * d + 2 * int(n) * d + 3 * d * m) for n in row) for row in counts]
    assert paper_flops.by_formula(trace, geometry).tolist() == by_hand


# ---- plans ----------------------------------------------------------------------------------------------------------

PREFIX, TEXT, PATCHES = paper_flops.PREFIX, paper_flops.QUESTION, 576


@pytest.fixture(scope="module")
def deep_llava():
    """32 decoder layers and 576 patches of LLaVA-1.5, but narrow, with grouped heads."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=336, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.25,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=PATCHES)
    return LlavaForConditionalGeneration(config).eval()


def prefill(model, method):
    words = torch.randint(3, 60, (1, PREFIX + TEXT), generator=torch.Generator().manual_seed(1))
    ids = torch.cat([words[:, :PREFIX], torch.full((1, PATCHES), IMAGE), words[:, PREFIX:]], dim=1)
    with visibench.prune(model, method) as session:
        model(input_ids=ids, pixel_values=torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(2)))
    return session


def assert_same_compute(session, tokens, work):
    trace = paper_flops.planned(tokens, PATCHES, work, session.geometry)
    planned, ran = (flops.executed(t, session.geometry) for t in (trace, session.trace))
    assert planned.components() == ran.components()


FIXED = {claim.method: claim for claim in CLAIMS if claim.executed is not None and claim.method != "visipruner"}
FIXED = {spec: claim for spec, claim in FIXED.items() if claim.model == "llava-1.5-7b" and claim.paper != "TransPrune"}


@pytest.mark.parametrize("spec", FIXED)
def test_planned_compute_is_that_of_the_method_itself(spec, deep_llava):
    claim = FIXED[spec]
    session = prefill(deep_llava, parse(spec))
    assert session.trace.visual_counts()[0].tolist() == claim.plan.tolist()
    assert_same_compute(session, torch.from_numpy(claim.plan[None]).long(), claim.executed)


def test_planned_compute_of_visipruner(deep_llava):
    """It finds its own layers and tokens on this model; they become the plan."""
    shallow = parse("visipruner").shallow_layers
    measured = lambda counts: tuple(layer for layer in range(shallow + 1, 32) if counts[layer] > 0)  # noqa: E731
    found = [claim for claim in CLAIMS if claim.method == "visipruner"]
    assert all(claim.executed.contributions == measured(claim.plan) for claim in found)
    (work,) = {claim.executed for claim in found}
    session = prefill(deep_llava, parse("visipruner:token_threshold=0.5"))
    counts = session.trace.visual_counts()[0].tolist()
    assert counts[shallow] == PATCHES
    assert any(0 < n < PATCHES for n in counts)
    assert counts[-1] == 0
    assert_same_compute(session, torch.tensor([counts]), work.model_copy(update={"contributions": measured(counts)}))


def test_fractions_of_tokens_are_shares_of_ten_prompts():
    geometry = sizes("llava-1.5-7b")
    tokens = plan((15, 576), (9, 10.3), (8, 0))
    ran = paper_flops.run(tokens, 576, Work(), geometry)
    per_token = 3 * 4096 * 11008
    assert ran.ffn.mean() == pytest.approx((tokens.sum() + 32 * 60) * per_token)
    assert len(set(ran.ffn.tolist())) == 2


def test_dense_executed_compute_by_hand():
    """LLaVA-1.5-7B on 35 + 576 + 25 tokens: CLIP's 24 blocks on 577, two projector matrices, 32 layers, one logit."""
    d, m, n = 4096, 11008, 636
    tower = 576 * 588 * 1024 + 24 * (4 * 577 * 1024**2 + 2 * 577**2 * 1024 + 2 * 577 * 1024 * 4096)
    total = tower + 576 * (1024 * d + d * d) + 32 * (4 * n * d * d + 2 * n * n * d + 3 * n * d * m) + d * 32064
    (dense,) = [c for c in CLAIMS if c.printed == "3.82"]
    assert reproduce(dense).executed == pytest.approx(total * 1e-12, rel=1e-12)


# ---- command and pages ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found():
    return reproductions()


def test_page_holds_the_table(found):
    """If this fails: put the output of ``visibench flops --published --markdown`` into docs/flops.md."""
    assert published_markdown(found) in (ROOT / "docs" / "flops.md").read_text()


def test_page_says_what_the_code_gives():
    """The breakdown of VisiPruner's figure in docs/flops.md, in GFLOPs."""
    page = (ROOT / "docs" / "flops.md").read_text()
    geometry = sizes("llava-1.5-7b")
    (claim,) = [c for c in CLAIMS if c.printed == "1.76"]
    n, d, m = claim.plan, 4096, 11008
    rows = [plan(*claim.tokens), plan((32, 576))]
    whole, bare, dense = (
        {name: float(np.mean(values)) * 1e-9 for name, values in flops_of.components().items()}
        for flops_of in (
            paper_flops.run(rows[0], 576, claim.executed, geometry),
            paper_flops.run(rows[0], 576, Work(), geometry),
            paper_flops.run(rows[1], 576, Work(), geometry),
        )
    )
    free = 15 * 2 * 576**2 * d * 1e-9
    printed = reproduce(claim).recomputed * 1e3
    text = 32 * 60 * (4 * d * d + 3 * d * m) * 1e-9 + bare["attention"] - (2 * n**2 * d).sum() * 1e-9
    edits = whole["attention"] - bare["attention"]
    fixed = whole["vision_tower"] + whole["projector"] + whole["lm_head"]
    parts = [printed, free, text, edits, whole["scoring"], fixed]
    assert sum(parts) == pytest.approx(sum(whole.values()), rel=1e-4)
    for value in (*parts[:4], fixed, sum(whole.values()), sum(dense.values())):
        assert f"| {value:.1f} |" in page
    assert f"| {whole['scoring']:.2f} |" in page
    assert f"So {100 * (1 - sum(whole.values()) / sum(dense.values())):.1f} %" in page
    ahead = next(c for c in CLAIMS if c.method == "pyramiddrop")
    scoring = paper_flops.run(plan(*ahead.tokens), 576, ahead.executed, geometry).scoring.mean() * 1e-9
    assert f"that: {scoring:.1f} GFLOPs" in page


def test_every_entry_is_known():
    for claim in CLAIMS:
        assert claim.formula in FORMULAS
        assert claim.unit in UNITS
        assert paper_flops.arxiv(claim.paper)
        assert len(claim.plan) == sizes(claim.model).layers
        assert claim.plan.max() <= claim.prompt
        parse(claim.method)


@pytest.fixture
def call(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["visibench", "flops", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return stopped.value.code, captured.out, captured.err

    return run


def test_published(call, found):
    code, out, _ = call("--published")
    assert code == 0
    assert "1.78 TFLOPs" in out
    lines = " ".join(out.split())
    assert all(" ".join(one.claim.note.split()) in lines for one in found)
    code, out, _ = call("--published", "--json")
    rows = json.loads(out)
    assert code == 0
    assert [row["recomputed"] for row in rows] == [one.recomputed for one in found]
    assert rows[0]["arxiv"] == "2410.17247"
    assert call("--published", "--markdown")[1].strip() == published_markdown(found)


def test_measured_prompts(call, checkpoint, disk_data):
    arguments = ["--model", checkpoint, "--data", disk_data, "--method", "fastv:tokens=4", "--limit", 3]
    code, out, _ = call(*arguments, "--json")
    result = json.loads(out)
    assert code == 0
    assert result["prompts"] == 3
    assert result["mean_per_layer"]["visual_tokens"] == [16, 16] + [4] * 8
    macs = {name: one["mean"] for name, one in result["macs"].items()}
    parts = [macs[name] for name in paper_flops.PREFILL]
    assert macs["executed"] == pytest.approx(sum(parts))
    loaded = visibench.load_model(str(checkpoint))
    assert macs["paper"] == paper_flops.paper(plan((2, 16), (8, 4)), loaded.geometry)[0]
    code, out, _ = call(*arguments)
    assert code == 0
    assert "first 3 of 8 prompts of pope" in out
    assert "Visual tokens at each layer's input, mean: 16 16 4 4" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--published"),
        (["--model", "tiny"], "--method"),
        (["--published", "--model", "tiny"], "leave them out"),
        (["--published", "--limit", 3], "leave them out"),
        (["--published", "--markdown", "--json"], "exclude"),
        (["--model", "tiny", "--method", "none", "--markdown"], "--published"),
        (["--model", "tiny", "--method", "fastvv:keep=0.5"], "did you mean 'fastv'"),
        (["--model", "tiny", "--method", "none", "--task", "popr"], "did you mean 'pope'"),
    ],
)
def test_bad_input_is_one_line(arguments, says, call):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err
