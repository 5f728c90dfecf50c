"""Sending to Weights & Biases while a sweep runs: what happens when nobody answers, and what is refused before."""

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
from accountless import KEY, environment
from storing import config, full
from visibench.cli import app, main
from visibench.commands.live import destination_asked, sending
from visibench.errors import DataError
from visibench.evals.sweeps.events import CellFinished, Listening, Named, Reporter
from visibench.reports.wandb.sink import Destination
from visibench.results.store.store import Store

QUICK = {f"WANDB__GRAPHQL_RETRY_{name}": "1" for name in ("MAX", "WAIT_MIN_SECONDS", "WAIT_MAX_SECONDS")}


def dead_server() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.slow
def test_a_dead_server_costs_one_warning(tmp_path, monkeypatch, capsys):
    (tmp_path / "home").mkdir()
    for name, value in environment(tmp_path / "home", **QUICK, WANDB_BASE_URL=dead_server()).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    folder = tmp_path / "run"
    with sending(folder, destination_asked(folder, "online", None, None, None, "a,b")) as live:
        full(Store(folder))
        live()
    said = capsys.readouterr().err
    waiting, warning = said.splitlines()
    assert waiting.startswith("Sending the rest to W&B, up to ")
    assert warning.startswith("warning: not all is in W&B (W&B did not take ")
    assert f"`visibench wandb sync {folder} --tags a,b` sends the rest" in warning
    assert KEY not in said
    assert len(Store(folder).cells()) == 10
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file


OFFLINE = Destination("a", mode="offline")


def stand_in(folder: Path, monkeypatch, does: str) -> None:
    """What is started instead of a process that sends."""
    script = folder / "stand-in"
    script.write_text(f"#!/bin/sh\n{does}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


@pytest.mark.parametrize(("does", "why"), [("sleep 60", "not finished in time"), ("exit 3", "exit code 3")])
def test_a_process_that_hangs_or_dies_is_not_waited_for(tmp_path, monkeypatch, capsys, does, why):
    monkeypatch.setattr("visibench.commands.live.WAIT", 0.2)
    stand_in(tmp_path, monkeypatch, does)
    with sending(tmp_path / "run", OFFLINE) as live:
        for _ in range(100_000):  # more than a pipe holds
            live()
    assert live.process.poll() is not None
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Sending the rest")]
    assert why in warning


def test_a_failure_shortens_the_wait(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("visibench.commands.live.SHORT", 0.2)
    stand_in(tmp_path, monkeypatch, "sleep 1; echo 'not sent: no network'; echo 'wandb: noise'; sleep 60")
    began = time.monotonic()
    with sending(tmp_path / "run", OFFLINE):
        pass
    assert time.monotonic() - began < 20
    waiting, warning = capsys.readouterr().err.splitlines()
    later = f"`visibench wandb sync {tmp_path / 'run'} --mode offline --group a`"
    assert waiting == f"Sending the rest to W&B, up to 120 s; Ctrl-C leaves it for {later}."
    assert warning.startswith("warning: not all is in W&B (no network); ")
    assert later in warning


def test_a_failure_before_the_end_leaves_little_to_wait_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("visibench.commands.live.SHORT", 0.2)
    stand_in(tmp_path, monkeypatch, "echo 'sent: 1 cells'; echo 'not sent: no network'; sleep 60")
    with sending(tmp_path / "run", OFFLINE) as live:
        live()
        while not live.trouble():
            time.sleep(0.01)
    assert "up to 0.2 s" in capsys.readouterr().err


def test_ctrl_c_ends_the_wait_and_what_is_waited_for(tmp_path, monkeypatch, capsys):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    stand_in(tmp_path, monkeypatch, f"sleep 60 & echo $! > {tmp_path}/inner; wait")
    began = time.monotonic()
    try:
        with sending(tmp_path / "run", OFFLINE) as live:
            live()
            while not (tmp_path / "inner").is_file() or not (inner := (tmp_path / "inner").read_text()).strip():
                time.sleep(0.01)
            threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < 20
    while (status := Path(f"/proc/{inner.strip()}/status")).exists() and "Z (zombie)" not in status.read_text():
        assert time.monotonic() - began < 50, "it was told to end, and on a busy machine takes its time"
        time.sleep(0.01)
    assert "warning: not all is in W&B (interrupted); results are complete" in capsys.readouterr().err


def test_what_is_not_taken_is_tried_again_with_later_cells(tmp_path, monkeypatch, capsys):
    full(Store(tmp_path))
    tried = []

    def send(self, cell, cells):
        tried.append(cell.config.method)
        if len(tried) == 1:
            raise DataError("no network")
        return True

    monkeypatch.setattr("visibench.reports.wandb.sink.prepare", lambda folder: None)
    monkeypatch.setattr("visibench.reports.wandb.sink.Sink.send", send)
    monkeypatch.setattr("visibench.reports.wandb.sink.Sink.finish", lambda self, cells: True)
    monkeypatch.setattr(os, "nice", lambda more: None)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    ours, theirs = os.pipe()
    os.write(theirs, b"\n\n")
    os.close(theirs)
    monkeypatch.setattr(sys, "stdin", os.fdopen(ours))
    app(["wandb", "sync", str(tmp_path), "--follow", "--mode", "offline", "--no-images"], standalone_mode=False)
    first, *others = tried
    assert first in others
    assert capsys.readouterr().out.splitlines() == ["not sent: no network", "sent: 10 cells"]


def test_listeners_hear_of_finished_cells_alone():
    told, heard = [], []
    report = Reporter()
    report.cell_finished = told.append
    cell = Named.cell(config(), 1, 1, 1)
    finished = CellFinished(cell=cell, scores=[], visual_tokens=1, executed_macs=1, seconds=1)
    with Listening(report, lambda: heard.append(len(told))) as tell:
        from visibench.evals.sweeps.events import Note

        tell(Note(text="a"))
        tell(finished)
    assert told == [finished]
    assert heard == [1], "after the event was told"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--wandb", "onlin"], "did you mean 'online'"),
        (["--wandb-project", "x"], "needs --wandb online"),
        (["--wandb", "online"], "no W&B API key"),
        (["--wandb", "offline", "--wandb-project", "bad/name"], "no such project: Invalid project name 'bad/name'"),
        (["--wandb", "offline", "--wandb-entity", "me?"], "no such entity: Invalid entity name 'me?'"),
        (["--wandb", "offline", "--wandb-tags", 65 * "a"], "no such tags: Tag 'aaa"),
        (["--wandb", "offline", "--wandb-group", 122 * "a"], "no such group: "),
        (["--wandb", "offline", "--wandb-project", ""], "the project for W&B is empty"),
    ],
)
@pytest.mark.parametrize(
    "command", ["sweep quick", "sweep quick --dry-run", "run --model tiny --method none --tasks gqa"]
)
def test_refused_before_anything_runs(command, options, says, tmp_path, monkeypatch, capsys):
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["visibench", *command.split(), *options])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr()
    assert (stopped.value.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert says in said.err
    assert list(tmp_path.iterdir()) == []
