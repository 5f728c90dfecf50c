"""A driver of Ray that is asked to stop, or killed: how it ends, and that nothing it started lives on."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from visibench.evals.workers import watchdog

pytestmark = pytest.mark.slow


@pytest.fixture
def driver(checkpoint, disk_data, tmp_path):
    """A sweep on a cluster of its own that has answered its first questions."""
    pytest.importorskip("ray")
    content = {"model": str(checkpoint), "data": str(disk_data), "tasks": ["gqa", "mme"], "timing": None}
    (tmp_path / "s.yaml").write_text(json.dumps(content | {"methods": ["fastv:keep=0.5"], "batch_size": 1}))
    command = [sys.executable, "-m", "visibench", "sweep", "s.yaml", "--executor", "ray", "--workers", "1", "--json"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        started = any('"cell_started"' in line for line in process.stdout)
        assert started, process.stderr.read()
        yield process
        process.kill()


def alive(processes):
    return [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def gone(processes, seconds=60) -> bool:
    deadline = time.monotonic() + seconds
    while alive(processes) and time.monotonic() < deadline:
        time.sleep(0.2)
    return not alive(processes)


def test_sigterm_to_the_driver_is_one_line_without_stacks_and_nothing_lives_on(driver):
    family = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGTERM)
    _, said = driver.communicate(timeout=300)
    assert driver.returncode == 143, said
    assert "interrupted" in said.splitlines()[-1]
    assert not [line for line in said.splitlines() if "Traceback" in line or "@ " in line or "SIGTERM received" in line]
    assert gone(family)


def test_nothing_that_a_killed_driver_has_started_lives_on(driver):
    family = psutil.Process(driver.pid).children(recursive=True)
    assert {"raylet", "gcs_server"} <= {process.name() for process in family}
    assert any(process.name().startswith("ray::Worker") for process in family)
    driver.kill()
    driver.wait()
    assert gone(family), [process.cmdline() for process in alive(family)]


def test_the_watchdog_ends_what_bears_the_mark_and_nothing_else():
    sleep = [sys.executable, "-c", "import time; time.sleep(300)"]
    theirs, ours = (
        subprocess.Popen(sleep, env=os.environ | {watchdog.NAME: mark}, start_new_session=True) for mark in ("a", "b")
    )
    try:
        watch = subprocess.Popen([sys.executable, "-P", watchdog.__file__, "b"], stdin=subprocess.PIPE)
        time.sleep(0.5)
        assert ours.poll() is None
        watch.stdin.close()
        assert watch.wait(60) == 0
        assert ours.wait(60) == -signal.SIGKILL
        assert theirs.poll() is None
    finally:
        theirs.kill()
        theirs.wait()
