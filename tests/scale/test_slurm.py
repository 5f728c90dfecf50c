"""The Slurm scripts of docs/scale.md, run to the letter; stand-ins for Slurm's programs start tasks on this machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import visibench
import yaml
from documented import SCRIPTS
from rich.console import Console
from storing import outcomes
from visibench.evals.sweeps.config import load_config
from visibench.evals.sweeps.sweep import sweep
from visibench.results.store.store import Store

ROOT = Path(visibench.__file__).parent
NODES = ["node0", "node1"]
ARRAY, CLUSTER = SCRIPTS
SRUN = """
import os, sys
options = dict(word[2:].split("=") for word in sys.argv[1:4])
assert options["nodes"] == options["ntasks"] == "1" and os.environ["SRUN_CPUS_PER_TASK"] == "1"
names = os.environ["TEST_NODES"].split()
number = names.index(options["nodelist"])
task = {"PROCID": 0, "NTASKS": 1, "LOCALID": 0, "NODEID": 0, "STEP_NODELIST": names[number]}
os.environ.update({f"SLURM_{name}": str(value) for name, value in task.items()})
with open("started", "a") as log:
    print(names[number], *sys.argv[4:6], file=log)
os.execvp(sys.argv[4], sys.argv[4:])
"""
SCONTROL = """
import os, sys
assert sys.argv[1:] == ["show", "hostnames", "node[0-1]"]
print(*os.environ["TEST_NODES"].split(), sep="\\n")
"""
VISIBENCH = "from visibench.cli import main; main()"


@pytest.fixture
def job(checkpoint, disk_data, tmp_path):
    """(the folder from which a job is submitted, the environment that Slurm gives it)."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "visibench": VISIBENCH}.items():
        (programs / name).write_text(f"#!{sys.executable}\n{text}")
        (programs / name).chmod(0o755)
    methods = ["fastv:keep=0.5", {"name": "random", "keep": 0.25, "seeds": [0, 1]}]
    content = {"model": str(checkpoint), "data": str(disk_data), "tasks": ["gqa", "mme"], "methods": methods}
    content |= {"limit": 7, "batch_size": 2, "device": "cpu", "timing": {"repeats": 2, "warmup": 0}}
    (tmp_path / "my_sweep.yaml").write_text(yaml.safe_dump(content))
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    slurm = {"JOB_NODELIST": "node[0-1]", "JOB_NUM_NODES": "2", "CPUS_PER_TASK": "1", "JOB_ID": "7"}
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {f"SLURM_{name}": value for name, value in slurm.items()}
    environment |= {"PATH": path, "PYTHONPATH": str(ROOT.parent), "TEST_NODES": " ".join(NODES)}
    return tmp_path, environment


def submit(script: str, folder: Path, environment: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen(
        ["bash", "-c", script],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def check(folder: Path) -> None:
    """What is stored equals what this process finds."""
    config, _ = load_config(str(folder / "my_sweep.yaml"), [])
    straight = sweep(config, folder / "straight", Console(quiet=True))
    found = {cell.config.folder: cell for cell in Store(folder / "runs" / "mine").cells()}
    assert outcomes([found[cell.config.folder] for cell in straight]) == outcomes(straight)
    assert len(found) == len(straight) == 8


@pytest.mark.slow
def test_an_array_of_jobs_shares_the_cells(job):
    folder, environment = job
    jobs = [submit(ARRAY, folder, environment | {"SLURM_ARRAY_TASK_ID": str(number)}) for number in range(2)]
    outputs = [one.communicate(timeout=120) for one in jobs]
    assert [one.returncode for one in jobs] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0] != ""
    check(folder)


@pytest.mark.slow
def test_a_ray_cluster_of_two_nodes_in_one_job(job):
    pytest.importorskip("ray")
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 6379)) == 0:
            pytest.skip("port 6379 of this machine is taken")
    folder, environment = job
    (folder / ".ray").mkdir()
    (folder / ".ray" / "auth_token").write_text("0123456789abcdef" * 4)
    one = submit(CLUSTER, folder, environment | {"HOME": str(folder), "RAY_worker_niceness": "0"})
    try:
        output = one.communicate(timeout=150)
    finally:
        left = [process for process in psutil.process_iter() if _of(process, one.pid)]
        for process in left:
            process.kill()
    assert one.returncode == 0, output
    assert (folder / "started").read_text().splitlines() == [
        "node0 hostname --ip-address",
        "node0 ray start",
        "node1 ray start",
    ]
    assert not left, "the script ends what it has started"
    check(folder)


def _of(process: psutil.Process, session: int) -> bool:
    """Whether it runs in a session (of processes, as Unix has them)."""
    try:
        return os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False
