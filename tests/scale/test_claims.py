"""Processes that share a folder: each takes cells that nobody else works on."""

import os
import subprocess
import sys
import time

import pytest
import visibench
from rich.console import Console
from storing import config
from visibench.errors import IncompleteError
from visibench.evals.answers.cell_spec import CellSpec
from visibench.evals.sweeps.claims import claimed
from visibench.evals.sweeps.config import parse_config
from visibench.evals.sweeps.sweep import sweep
from visibench.results.store.store import Store


def test_cells_of_others_come_last_and_only_when_they_let_go(tmp_path):
    store, said, checks = Store(tmp_path), [], []
    dense = visibench.load_method("none")
    plans = [CellSpec(config("none", seed=seed), dense) for seed in range(3)]
    code = "import sys; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); "
    code += "print('held', flush=True); sys.stdin.read()"
    path = store.path(plans[0].config)
    path.mkdir(parents=True)
    command = [sys.executable, "-c", code, str(path / "lock")]
    held = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert held.stdout.readline() == b"held\n"

    def check():
        checks.append(1)
        if said:
            held.kill()  # a crash, not a release

    seeds = [plan.config.seed for plan in claimed(plans, store, said.append, check)]
    held.wait()
    assert seeds == [1, 2, 0]
    assert said == [f"Waiting for 1 cells of {tmp_path} that another process works on."]


def test_failures_are_tried_again_whatever_their_date(checkpoint, disk_data, tmp_path, monkeypatch):
    """A clock that was set back leaves files dated ahead."""
    settings = {"model": str(checkpoint), "data": str(disk_data), "tasks": ["pope"], "limit": 2, "timing": None}
    content = parse_config(settings | {"methods": ["fastv:keep=0.5"]}, "test")
    with monkeypatch.context() as broken, pytest.raises(IncompleteError):
        broken.setattr(type(visibench.load_method("fastv", keep=0.5)), "begin", lambda *given: 1 / 0)
        sweep(content, tmp_path, Console(quiet=True))
    (failures,) = tmp_path.glob("cells/*/failures.jsonl")
    os.utime(failures, (time.time() + 1e6,) * 2)
    assert len(sweep(content, tmp_path, Console(quiet=True))) == 2
    assert not failures.exists()
