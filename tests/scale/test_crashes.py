"""Sweeps that are killed again and again, and sweeps that share a folder."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import storing
import yaml
from storing import outcome
from visibench.evals.sweeps.cells import cell_specs
from visibench.evals.sweeps.config import load_config
from visibench.results.store.store import Store

KILLS = 12


@pytest.fixture
def crash(checkpoint, disk_data, tmp_path):
    """Call of the script on a sweep of eight cells, four batches each."""
    settings = {
        "model": str(checkpoint),
        "data": str(disk_data),
        "tasks": ["gqa", "mme"],
        "methods": ["fastv:keep=0.5", {"name": "random", "keep": 0.25, "seeds": [0, 1]}],
        "batch_size": 2,
        "timing": {"repeats": 1, "warmup": 0},
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(settings))

    def call(how, out, count):
        script = [
            sys.executable,
            str(Path(storing.__file__).with_name("crashing.py")),
            how,
            str(tmp_path / "sweep.yaml"),
        ]
        done = subprocess.run([*script, str(tmp_path / out), str(count)], capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), outcomes(tmp_path / out)

    def outcomes(folder):
        found = [Store(folder).find(cell.config) for cell in cell_specs(load_config(str(tmp_path / "sweep.yaml"))[0])]
        return [outcome(cell) for cell in found]

    return call


@pytest.mark.slow
def test_killed_many_times_a_sweep_ends_like_one_in_one_go(crash, tmp_path):
    told, killed = crash("kill", "killed", KILLS)
    assert told["status"] == 0
    assert len(told["killed"]) == KILLS
    assert len(set(told["killed"])) >= 4, "in several ways"
    straight, expected = crash("kill", "straight", 0)
    assert straight == {"killed": [], "status": 0}
    assert killed == expected
    left = {file.name for file in (tmp_path / "killed").rglob("cells/*/*")}
    assert left == {"config.json", "samples.parquet", "metrics.json"}
    assert (tmp_path / "killed" / "table.md").exists()


@pytest.mark.slow
def test_processes_share_a_folder_and_outlive_each_other(crash):
    told, shared = crash("share", "shared", 3)
    assert told["statuses"] == [-9, 0, 0]
    assert len(told["cells"]) == len(set(told["cells"])) == 8, "no cell twice"
    tables = [said[said.index("method") :] for said in told["said"][1:]]
    assert tables[0].split("Stored in")[0] == tables[1].split("Stored in")[0], "both see all cells"
    assert shared == crash("kill", "straight", 0)[1]
