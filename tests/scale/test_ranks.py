"""Ranks, as ``torchrun`` starts them, are for lmms-eval's command line; ``visibench`` itself names its own ways."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import visibench
from visibench import cli
from visibench.errors import OptionError
from visibench.evals.answers.score import evaluate
from visibench.evals.settings.method_spec import parse
from visibench.evals.tasks.tasks import load_tasks
from visibench.utils import machine

ROOT = Path(visibench.__file__).parent


@pytest.mark.parametrize(
    ("command", "ranks", "message"),
    [
        (["check", "runs/x"], "2", "started on 2 ranks"),
        (["sweep", "quick"], "2", "started on 2 ranks, each of which would do the same: start one process, which"),
        (["sweep", "quick"], "3", "--workers or --executor ray"),
        (["run", "--model", "tiny", "--method", "none", "--tasks", "pope"], "2", "lmms-eval's --model visibench"),
        (["sweep", "quick"], "two", "WORLD_SIZE=two is no number"),
    ],
)
def test_commands_are_refused_on_several_ranks(command, ranks, message, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", ranks)
    monkeypatch.setattr(sys, "argv", ["visibench", *command])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_evaluate_refuses_several_ranks(loaded, disk_data, monkeypatch):
    """lmms-eval would hand the first of them a part of the answers."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert machine.ranks() == 2
    with pytest.raises(OptionError, match="2 ranks"):
        evaluate(loaded, parse("none"), load_tasks(["pope"], str(disk_data))[0])


@pytest.mark.slow
def test_torchrun_is_refused_before_anything_ran(tmp_path):
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "visibench"]
    arguments = ["run", "--model", "tiny", "--method", "fastv:keep=0.25", "--tasks", "pope", "--out", "two"]
    environment = os.environ | {"PYTHONPATH": str(ROOT.parent)}
    done = subprocess.run(
        [sys.executable, *start, *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode != 0
    assert "error: started on 2 ranks" in done.stderr
    assert not list(tmp_path.iterdir())
