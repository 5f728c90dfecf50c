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
from visibench.results.store import store as stores
from visibench.results.store.store import Store


def test_cells_of_others_come_last_and_only_when_they_let_go(tmp_path):
    store, said, checks = Store(tmp_path), [], []
    dense = visibench.load_method("none")
    plans = [CellSpec(config("none", seed=seed), dense) for seed in range(3)]
    code = "import sys; from filelock import SoftFileLease; lock = SoftFileLease(sys.argv[1], lease_duration=60); "
    code += "lock.acquire(); print('held', flush=True); sys.stdin.read()"
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
    with monkeypatch.context() as broken:
        broken.setattr(type(visibench.load_method("fastv", keep=0.5)), "begin", lambda *given: 1 / 0)
        with pytest.raises(IncompleteError):
            sweep(content, tmp_path, Console(quiet=True))
    (failures,) = tmp_path.glob("cells/*/failures.jsonl")
    os.utime(failures, (time.time() + 1e6,) * 2)
    assert len(sweep(content, tmp_path, Console(quiet=True))) == 2
    assert not failures.exists()


HOLD = """
import sys, socket
from pathlib import Path
socket.gethostname = lambda: "another-machine"
import fcntl
fcntl.flock = None  # not there: no claim may depend on it
from storing import config
from visibench.results.store import store
store.LEASE = float(sys.argv[2])
with store.Store(sys.argv[1]).claim(config()) as mine:
    print(mine, flush=True)
    sys.stdin.read()
"""


def test_claims_hold_between_machines_and_end_with_theirs(tmp_path, monkeypatch):
    """On a file system that locks nothing, with a machine that is lost without a word."""
    monkeypatch.setattr(stores, "LEASE", 1.5)
    helpers = {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", HOLD, str(tmp_path), "1.5"]
    other = subprocess.Popen(command, stdin=-1, stdout=-1, env=os.environ | helpers)
    assert other.stdout.readline() == b"True\n"
    store, ends = Store(tmp_path), time.monotonic() + 4
    while time.monotonic() < ends:
        with store.claim(config(), wait=0.2) as mine:
            assert not mine, "it is alive, and says so"
    other.kill()
    other.wait()
    began = time.monotonic()
    while not mine:
        with store.claim(config(), wait=0.2) as mine:
            assert time.monotonic() - began < 30
    assert not [*store.path(config()).glob("lock*")]


@pytest.mark.parametrize("content", [b"", b"99\nanother-machine\n", b"99\nanother", b"\xff\x00", b"[1]\n2\n3\n4\n"])
def test_claims_that_say_nothing_of_their_end_do_not_hold_for_ever(content, tmp_path, monkeypatch):
    """What a power cut leaves of a claim, and the claim of an early version, which had no end."""
    monkeypatch.setattr(stores, "LEASE", 0.5)
    store = Store(tmp_path)
    path, mine = store.path(config()), False
    path.mkdir(parents=True)
    (path / "lock").write_bytes(content)
    began = time.monotonic()
    while not mine:
        with store.claim(config(), wait=0.1) as mine:
            assert time.monotonic() - began < 30
        assert not mine or time.monotonic() - began > 0.5, "it might have been just made"
    assert not [*path.glob("lock*")]


def test_a_claim_that_is_touched_holds_however_odd(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "LEASE", 0.2)
    store = Store(tmp_path)
    lock = store.path(config()) / "lock"
    lock.parent.mkdir(parents=True)
    lock.write_bytes(b"")
    for number in range(20):
        os.utime(lock, (number, number))
        with store.claim(config(), wait=0.05) as mine:
            assert not mine


def test_two_claims_exclude_each_other_in_one_process(tmp_path):
    one, other = Store(tmp_path), Store(tmp_path)
    with one.claim(config()) as first, other.claim(config()) as second:
        assert (first, second) == (True, False)
    with other.claim(config()) as again:
        assert again
