"""``visibench profile``: what it measures, how it compares, and what it says."""

import json
import re
import statistics
import subprocess
import sys
import warnings

import pytest
import torch
import visibench
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from visibench.cli import main
from visibench.errors import OptionError, VisibenchError
from visibench.evals.compute import profile as profiling
from visibench.evals.compute import timing
from visibench.evals.compute.profile import ProfileConfig, profile
from visibench.evals.settings.config import parse, variants
from visibench.evals.settings.include import read
from visibench.results.store.profiles import read as read_profile

pytestmark = pytest.mark.slow

# Installed with the package, but not needed here.
ABSENT = ["lmms_eval", "wandb", "datasets", "pandas", "pyarrow", "statsmodels", "matplotlib"]
THREADS = torch.get_num_threads() + 1
SMALL = {
    "model": "tiny",
    "weights": "random",
    "layers": 4,
    "device": "cpu",
    "methods": ["fastv:layer=1,keep=0.5", {"name": "visipruner", "shallow_layers": 1}],
    "lengths": [{"prompt": 10, "visual_tokens": 144, "new_tokens": 3}],
    "repeats": 3,
    "warmup": 1,
}


def config(**changes) -> ProfileConfig:
    return parse(ProfileConfig, SMALL | changes, "test")


@pytest.fixture(scope="module")
def result():
    methods = ["fastv:layer=1,keep=0.5", {"name": "visipruner", "shallow_layers": 1, "stages": ["middle"]}]
    methods[1] |= {"forced": True, "filter_layer": 3, "filter_tokens": 5}
    return profile(config(methods=methods, batch_sizes=[1, 2], threads=THREADS), Console(quiet=True))


# ---- what a row holds ------------------------------------------------------------------------------------------------


def test_dense_stands_first_at_every_setting(result):
    assert [(row.batch_size, row.options.get("forced")) for row in result.rows] == [
        (batch, forced) for batch in (1, 2) for forced in (None, None, True)
    ]
    assert [row.method for row in result.rows[:2]] == ["dense", "fastv:keep=0.5,layer=1"]
    for row in result.rows:
        assert {spread_count(row, phase) for phase in row.ms} == {3}
        assert set(row.ms) == set(timing.PHASES)


def spread_count(row, phase):
    return len(row.ms[phase].times)


def test_phases_add_up(result):
    for row in result.rows:
        for vision, prefill, decode, whole in zip(*(row.ms[phase].times for phase in timing.PHASES), strict=True):
            assert 0 < vision < prefill
            assert whole == pytest.approx(prefill + 2 * decode)


def test_summaries_are_those_of_the_times(result):
    for number, row in enumerate(result.rows):
        dense = result.rows[number // 3 * 3]
        for phase in ("prefill", "end_to_end"):
            ratios = [a / b for a, b in zip(dense.ms[phase].times, row.ms[phase].times, strict=True)]
            assert row.speedup[phase] == statistics.median(ratios)
        assert row.ms["prefill"].median == sorted(row.ms["prefill"].times)[1]
        assert row.ms["prefill"].min == min(row.ms["prefill"].times)
        assert row.realised == pytest.approx(row.speedup["prefill"] / row.promised)
        new = row.batch_size * 3
        assert row.tokens_per_second == pytest.approx(1e3 * new / row.ms["end_to_end"].median)
    assert [row.overhead_ms is None for row in result.rows] == [True, False, False] * 2
    assert [row.plain_ms is None for row in result.rows] == [True, False, False] * 2
    assert {len(row.plain_ms.times) for row in result.rows if row.plain_ms} == {3}
    assert all(row.overhead_ms.min > 0 for row in result.rows if row.overhead_ms)
    assert {len(row.overhead_ms.times) for row in result.rows if row.overhead_ms} == {3}


def test_tokens_and_cache_follow_the_plan(result):
    """tiny: 4 layers, 10 text and 144 visual tokens; keys and values of fp32 a token and layer: 2 · width · 4 bytes."""
    geometry = visibench.load_model("tiny", weights="meta", layers=4).geometry
    a_token = 2 * geometry.kv_heads * geometry.head_size * 4
    expected = {"dense": [144] * 4, "fastv": [144, 72, 72, 72], "visipruner": [144, 144, 144, 5]}
    for row in result.rows:
        counts = expected[row.method.partition(":")[0]]
        assert row.visual_tokens == counts
        assert row.kv_bytes == row.batch_size * a_token * sum(count + 10 for count in counts)
        assert row.peak_memory > result.weights_bytes + row.kv_bytes
        assert row.host_syncs is None


def test_threads_are_those_asked_for_and_come_back(result):
    assert result.environment.model["threads"] == THREADS != torch.get_num_threads()


def test_promise_is_that_of_an_independent_counter():
    """torch's counter of what it dispatched, on eager attention, whose products it sees."""
    model = visibench.load_model("tiny", weights="random", layers=4, device="cpu", attn_implementation="eager")
    inputs = model.synthetic_inputs(1, 10, 144)
    work = []
    for method in (visibench.load_method("none"), visibench.load_method("fastv", layer=1, keep=0.5)):
        with visibench.prune(model.model, method), FlopCounterMode(display=False) as counter:
            model.model(**inputs, logits_to_keep=1)
        # Some versions of transformers make the table of rotary angles by a product of two vectors.
        angles = sum(sum(n.values()) for name, n in counter.get_flop_counts().items() if name.endswith("rotary_emb"))
        work.append((counter.get_total_flops() - angles) / 2)
    rows = profile(config(methods=["fastv:layer=1,keep=0.5"], attention="eager", repeats=1), Console(quiet=True)).rows
    assert [row.executed_macs for row in rows] == work
    assert rows[1].promised == work[0] / work[1]


def test_text_alone_has_no_vision_phase_and_one_token_no_decoding():
    (dense, random) = profile(
        config(methods=["random:keep=0.5"], lengths=[{"prompt": 9, "visual_tokens": 0, "new_tokens": 1}], repeats=1),
        Console(quiet=True),
    ).rows
    assert set(dense.ms) == set(random.ms) == {"prefill", "end_to_end"}
    assert dense.executed_macs == random.executed_macs


def test_rounds_go_over_all_methods_and_start_with_another_each_time(monkeypatch):
    order, current = [], []
    monkeypatch.setattr(timing, "time_method", lambda *_: 1.0)
    monkeypatch.setattr(
        timing, "time_phases", lambda *_: order.append(current[-1]) or {"prefill": 1.0, "end_to_end": 1.0}
    )
    entered = profiling.Contender.under
    monkeypatch.setattr(
        profiling.Contender, "under", lambda self, loaded: current.append(self.label) or entered(self, loaded)
    )
    profile(config(methods=["none", "random:keep=0.5"], repeats=2, warmup=1), Console(quiet=True))
    first = ["dense", "none", "random:keep=0.5"]
    assert order == [*first, *first[1:], *first[:1], *first[2:], *first[:2]]


def test_waits_are_counted_by_torchs_warnings(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with profiling._host_syncs(torch.device("cuda")) as syncs:
        for message in ("called a synchronizing CUDA operation", "something else") * 2:
            warnings.warn(message, stacklevel=1)
        assert syncs() == 2
        warnings.warn("called a synchronizing CUDA operation (in x)", stacklevel=1)
        assert syncs() == 3
    assert modes == ["warn", "default"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_tells_memory_and_waits():
    dense, fastv = profile(config(device="cuda", methods=["fastv:layer=1,keep=0.5"]), Console(quiet=True)).rows
    assert dense.peak_memory > fastv.kv_bytes
    assert fastv.host_syncs[0] > dense.host_syncs[0]
    assert all(row.ms["vision"].median < row.ms["prefill"].median for row in (dense, fastv))


# ---- configurations and the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["profile_7b", "profile_cpu"])
def test_packaged_configurations_fit_their_models(name):
    settings = parse(ProfileConfig, read(name)[0], name)
    geometry = visibench.load_model(settings.model, weights="meta").geometry
    for variant in variants(settings, dense=False):
        variant.method.check(geometry)
    for lengths in settings.lengths:
        assert lengths.visual_tokens % geometry.vision.tokens == 0
    assert settings.repeats >= 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "meta"}, "meta cannot run"),
        ({"weights": "pretrained"}, "pretrained model cannot be cut"),
        ({"methods": ["fastv:keep=0.5,layer=7"]}, "model has 4 layers"),
        ({"methods": ["none"], "lengths": [{"visual_tokens": 100}]}, "multiple of that"),
        ({"lengths": [{"visual": 100}]}, "unknown key .*did you mean 'visual_tokens'"),
        ({"batch_size": 2}, "did you mean 'batch_sizes'"),
        ({"repeats": 0}, "repeats"),
    ],
)
def test_mistakes_show_before_anything_is_timed(changes, message, monkeypatch):
    monkeypatch.setattr(timing, "time_phases", lambda *_: pytest.fail("timed"))
    monkeypatch.setattr(profiling, "compare", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(VisibenchError, match=message) as caught:
        profile(config(**changes), Console(quiet=True))
    assert "\n" not in str(caught.value)


def test_lack_of_memory_is_one_line(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(timing, "time_phases", full)
    with pytest.raises(OptionError, match="batch 1 with 10 text and 144 visual tokens, 3 new ones does not fit"):
        profile(config(methods=["none"]), Console(quiet=True))


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["visibench", "profile", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    captured = capsys.readouterr()
    return stopped.value.code, captured.out, captured.err


ARGUMENTS = "--model tiny --weights random --layers 4 --device cpu --batch-sizes 1,2 --lengths 10/144/2".split()
ARGUMENTS += "--repeats 2 --warmup 0 --methods none --methods visipruner:shallow_layers=1".split()


def test_what_does_not_fit_in_memory_is_left_out_and_said(monkeypatch, capsys, tmp_path):
    real = timing.time_phases

    def full(loaded, inputs, *rest):
        if len(inputs["input_ids"]) > 1:
            raise torch.OutOfMemoryError
        return real(loaded, inputs, *rest)

    monkeypatch.setattr(timing, "time_phases", full)
    code, out, err = command(monkeypatch, capsys, *ARGUMENTS, "--json", "--out", str(tmp_path / "a.json"))
    assert code == 3
    assert "batch 2 with 10 text and 144 visual tokens, 2 new ones: left out" in err.splitlines()[-1]
    assert (tmp_path / "a.json").read_text().strip() == out.strip()
    assert {row["batch_size"] for row in json.loads(out)["rows"]} == {1}
    assert len(json.loads(out)["left_out"]) == 1


def test_ctrl_c_keeps_what_is_done_and_says_so(monkeypatch, capsys, tmp_path):
    real, file = timing.time_phases, tmp_path / "a.json"

    def stopped(loaded, inputs, *rest):
        if len(inputs["input_ids"]) > 1:
            raise KeyboardInterrupt
        return real(loaded, inputs, *rest)

    monkeypatch.setattr(timing, "time_phases", stopped)
    code, out, err = command(monkeypatch, capsys, *ARGUMENTS, "--out", str(file))
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == f"error: interrupted: {file} holds the 1 batch sizes and lengths that were done"
    assert {row.batch_size for row in read_profile(file).rows} == {1}
    assert "unfinished: 1 more batch sizes and lengths were to be measured" in read_profile(file).notes
    assert command(monkeypatch, capsys, *ARGUMENTS)[2].splitlines()[-1] == "error: interrupted: nothing is stored"


def test_memory_is_kept_by_the_process_and_given_back_where_it_ran_out(monkeypatch):
    called = []
    monkeypatch.setattr("visibench.evals.compute.profile.keep_freed_memory", lambda: called.append("kept"))
    monkeypatch.setattr("visibench.evals.compute.profile.release", lambda: called.append("released"))
    monkeypatch.setattr("visibench.evals.compute.profile.compare", lambda *_: called.append("measured"))
    with pytest.raises(OptionError, match="does not fit"):
        profile(config(methods=["none"]), Console(quiet=True))
    assert called == ["kept", "measured", "released"]


def test_overhead_is_measured_as_often_as_asked_for():
    few = profile(config(methods=["fastv:layer=1,keep=0.5"], repeats=5, overhead_every=2), Console(quiet=True))
    assert [row.overhead_ms and len(row.overhead_ms.times) for row in few.rows] == [None, 3]


def test_command_prints_json_and_keeps_it(monkeypatch, capsys, tmp_path):
    code, out, _ = command(monkeypatch, capsys, *ARGUMENTS, "--json", "--out", str(tmp_path / "profile.json"))
    assert code == 0
    assert json.loads(out) == json.loads((tmp_path / "profile.json").read_text())
    content = json.loads(out)
    assert [(row["method"], row["batch_size"]) for row in content["rows"]] == [
        (name, batch) for batch in (1, 2) for name in ("dense", "none", "visipruner:shallow_layers=1")
    ]
    assert content["environment"]["model"]["weights"] == "random"
    assert content["environment"]["model"]["attention"] == "sdpa"
    assert set(content["environment"]["versions"]) >= {"torch", "transformers", "visibench"}


def test_command_prints_a_table_with_what_belongs_to_it(monkeypatch, capsys):
    code, out, err = command(monkeypatch, capsys, *ARGUMENTS)
    assert code == 0, err
    for part in ("batch 2: 10 text and 144 visual tokens, 2 new ones", "median ± interquartile", "sdpa", "n/a"):
        assert part in out
    assert "(2 prefills of their own)" in " ".join(out.split())
    assert re.search(r"\d% ±\d+%", out), "what is realised has its spread"
    assert "on random inputs says nothing" in " ".join(out.split())


def test_forced_is_said(monkeypatch, capsys, tmp_path):
    file = tmp_path / "mine.yaml"
    methods = [{"name": "visipruner", "shallow_layers": 1, "stages": ["middle"], "forced": True, "filter_layer": 3}]
    file.write_text(json.dumps(SMALL | {"methods": methods}))
    code, out, err = command(monkeypatch, capsys, str(file), "--repeats", "1", "--warmup", "0")
    assert code == 0, err
    assert "was forced, not found by its rule" in " ".join(out.split())
    assert "of 1 round over" in " ".join(out.split())
    assert "±0" not in out, "one time has no spread"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "tiny"), "give a configuration such as profile_cpu, or --model and --methods"),
        ((*ARGUMENTS, "--lengths", "10/144"), "expected PROMPT/VISUAL/NEW"),
        ((*ARGUMENTS, "--batch-sizes", "two"), "--batch-sizes: expected a number, not 'two'"),
        ((*ARGUMENTS, "--batch-sizes", "1,1"), "one stands there twice"),
        ((*ARGUMENTS, "--lengths", "10/144/2,10/144/2"), "one stands there twice"),
        ((*ARGUMENTS, "--attention", "flex_attention"), "cannot be observed"),
        ((*ARGUMENTS, "--attention", "paged|sdpa"), "'paged|sdpa' cannot be observed; Known: eager"),
        (("profil_cpu",), "did you mean 'profile_cpu'"),
        (("quick",), "unknown key"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(monkeypatch, capsys, arguments, message):
    code, out, err = command(monkeypatch, capsys, *arguments)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert message in err


def test_it_needs_neither_the_harness_nor_data_sets_nor_tables():
    code = f"""
import sys
for name in {ABSENT!r}:
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
sys.argv = ["visibench", "profile", *{ARGUMENTS!r}, "--json"]
from visibench.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["rows"]
