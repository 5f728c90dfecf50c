"""``visibench budget``: what it prints, and what it refuses."""

import json
import sys

import pytest
import torch
from budgeting import TURNED, Clock
from visibench.cli import main
from visibench.evals.compute import budget, prefills
from visibench.evals.settings import method_spec
from visibench.evals.tasks.tasks import load_tasks


@pytest.fixture
def call(monkeypatch, capsys, checkpoint, disk_data):
    def run(*arguments):
        command = ["visibench", "budget", "--model", str(checkpoint), "--data", str(disk_data)]
        monkeypatch.setattr(sys, "argv", [*command, "--samples", "3", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return stopped.value.code, captured.out, captured.err

    return run


def test_command_gives_what_run_takes(call, loaded, disk_data):
    methods = "fastv:layer=3,positions=keep,divprune,pyramiddrop:layers=scaled"
    code, out, _ = call("--target", "tokens=8", "--methods", methods, "--methods", "tome,pyramiddrop", "--json")
    result = json.loads(out)
    assert code == 0
    assert (result["prompts"]["first"], result["prompts"]["of"]) == (3, 8)
    assert result["dense"]["tokens"] == 16
    assert result["target"] == {"tokens": 8}
    assert [one["method"] for one in result["solved"]] == ["fastv", "divprune", "pyramiddrop", "tome"]
    (refused,) = result["refused"]
    assert refused["method"] == "pyramiddrop"
    assert "layers='scaled'" in refused["reason"]
    (task,) = load_tasks(["gqa"], str(disk_data))
    for one in result["solved"]:
        frame = prefills.prefills(loaded, method_spec.parse(one["spec"]), prefills.prompts(loaded, task, 3))
        counts = torch.tensor(frame["visual_tokens"].tolist()).double()
        assert one["achieved"]["tokens"] == pytest.approx(float(counts.mean()))
        assert one["achieved"]["per_layer"] == pytest.approx(counts.mean(0).tolist())
        assert one["achieved"]["tflops"] == pytest.approx(frame["executed"].mean() * 1e-12)


def test_command_solves_every_method_unless_told_otherwise(call):
    code, out, _ = call("--target", "tokens=8")
    assert code == 0
    shown = [line.split()[-1].partition(":")[0] for line in out.splitlines() if line.strip().startswith("T=8 ")]
    assert shown == [cls.name for cls in TURNED]
    assert "Not possible" not in out
    assert "first 3 of 8 prompts of gqa" in out


def test_command_says_what_is_not_possible(call):
    code, out, _ = call("--target", "tokens=2", "--methods", "fastv:layer=2,divprune")
    assert code == 0
    assert "fastv: T=2 is out of reach: tokens gives T=3.2 to T=16" in out.partition("Not possible:")[2]
    assert "off the target" not in out


def test_command_names_what_is_far_off_the_target(call):
    code, out, _ = call("--target", "tokens=1.4", "--methods", "divprune")  # whole tokens: 1 is nearest
    assert code == 0
    assert "More than 10% off the target, the knob being coarse or the time noisy: divprune:tokens=1." in out


def test_command_shows_times_with_their_spread(call, prompts, monkeypatch):
    monkeypatch.setattr(budget, "time_prefill", Clock(prompts, 0.5))
    code, out, _ = call("--target", "ms=18", "--methods", "divprune")
    assert code == 0
    assert "18 ± 0.5 ms" in out
    assert "26 ± 0.5 ms" in out  # dense
    assert "noise" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--target", "tokens=1", "--methods", "fastv:layer=2"], "T=1 is out of reach"),
        (["--target", "tokens=8", "--methods", "fastv:keep=0.5"], "keep given"),
        (["--target", "tokens=8", "--methods", "fastvv"], "did you mean 'fastv'"),
        (["--target", "tokens=8", "--methods", "divprune", "--task", "popr"], "did you mean 'pope'"),
        (["--target", "token=8"], "did you mean 'tokens'"),
        (["--target", "8"], "tokens=NUMBER"),
    ],
)
def test_bad_input_is_one_line(arguments, says, call):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert says in err
    assert "error: " in err


def test_all_reasons_are_shown_where_nothing_is_possible(call):
    code, out, err = call("--target", "tokens=1", "--methods", "fastv:layer=2,random:layer=5")
    assert code == 2
    assert out.count("T=1 is out of reach") == 2
    assert "all 2 methods" in err
