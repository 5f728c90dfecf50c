"""Compute from sizes alone, on random weights, and on a task: plans equal runs, and the command says which it was."""

import json

import pandas as pd
import pytest
import torch
import visibench
from visibench.cli import main
from visibench.errors import InputError, OptionError
from visibench.evals.compute import prefills
from visibench.evals.compute.memory import peak_memory
from visibench.evals.settings import method_spec
from visibench.methods import list_methods

EXAMPLES = [method_spec.spell(cls, options) for cls in list_methods().values() for options in cls.examples[:1]]
EDITED = ("attention",)  # with the method's own work in it where it edits attention


@pytest.fixture(scope="module")
def random_tiny():
    return visibench.load_model("tiny", weights="random", layers=8, device="cpu")


@pytest.mark.parametrize("text", EXAMPLES)
def test_a_plan_equals_the_prefill_that_runs_less_what_the_method_computes(random_tiny, text):
    method = method_spec.parse(text)
    if method.adaptive or method.name == "flowcut":  # its entropies say when tokens leave, not how many
        with pytest.raises(OptionError, match="--weights random"):
            prefills.planned(random_tiny, method, 20, 288)
        return
    planned = prefills.planned(random_tiny, method, 20, 288)
    ran = prefills.prefills(random_tiny, method, [random_tiny.synthetic_inputs(1, 20, 288)])
    differ = [name for name in ran if ran[name].tolist() != planned[name].tolist()]
    assert set(differ) <= {"scoring", "executed", *(EDITED if "attention" in method.hook_points else ())}
    extra = ran["scoring"] + ran["attention"] - planned["attention"]
    assert (ran["executed"] - planned["executed"]).tolist() == pytest.approx(extra.tolist())


@pytest.mark.parametrize(
    ("model", "visual", "message"),
    [("tiny", 100, "multiple"), ("llava-next-7b", 2880, "choose one of 1752, 1776, 2328, 2376, 2928")],
)
def test_a_plan_needs_images_that_the_model_has(model, visual, message):
    loaded = visibench.load_model(model, weights="meta")
    with pytest.raises(InputError, match=message):
        prefills.planned(loaded, visibench.load_method("none"), 20, visual)


def test_a_plan_is_made_for_nothing_that_cannot_run():
    loaded = visibench.load_model("qwen2.5-vl-7b", weights="meta", layers=2)
    with pytest.raises(OptionError, match="flowcut: scores patches by the attention of the CLS token"):
        prefills.planned(loaded, visibench.load_method("flowcut", tokens=96), 20, 576)


def test_a_budget_names_what_the_architecture_cannot_do(command):
    """And solves the others: one method that acts inside the tower stops none of them."""
    ours = "budget --target tokens=300 --model qwen2.5-vl-7b --weights meta --layers 4 --lengths 20/576".split()
    code, out, _ = command(*ours, "--json")
    found = json.loads(out)
    refused = {one["method"]: one["reason"] for one in found["refused"]}
    assert code == 0
    assert {"downsample", "fastv", "random", "vtw"} <= {one["method"] for one in found["solved"]}
    assert "vision tower has none" in refused["flowcut"]


def test_a_method_of_both_sides_spends_its_budget_on_each_tile(command):
    """Of 5 tiles each 144 in as many windows and 144 others; the cut leaves a third of the whole."""
    ours = "flops --model llava-next-7b --method vscan:tokens=288,window=2 --weights meta --lengths 20/2928".split()
    code, out, _ = command(*ours, "--json")
    assert code == 0
    assert json.loads(out)["mean_per_layer"]["visual_tokens"] == [1440.0] * 16 + [480.0] * 16


@pytest.fixture
def command(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["visibench", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return stopped.value.code, captured.out, captured.err

    return call


def test_published_sizes_need_no_weights(command):
    """FastV prints 2.007 TFLOPs for K = 2, R = 50 % (its table 1), by the convention of papers."""
    ours = ("flops", "--model", "llava-1.5-7b", "--method", "fastv:keep=0.5", "--weights", "meta")
    code, out, _ = command(*ours, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["macs"]["paper"]["mean"] == pytest.approx(2.007e12, rel=1e-3)
    assert not {"scoring", "executed"} & set(found["macs"]), "nothing ran"
    assert found["macs"]["planned"]["mean"] > found["macs"]["paper"]["mean"]
    assert "not counted" in found["note"]
    code, out, _ = command(*ours, "--layers", "4", "--lengths", "10/576")
    assert code == 0
    assert "4 decoder layers, meta weights, one prefill of 10 text and 576 visual tokens" in out
    assert "Nothing ran" in out
    assert "±" not in out, "one prompt has no spread"


def test_commands_on_random_weights(command):
    sized = "--model tiny --weights random --layers 6 --lengths 12/144".split()
    code, out, _ = command("flops", "--method", "fastv:layer=1,keep=0.5", *sized, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["mean_per_layer"]["visual_tokens"] == [144, 72, 72, 72, 72, 72]
    assert found["macs"]["scoring"]["mean"] > 0
    code, out, _ = command("budget", "--target", "tokens=84", "--methods", "fastv:layer=1", *sized, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["solved"][0]["options"]["tokens"] == 72
    assert found["prompts"] == {"weights": "random", "layers": 6, "text_tokens": 12, "visual_tokens": 144}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("flops --model tiny --method none --weights meta --limit 3", "--lengths, not --task"),
        ("flops --model tiny --method none --layers 3", "belong to --weights"),
        ("flops --model tiny --method none --weights meta --lengths 64", "TEXT/VISUAL"),
        ("flops --model tiny --method none --weights meta --lengths 1/144", "need batch >= 1, prompt >= 2"),
        ("budget --model tiny --target tokens=48 --weights meta --batch-size 4", "or --batch-size"),
        ("flops --model tiny --method none --weights meta --lengths 64/x", "expected a number, not 'x'"),
        ("flops --model tiny --method none --weights heavy", "unknown weights 'heavy'"),
        ("flops --model tiny --method visipruner:layers=scaled --weights meta --lengths 9/144", "--weights random"),
        ("flops --published --weights meta", "--published takes no other option"),
        ("budget --model tiny --target tokens=9 --lengths 9/144", "belong to --weights random"),
        ("budget --model tiny --target ms=9 --weights meta --lengths 9/144", "for a time give --weights random"),
        (
            "budget --model tiny --target tokens=9 --weights meta --lengths 9/100",
            "100 visual tokens are no whole images of 144",
        ),
        ("budget --model tiny --target tokens=9 --weights random --task gqa", "--lengths, not --task"),
        ("profile --model tiny --methods none --out /nonexistent/x.json", "cannot write to /nonexistent/x.json"),
    ],
)
def test_mistakes_are_one_line(command, arguments, message):
    code, out, err = command(*arguments.split())
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert message in err


def test_peak_memory_of_known_allocations():
    """Of 4 MB and then 2 + 8 MB at once, beside 100 bytes that are held throughout, the second is the peak."""
    with peak_memory(torch.device("cpu"), held=100) as peak:
        first = torch.empty(1_000_000)
        del first
        second, third = torch.empty(500_000), torch.empty(2_000_000)
        del second, third
        torch.empty(1_000_000)
    assert peak() == 100 + 10_000_000


def test_columns_of_a_plan_are_those_of_a_run(random_tiny):
    planned = prefills.planned(random_tiny, visibench.load_method("none"), 20, 144)
    ran = prefills.prefills(random_tiny, visibench.load_method("none"), [random_tiny.synthetic_inputs(1, 20, 144)])
    pd.testing.assert_frame_equal(planned, ran)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["llava-next-13b", "qwen2.5-vl-7b", "internvl3-8b", "smolvlm-2b"])
def test_every_method_has_its_compute_or_the_reason_why_not(model, command):
    """Without --method; and each figure is the one that the method alone has."""
    code, out, _ = command("flops", "--model", model, "--weights", "meta", "--json")
    found = json.loads(out)
    listed = {one["method"].partition(":")[0]: one for one in found["methods"]}
    assert code == 0
    assert listed.keys() | found["refused"].keys() == set(list_methods())
    assert not listed.keys() & found["refused"].keys()
    assert {"none", "fastv", "divprune", "pyramiddrop"} <= listed.keys()
    one = listed["divprune"]
    alone = json.loads(command("flops", "--model", model, "--weights", "meta", "--method", one["method"], "--json")[1])
    assert one["macs"] == alone["macs"]["planned"]["mean"] < listed["none"]["macs"]
