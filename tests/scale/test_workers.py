"""Sweeps by workers, in processes and on a Ray cluster: the same results, also when a worker is killed."""

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
import visibench
from cases import METHODS
from rich.console import Console
from storing import outcomes
from visibench.commands.scale import choose
from visibench.errors import DataError, IncompleteError, OptionError, UnsupportedModelError, VisibenchError
from visibench.evals.settings.method_spec import build, parse, spell
from visibench.evals.sweeps.cells import plan
from visibench.evals.sweeps.config import parse_config
from visibench.evals.sweeps.events import Reporter
from visibench.evals.sweeps.sweep import sweep
from visibench.evals.workers import devices, driver, pool
from visibench.evals.workers.devices import environments
from visibench.evals.workers.driver import LostError, TaskError
from visibench.evals.workers.pool import Pool
from visibench.evals.workers.ray import Ray, _cluster, _needs
from visibench.evals.workers.worker import Outcome, Worker
from visibench.results.store.records import CellConfig
from visibench.results.store.store import Store

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def config(checkpoint, disk_data):
    methods = ["fastv:keep=0.5", {"name": "random", "keep": 0.25, "seeds": [0, 1]}]
    content = {"model": str(checkpoint), "data": str(disk_data), "tasks": ["gqa", "mme"], "methods": methods}
    return parse_config(content | {"limit": 7, "batch_size": 2, "timing": {"repeats": 2, "warmup": 0}}, "test")


@pytest.fixture(scope="module")
def straight(config, tmp_path_factory) -> list:
    return outcomes(sweep(config, tmp_path_factory.mktemp("straight"), QUIET))


class Heard(Reporter):
    """Keeps all events; calls ``act`` at the first of a kind."""

    def __init__(self, kind: str = "", act=None) -> None:
        self.events, self.kind, self.act = [], kind, act

    def __call__(self, event) -> None:
        self.events.append(event)
        if self.act and event.event == self.kind:
            act, self.act = self.act, None
            act()

    def of(self, *kinds: str) -> list:
        return [event for event in self.events if event.event in kinds]


def check_events(heard: Heard, cells: int) -> None:
    """Every cell ends once, and the numbers count through."""
    assert sorted(event.cell.number for event in heard.of("cell_finished")) == list(range(1, cells + 1))
    assert len({event.cell.folder for event in heard.of("cell_finished")}) == cells


# ---- processes ----------------------------------------------------------------------------------------------------


def workers() -> list[psutil.Process]:
    """The processes of a pool."""
    children = psutil.Process().children()
    return [child for child in children if child.is_running() and "pool import serve" in " ".join(child.cmdline())]


@pytest.mark.slow
def test_two_processes_give_what_one_does_also_if_one_is_killed(config, straight, tmp_path):
    killed = []

    def kill() -> None:
        victim = workers()[0]
        victim.kill()
        killed.append(victim.pid)

    heard = Heard("progress", kill)
    assert outcomes(sweep(config, tmp_path, QUIET, report=heard, executor=Pool(2, shard=4))) == straight
    assert len(killed) == 1
    assert not list(tmp_path.glob("cells/*/answers*"))
    assert any("was killed (SIGKILL): its cell goes to the others" in note.text for note in heard.of("note"))
    check_events(heard, len(straight))
    assert not workers()


@pytest.fixture
def interrupt(monkeypatch):
    """Call: Ctrl-C comes when the second task is handed out. As in a terminal, whatever the signal was set to."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    hand_out, handed_out = driver._Driver._hand_out, []

    def press(self) -> None:
        hand_out(self)
        handed_out.append(1)
        if len(handed_out) == 2:
            signal.raise_signal(signal.SIGINT)

    yield lambda: monkeypatch.setattr(driver._Driver, "_hand_out", press)
    signal.signal(signal.SIGINT, before)


def check_interrupted(heard: Heard, folder) -> None:
    """As if there were one process, and what it had answered is kept."""
    assert len([note for note in heard.of("note") if note.text.startswith("Stopping")]) == 1
    assert list(folder.glob("cells/*/answers*"))
    assert not list(folder.glob("cells/*/metrics.json"))


@pytest.mark.slow
def test_ctrl_c_stops_all_processes_without_a_word_of_theirs_and_loses_nothing(
    config, straight, tmp_path, capfd, interrupt
):
    """In the middle of a cell."""
    heard = Heard()
    interrupt()
    with pytest.raises(KeyboardInterrupt):
        sweep(config, tmp_path, QUIET, report=heard, executor=Pool(2, shard=4))
    assert not workers()
    assert capfd.readouterr() == ("", "")
    check_interrupted(heard, tmp_path)
    assert outcomes(sweep(config, tmp_path, QUIET)) == straight


@pytest.mark.slow
@pytest.mark.usefixtures("interrupt")
def test_ctrl_c_stops_processes_at_once_while_they_import(config, straight, tmp_path, capfd):
    def later() -> None:
        while not workers():
            time.sleep(0.01)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    heard = Heard("model_started", threading.Thread(target=later).start)
    with pytest.raises(KeyboardInterrupt):
        sweep(config, tmp_path, QUIET, report=heard, executor=Pool(2))
    assert not heard.of("note", "cell_started")
    assert not workers()
    assert capfd.readouterr() == ("", "")
    assert outcomes(sweep(config, tmp_path, QUIET)) == straight


SWEEP = """
import sys
from pathlib import Path
from rich.console import Console
from visibench.evals.sweeps.config import SweepConfig
from visibench.evals.sweeps.sweep import sweep
from visibench.evals.workers.pool import Pool

config = SweepConfig.model_validate_json(sys.argv[1])
sweep(config, Path(sys.argv[2]), Console(quiet=True), executor=Pool(2, shard=4))
"""


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_leaves_no_process_behind(config, straight, tmp_path):
    killed = subprocess.Popen([sys.executable, "-c", SWEEP, config.model_dump_json(), str(tmp_path)])
    while not list(tmp_path.glob("cells/*/metrics.json")):
        assert killed.poll() is None
        time.sleep(0.05)
    family = psutil.Process(killed.pid).children()
    killed.kill()
    killed.wait()
    assert len(family) == 2
    assert not psutil.wait_procs(family, timeout=120)[1], "they end behind the task that ran"
    assert 1 <= len(Store(tmp_path).cells()) < len(straight)
    assert outcomes(sweep(config, tmp_path, QUIET)) == straight


@pytest.mark.slow
def test_when_all_processes_are_killed_others_take_their_place(config, straight, tmp_path):
    killed = []

    def kill() -> None:
        for victim in workers():
            victim.kill()
            killed.append(victim.pid)

    assert outcomes(sweep(config, tmp_path, QUIET, report=Heard("cell_finished", kill), executor=Pool(2))) == straight
    assert len(killed) == 2


@pytest.mark.slow
def test_processes_that_cannot_start_are_one_line(config, tmp_path, monkeypatch):
    monkeypatch.setattr(pool.sys, "executable", "false")
    with pytest.raises(VisibenchError, match=r"^no worker can start \(has ended with exit code 1\): mend"):
        sweep(config, tmp_path, QUIET, executor=Pool(2))


def test_an_error_in_a_process_is_a_failure_of_its_cell_unless_it_can_be_mended(config):
    worker = pool._Process([{}], config.model_dump_json(), "")
    try:
        worker.call("up").result(60)
        with pytest.raises(TaskError) as caught:
            worker.call("nonsense").result(60)
        assert (caught.value.why.partition(":")[0], caught.value.mendable) == ("AttributeError", None)
        assert "Traceback" in caught.value.traceback
        other = plan(config)[0].config.model_copy(update={"checkpoint": "another"})
        with pytest.raises(TaskError) as caught:
            worker.call("run", other, None, (0, 2), {}, {}).result(60)
        assert isinstance(caught.value.mendable, DataError)
        assert "copy the folder there" in str(caught.value.mendable)
        worker.process.kill()
        with pytest.raises(LostError, match=r"^was killed \(SIGKILL\)$"):
            worker.call("up").result(60)
    finally:
        worker.kill()


@pytest.mark.parametrize("name", METHODS)
def test_a_cell_names_its_method_as_it_was_meant(name):
    """A worker builds it from the cell's configuration."""
    for example in METHODS[name].examples:
        method = parse(spell(METHODS[name], example))
        values = {"method": method.name, "options": method.hyperparameters(), "label": method.name}
        cell = pickle.loads(pickle.dumps(CellConfig(model="tiny", task="pope", **values)))
        assert build(cell.method, cell.options) == method


def test_a_method_in_a_file_is_the_one_that_the_sweep_read(config, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text((Path(visibench.__file__).parent / "examples" / "my_method.py").read_text())
    one = config.model_copy(update={"tasks": ["gqa"], "methods": [f"{file}:keep=0.5"]})
    worker, (_, cell) = Worker(one.model_dump_json()), plan(one)
    assert worker.run(cell.config, None, (0, 2), {}, {}).answered == 4
    file.write_text(file.read_text() + "# changed\n")
    with pytest.raises(DataError, match=r"mine\.py is another one on .*: copy the file there"):
        worker.run(cell.config, None, (0, 2), {}, {})


def test_what_a_worker_cannot_load_is_said_once(config, tmp_path, monkeypatch):
    broken = config.model_copy(update={"methods": ["fastv:layer=11,keep=0.5"]})
    monkeypatch.setattr(pool, "_Process", lambda *args: pytest.fail("a worker was started"))
    with pytest.raises(OptionError, match="10 layers"):
        sweep(broken, tmp_path, QUIET, executor=Pool(2))


def test_each_worker_has_a_device_of_its_own(monkeypatch):
    monkeypatch.setattr(devices.torch, "get_num_threads", lambda: 8)
    assert environments(3, "cpu") == [{"OMP_NUM_THREADS": "2"}] * 3
    assert environments(9, "auto") == [{"OMP_NUM_THREADS": "1"}] * 9
    monkeypatch.setattr(devices.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert environments(2, "auto") == [{"CUDA_VISIBLE_DEVICES": str(i)} for i in (0, 1)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert environments(2, "cuda") == [{"CUDA_VISIBLE_DEVICES": "5"}, {"CUDA_VISIBLE_DEVICES": "7"}]
    with pytest.raises(OptionError, match="2 CUDA devices"):
        environments(3, "cuda")
    with pytest.raises(OptionError, match="give device cuda, not cuda:1"):
        environments(2, "cuda:1")


# ---- Ray ----------------------------------------------------------------------------------------------------------


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


def reused(outcome: Outcome) -> int:
    (content,) = (content for name, content in outcome.files.items() if name.startswith("answers"))
    return sum(json.loads(line)["reused"] for line in content.splitlines()[1:])


@pytest.mark.parametrize("limit", [1.0, 0.0])
def test_a_ray_worker_shares_vision_features_between_its_tasks(config, limit, tmp_path, monkeypatch):
    monkeypatch.setenv("VISIBENCH_CACHE", str(tmp_path))
    one = config.model_copy(update={"tasks": ["gqa"], "feature_cache_gb": limit, "keep_features": True})
    worker, (dense, fastv, *_) = Worker(one.model_dump_json()), plan(one)
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
    (note,) = worker.run(plan(small)[0].config, None, (0, 2), {}, {}).notes
    assert note.startswith("image features stay in memory, cannot write to")
    assert worker.close() == ()


def test_a_shard_that_cannot_run_is_left_to_the_end_of_its_cell(config, monkeypatch):
    def fails(*arguments, **options):
        raise UnsupportedModelError("no such layer")

    monkeypatch.setattr("visibench.evals.workers.worker.answer", fails)
    one = config.model_copy(update={"tasks": ["gqa"]})
    outcome = Worker(one.model_dump_json()).run(plan(one)[0].config, None, (0, 2), {}, {})
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
    with pytest.raises(VisibenchError, match=r"^no worker can start \(.*no visibench here\): mend"):
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


# ---- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("loca", None, None, None), "did you mean 'local'"),
        (("local", None, "auto", None), "--address is for --executor ray"),
        (("local", None, None, 100), "--shard is for --workers"),
        (("local", 1, None, 100), "--shard is for --workers"),
        (("local", 2, None, None, "cpu:1"), "give device cpu, not cpu:1"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        choose(*options)


def test_options_choose_who_runs_the_cells(monkeypatch):
    pytest.importorskip("ray")
    assert choose("local", None, None, None) is None
    assert choose("local", 1, None, None) is None
    assert choose("local", 3, None, None, "cpu") == Ray(workers=3)
    assert choose("ray", None, None, None) == Ray(None, None, 1000)
    assert choose("ray", 4, "auto", 50) == Ray("auto", 4, 50)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert choose("local", 3, None, None, "cpu") == Pool(3)
    assert choose("local", 3, None, 50, "cpu") == Pool(3, 50)
