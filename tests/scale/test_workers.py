"""Sweeps by workers, in processes and on a Ray cluster: the same results, also when a worker is killed."""

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
import visibench
from cases import METHODS
from heard import Heard, check_events, check_interrupted
from rich.console import Console
from storing import outcomes
from visibench.commands.scale import choose
from visibench.errors import DataError, OptionError, VisibenchError
from visibench.evals.settings.method_spec import build, parse, spell
from visibench.evals.sweeps.cells import cell_specs
from visibench.evals.sweeps.sweep import sweep
from visibench.evals.workers import devices, driver, pool
from visibench.evals.workers.devices import environments
from visibench.evals.workers.driver import LostError, TaskError
from visibench.evals.workers.pool import Pool
from visibench.evals.workers.ray import Ray
from visibench.evals.workers.worker import Worker
from visibench.results.store.records import CellConfig
from visibench.results.store.store import Store

QUIET = Console(quiet=True)


# ---- processes ----------------------------------------------------------------------------------------------------


def workers() -> list[psutil.Process]:
    """The processes of a pool."""
    children = psutil.Process().children()
    return [child for child in children if child.is_running() and "pool import serve" in " ".join(child.cmdline())]


@pytest.mark.slow
def test_two_processes_give_what_one_does_also_if_one_is_killed(config, straight, tmp_path, monkeypatch):
    """The second task's worker dies as soon as it has been handed out: then it is busy for certain."""
    hand_out, handed_out, killed = driver._Driver._hand_out, [], []

    def then_kill(self) -> None:
        hand_out(self)
        handed_out.append(1)
        if len(handed_out) == 2:
            busy, _ = [*self.running.values()][-1]
            busy.process.kill()
            killed.append(busy.process.pid)

    monkeypatch.setattr(driver._Driver, "_hand_out", then_kill)
    heard = Heard()
    assert outcomes(sweep(config, tmp_path, QUIET, report=heard, executor=Pool(2, shard=4))) == straight
    assert len(killed) == 1
    assert not list(tmp_path.glob("cells/*/answers*"))
    assert any("was killed (SIGKILL): its cell goes to the others" in note.text for note in heard.of("note"))
    check_events(heard, len(straight))
    assert not workers()


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
    with pytest.raises(VisibenchError, match=r"^no worker can start \(has ended with exit code 1\): repair"):
        sweep(config, tmp_path, QUIET, executor=Pool(2))


def test_an_error_in_a_process_is_a_failure_of_its_cell_unless_it_can_be_mended(config):
    worker = pool._Process([{}], config.model_dump_json(), "")
    try:
        worker.call("up").result(60)
        with pytest.raises(TaskError) as caught:
            worker.call("nonsense").result(60)
        assert (caught.value.why.partition(":")[0], caught.value.mendable) == ("AttributeError", None)
        assert "Traceback" in caught.value.traceback
        other = cell_specs(config)[0].config.model_copy(update={"checkpoint": "another"})
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
    worker, (_, cell) = Worker(one.model_dump_json()), cell_specs(one)
    assert worker.run(cell.config, None, (0, 2), {}, {}).answered == 4
    file.write_text(file.read_text() + "# changed\n")
    with pytest.raises(DataError, match=r"mine\.py is another one on .*: copy the file there"):
        worker.run(cell.config, None, (0, 2), {}, {})


@pytest.mark.parametrize("part", ["engine", "method"])
def test_a_worker_with_other_code_answers_nothing(part, config):
    worker, cell = Worker(config.model_dump_json()), cell_specs(config)[0].config
    other = cell.model_copy(update={"code": cell.code | {part: "another"}})
    with pytest.raises(DataError, match=rf"^visibench's {part} is other code on .*: install the same there$"):
        worker.run(other, None, (0, 2), {}, {})


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
