"""Processes that share a folder: each takes cells that nobody else works on."""

import subprocess
import sys

import visibench
from storing import config
from visibench.evals.answers.cell_spec import CellSpec
from visibench.evals.sweeps.claims import claimed
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
