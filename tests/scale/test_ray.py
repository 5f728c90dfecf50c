"""Sweeps on a Ray cluster: the same results, also when a worker is killed."""

import json
import os
import sys
import threading
import time

import psutil
import pytest
import torch
from heard import Heard, check_events, check_interrupted
from rich.console import Console
from storing import outcomes
from visibench.errors import IncompleteError, OptionError, UnsupportedModelError, VisibenchError
from visibench.evals.sweeps.cells import cell_specs
from visibench.evals.sweeps.sweep import sweep
from visibench.evals.workers.ray import Ray, _cluster, _needs
from visibench.evals.workers.worker import WorkDone, Worker

QUIET = Console(quiet=True)


@pytest.fixture
def _ray(monkeypatch):
    """Workers as quick as this process; by itself Ray gives way to everything else on the machine."""
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_worker_niceness", "0")


@pytest.mark.slow
@pytest.mark.usefixtures("_ray")
def test_a_ray_cluster_gives_what_one_process_does_and_a_killed_worker_changes_nothing(
    config, straight, tmp_path, capsys
):
    """Cells of seven questions in shards of four; one worker is killed in the middle of its work."""
    killed = []

    def kill() -> None:
        deadline = time.monotonic() + 60
        while not killed and time.monotonic() < deadline:
            for process in psutil.Process().children(recursive=True):
                if process.name().startswith("ray::Worker.run"):
                    process.kill()
                    killed.append(process.pid)
                    return
            time.sleep(0.002)

    killer = threading.Thread(target=kill)
    heard = Heard("cell_finished", killer.start)
    cells = sweep(config, tmp_path, QUIET, report=heard, executor=Ray(workers=2, shard=4))
    killer.join()
    assert len(killed) == 1
    assert capsys.readouterr().out == ""
    assert outcomes(cells) == straight
    check_events(heard, len(straight))
    # Sixteen shards have four sets of images, and three workers ran at most.
    assert sum(cell.metrics.reused_images > 0 for cell in cells) >= (16 - 3 * 4) / 2
    counts = [event.answered for event in heard.of("progress") if event.cell.number == 1]
    assert counts in ([3, 7], [4, 7]), "shards of batches of two: 2 + 2 and 2 + 1 questions, in any order"
    assert not list(tmp_path.glob("cells/*/answers*"))


@pytest.mark.slow
@pytest.mark.usefixtures("_ray")
def test_ctrl_c_waits_for_the_batches_of_ray_workers_here(config, straight, tmp_path, interrupt):
    heard = Heard()
    interrupt()
    with pytest.raises(KeyboardInterrupt):
        sweep(config, tmp_path, QUIET, report=heard, executor=Ray(workers=1, shard=4))
    check_interrupted(heard, tmp_path)
    assert outcomes(sweep(config, tmp_path, QUIET)) == straight


def reused(outcome: WorkDone) -> int:
    (content,) = (content for name, content in outcome.files.items() if name.startswith("answers"))
    return sum(json.loads(line)["reused"] for line in content.splitlines()[1:])


@pytest.mark.parametrize("limit", [1.0, 0.0])
def test_a_ray_worker_shares_vision_features_between_its_tasks(config, limit, tmp_path, monkeypatch):
    monkeypatch.setenv("VISIBENCH_CACHE", str(tmp_path))
    one = config.model_copy(update={"tasks": ["gqa"], "feature_cache_gb": limit, "keep_features": True})
    worker, (dense, fastv, *_) = Worker(one.model_dump_json()), cell_specs(one)
    first, second = (worker.run(cell.config, cell.dense, (0, 2), {}, {}) for cell in (dense, fastv))
    assert (first.answered, second.answered) == (4, 4)
    assert reused(second) == (4 if limit else 0) >= reused(first)
    assert first.notes == second.notes == worker.close() == ()
    assert bool(list(tmp_path.rglob("*.safetensors"))) == bool(limit), "written where it is closed"


def test_what_a_ray_worker_has_to_say_of_vision_features_comes_back(config, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("VISIBENCH_CACHE", str(tmp_path / "file"))
    small = config.model_copy(update={"tasks": ["gqa"], "feature_cache_gb": 3e-6})  # one image of two
    worker = Worker(small.model_dump_json())
    (note,) = worker.run(cell_specs(small)[0].config, None, (0, 2), {}, {}).notes
    assert note.startswith("image features stay in memory, cannot write to")
    assert worker.close() == ()


def test_a_shard_that_cannot_run_is_left_to_the_end_of_its_cell(config, monkeypatch):
    def fails(*arguments, **options):
        raise UnsupportedModelError("no such layer")

    monkeypatch.setattr("visibench.evals.workers.worker.answer", fails)
    one = config.model_copy(update={"tasks": ["gqa"]})
    outcome = Worker(one.model_dump_json()).run(cell_specs(one)[0].config, None, (0, 2), {}, {})
    assert b"UnsupportedModelError: no such layer" in outcome.files["failures.jsonl"]
    assert outcome.answered == 0


@pytest.mark.slow
@pytest.mark.usefixtures("_ray")
def test_an_unforeseen_error_of_a_ray_worker_is_a_failure_of_its_cell(config, straight, tmp_path, monkeypatch):
    class Failing(Worker):
        def run(self, config, *task):
            if (config.method, config.task) == ("fastv", "gqa"):
                raise RuntimeError("no such head\nreally")
            return Worker.run(self, config, *task)

    monkeypatch.setattr("visibench.evals.workers.ray.Worker", Failing)
    with pytest.raises(IncompleteError) as caught:
        sweep(config, tmp_path, QUIET, executor=Ray(workers=1, shard=4))
    assert caught.value.exit_code == 3
    assert "fastv:keep=0.5 · gqa · seed 0: failed, RuntimeError: no such head: see" in str(caught.value)
    left = [one for one in straight if (one[0].method, one[0].task) != ("fastv", "gqa")]
    assert outcomes(caught.value.cells) == left
    (file,) = tmp_path.glob("cells/*/failures.jsonl")
    (line,) = map(json.loads, file.read_text().splitlines())
    assert (line["doc_id"], line["error"]) == (None, "RuntimeError: no such head")
    assert 'raise RuntimeError("no such head' in line["traceback"]
    assert "\x1b" not in line["traceback"]


@pytest.mark.slow
@pytest.mark.usefixtures("_ray")
def test_an_error_of_a_ray_worker_is_one_line(config, tmp_path, monkeypatch):
    monkeypatch.setattr("visibench.evals.sweeps.cells.fingerprint", lambda model: "0123456789abcdef")
    with pytest.raises(VisibenchError, match=r"^model '.*' is another one on .*: copy the folder there$"):
        sweep(config, tmp_path, QUIET, executor=Ray(workers=1))


@pytest.mark.slow
@pytest.mark.usefixtures("_ray")
def test_workers_that_cannot_start_are_one_line(config, tmp_path, monkeypatch):
    class Broken(Worker):
        def __init__(self, config: str, flag: str) -> None:
            raise ImportError("no visibench here")

    monkeypatch.setattr("visibench.evals.workers.ray.Worker", Broken)
    with pytest.raises(VisibenchError, match=r"^no worker can start \(.*no visibench here\): repair"):
        sweep(config, tmp_path, QUIET, executor=Ray(workers=2))


@pytest.mark.slow
@pytest.mark.usefixtures("_ray")
def test_a_cluster_of_our_own_listens_to_this_machine_alone(tmp_path, monkeypatch):
    """And to those who know its token, which is left nowhere; there is no dashboard."""
    monkeypatch.setenv("HOME", str(tmp_path))
    with _cluster(None, 2) as ray:

        @ray.remote
        def about() -> tuple:
            return os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"], os.environ["OMP_NUM_THREADS"]

        assert ray.get(about.remote()) == (
            "token",
            os.environ["RAY_AUTH_TOKEN"],
            str(max(1, torch.get_num_threads() // 2)),
        )
        family = [psutil.Process(), *psutil.Process().children(recursive=True)]
        listening = {
            (connection.laddr.ip.removeprefix("::ffff:"), process.name())
            for process in family
            for connection in process.net_connections()
            if connection.status == psutil.CONN_LISTEN
        }
    assert {"raylet", "gcs_server"} <= {name for _, name in listening}
    assert {address for address, _ in listening} == {"127.0.0.1"}
    assert not list(tmp_path.rglob("*token*"))


def test_what_a_worker_needs_of_the_cluster():
    assert _needs("auto", {"CPU": 64, "GPU": 8}) == ({"num_gpus": 1}, 8)
    assert _needs("cuda", {"CPU": 64, "GPU": 2}) == ({"num_gpus": 1}, 2)
    assert _needs("cpu", {"CPU": 64, "GPU": 8}) == ({"num_cpus": 1}, 64)
    assert _needs("auto", {"CPU": 4}) == ({"num_cpus": 1}, 4)
    with pytest.raises(OptionError, match="has no GPU"):
        _needs("cuda", {"CPU": 4})
    with pytest.raises(OptionError, match="not cuda:1"):
        _needs("cuda:1", {"CPU": 4, "GPU": 4})


def test_without_ray_there_is_one_line_that_names_the_fix(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(OptionError, match=r"^--executor ray needs Ray: pip install visibench\[ray\]$"):
        sweep(config, tmp_path, QUIET, executor=Ray())
