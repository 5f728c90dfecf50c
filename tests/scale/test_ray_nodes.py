"""A Ray cluster of two nodes that others have started, one of which is lost half-way: the same as one process finds."""

import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import visibench
import yaml
from rich.console import Console
from storing import outcomes
from visibench.evals.sweeps.config import parse_config
from visibench.evals.sweeps.sweep import sweep
from visibench.results.store.store import Store

ray = pytest.importorskip("ray")
ROOT = Path(visibench.__file__).parent


@pytest.fixture
def cluster(monkeypatch):
    """Two nodes with a CPU each, the second one without the driver; what was started ends with the test."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", str(ROOT.parent))
    for name, value in {"PERIOD_MS": 500, "TIMEOUT_MS": 2000, "FAILURE_THRESHOLD": 3, "INITIAL_DELAY_MS": 0}.items():
        monkeypatch.setenv(f"RAY_health_check_{name.lower()}", str(value))
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    yield nodes
    nodes.shutdown()


def busy(raylet: psutil.Process) -> bool:
    """Whether an actor of the node runs a task, which Ray writes into the name of its process."""
    with suppress(psutil.NoSuchProcess):  # one that ends meanwhile
        return any(child.name().startswith("ray::Worker.run") for child in raylet.children(recursive=True))
    return False


def watched(command: list[str], raylets: list[psutil.Process], folder: Path) -> tuple[int, set[int]]:
    """Run a command, and kill the second node in a task once a cell is done: (exit code, nodes that did tasks)."""
    seen: set[int] = set()
    with (folder / "err").open("w") as err:
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=err)
        try:
            deadline = time.monotonic() + 150
            while process.poll() is None and time.monotonic() < deadline:
                seen |= {number for number, raylet in enumerate(raylets) if busy(raylet)}
                if len(raylets) == 2 and list(folder.glob("run/cells/*/metrics.json")) and busy(raylets[1]):
                    raylets.pop().kill()
                time.sleep(0.005)
        finally:
            process.kill()
        code = process.wait()
    assert len(raylets) == 1, "the second node was lost while it worked"
    return code, seen


@pytest.mark.slow
def test_two_nodes_share_a_sweep_and_one_finishes_it_when_the_other_is_lost(cluster, checkpoint, disk_data, tmp_path):
    methods = ["fastv:keep=0.5", {"name": "random", "keep": 0.25, "seeds": [0, 1]}]
    content = {"model": str(checkpoint), "data": str(disk_data), "tasks": ["gqa", "mme"], "methods": methods}
    content |= {"limit": 7, "batch_size": 2, "timing": {"repeats": 2, "warmup": 0}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content))
    options = ["--out", "run", "--quiet", "--executor", "ray", "--address", cluster.address, "--shard", "4"]
    command = [sys.executable, "-m", "visibench", "sweep", "sweep.yaml", *options]
    raylets = [psutil.Process(node.all_processes["raylet"][0].process.pid) for node in cluster.list_all_nodes()]
    code, seen = watched(command, raylets, tmp_path)
    assert code == 0, (tmp_path / "err").read_text()
    assert seen == {0, 1}
    straight = sweep(parse_config(content, "test"), tmp_path / "straight", Console(quiet=True))
    found = {cell.config.folder: cell for cell in Store(tmp_path / "run").cells()}
    assert len(found) == len(straight) == 8
    assert outcomes([found[cell.config.folder] for cell in straight]) == outcomes(straight)
