"""What a sweep tells while it runs, through the command line as users and programs see it."""

import json
import os
import pty
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pytest
import visibench
from rich.console import Console
from visibench.cli import main
from visibench.evals.sweeps import events
from visibench.results.store.records import ScoreRecord
from visibench.results.store.store import Store


class Told(NamedTuple):
    code: int
    stdout: str
    stderr: str


SCORES = [ScoreRecord(key="exact_match", title="exact match", value=0.5, maximum=1)]
DOCS = Path(visibench.__file__).parent / "docs" / "events.md"


@pytest.fixture(scope="module")
def file(checkpoint, disk_data, tmp_path_factory) -> Path:
    content = {"model": str(checkpoint), "data": str(disk_data), "tasks": ["gqa", "pope"], "limit": 5, "timing": None}
    path = tmp_path_factory.mktemp("config") / "my.yaml"
    path.write_text(json.dumps(content | {"methods": ["fastv:keep=0.5"], "batch_size": 2}))
    return path


@pytest.fixture(scope="module")
def ran(file) -> tuple[Path, Told]:
    folder = file.parent / "ran"
    return folder, sweep(file, folder, "--json", "--only-tasks", "gqa")


def sweep(file: Path, folder: Path, *options: str) -> Told:
    """The command line in this process."""
    out, err = StringIO(), StringIO()
    arguments = ["visibench", "sweep", str(file), "--out", str(folder), *options]
    captured = redirect_stdout(out), redirect_stderr(err), patch.object(sys, "argv", arguments)
    with captured[0], captured[1], captured[2], pytest.raises(SystemExit) as stopped:
        main()
    return Told(stopped.value.code, out.getvalue(), err.getvalue())


def test_json_events_say_what_happened_and_nothing_else_is_on_standard_output(file, ran):
    folder, done = ran
    events = [json.loads(line) for line in done.stdout.splitlines()]
    kinds = [event["event"] for event in events]
    of_a_cell = ["cell_started", "progress", "progress", "progress", "cell_finished"]
    assert kinds == ["sweep_started", "model_started", *of_a_cell, *of_a_cell, "sweep_finished"]
    assert (done.code, done.stderr) == (0, "")
    assert events[1] == {
        "event": "model_started", "model": events[0]["models"][0], "cells": 2, "done": 0, "questions": 10
    }  # fmt: skip
    assert [event["answered"] for event in events if event["event"] == "progress"] == [2, 4, 5] * 2
    cells = {cell.path.name: cell for cell in Store(folder).cells()}
    finished = [event for event in events if event["event"] == "cell_finished"]
    assert len(finished) == len(cells) == 2
    for number, event in enumerate(finished, start=1):
        stored = cells[event["cell"]["folder"]]
        assert [(score["key"], score["value"]) for score in event["scores"]] == [
            (score.key, score.value) for score in stored.metrics.scores
        ]
        assert (event["executed_macs"], event["visual_tokens"]) == (
            stored.metrics.compute.macs,
            stored.metrics.visual_tokens.mean,
        )
        assert (event["cell"]["label"], event["cell"]["number"]) == (stored.config.label, number)
    again = [json.loads(line) for line in sweep(file, folder, "--json", "--only-tasks", "gqa").stdout.splitlines()]
    assert [event["event"] for event in again] == ["sweep_started", "model_started", "sweep_finished"]
    assert (again[1]["cells"], again[1]["done"], again[1]["questions"], again[2]["cells"]) == (2, 2, 0, 2)


def test_the_schema_is_documented():
    text = DOCS.read_text()
    kinds = [kind for kind in vars(events).values() if "event" in getattr(kind, "model_fields", {})]
    assert len(kinds) == 8
    for kind in kinds:
        (line,) = [line for line in text.splitlines() if line.startswith(f"| `{kind.model_fields['event'].default}`")]
        assert all(f"`{key}`" in line for key in kind.model_fields if key != "event")
    assert all(f"`{key}`" in text for key in events.Named.model_fields)


def test_quiet_prints_the_table_alone_and_lines_tell_of_each_cell(file, ran):
    folder, _ = ran
    quiet = sweep(file, folder, "--quiet", "--only-tasks", "gqa")
    assert "fastv:keep=0.5" in quiet.stdout
    assert quiet.stderr == ""
    plain = sweep(file, folder, "--only-tasks", "gqa", "--set", "limit=4", "--only", "none")
    (line,) = [line for line in plain.stderr.splitlines() if line.startswith("[")]
    assert line.startswith("[1/1] none · gqa · seed 0: exact match ")
    assert "\x1b" not in plain.stderr


@pytest.mark.slow
def test_a_terminal_shows_cells_questions_rate_time_left_and_score(file, ran):
    folder, _ = ran
    ours, theirs = pty.openpty()
    environment = os.environ | {"COLUMNS": "200", "TERM": "xterm"}
    command = [sys.executable, "-m", "visibench", "sweep", str(file), "--out", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, env=environment)
    os.close(theirs)
    seen = b""
    try:
        while part := os.read(ours, 65536):
            seen += part
    except OSError:  # how Linux says that the other end is closed
        pass
    assert process.wait() == 0
    text = seen.decode()
    for wanted in ("2 of 4 cells are done", "none · pope", "2 cells", "/10", "questions/s", "left", "latest: pope F1"):
        assert wanted in text


def test_bars_count_a_cell_once_that_a_second_worker_takes_over():
    console = Console(file=StringIO(), force_terminal=True, width=200)
    names = {"model": "m", "method": "none", "label": "none", "task": "gqa", "seed": 0, "of": 2, "questions": 10}
    first, second = (events.Named(**names, number=i, folder=f"f{i}") for i in (1, 2))
    with events.Bars(console) as tell:
        tell(events.ModelStarted(model="m", cells=2, done=0, questions=20))
        tell(events.CellStarted(cell=first))
        tell(events.Answered(cell=first, answered=6, seconds=1))
        tell(events.CellStarted(cell=first))
        tell(events.Answered(cell=first, answered=8, seconds=1))
        (total, bar) = tell.bars.tasks
        assert (total.completed, bar.completed) == (8, 8)
        tell(events.CellFailed(cell=first, problem="no luck", seconds=1))
        tell(events.CellStarted(cell=second))
        tell(events.CellFinished(cell=second, scores=SCORES, visual_tokens=1, executed_macs=1, seconds=1))
        (total,) = tell.bars.tasks
        assert (total.completed, total.description) == (20, "0 of 2 cells left")
    assert "[1/2] none · gqa · seed 0: no luck" in console.file.getvalue()


def test_a_long_cell_tells_of_itself_now_and_then(monkeypatch):
    """The pace is of late, not of the 1000 answers that an earlier run had left."""
    now = [0.0]
    monkeypatch.setattr(events.time, "monotonic", lambda: now[0])
    console = Console(file=StringIO(), width=200)
    names = {"model": "m", "method": "none", "label": "none", "task": "gqa", "seed": 0, "of": 2}
    cell = events.Named(**names, number=1, questions=9000, folder="f")
    tell = events.Lines(console)
    tell(events.CellStarted(cell=cell))
    for answered, seconds in [(500, 0.5), (1000, 1.0), *((1000 + 8 * i, 1.0 + 2 * i) for i in range(1, 100))]:
        now[0] = seconds
        tell(events.Answered(cell=cell, answered=answered, seconds=seconds))
    assert console.file.getvalue().splitlines() == [
        "[1/2] none · gqa · seed 0: 1240 of 9000 questions, 4 questions/s, 32.3 min left in this cell",
        "[1/2] none · gqa · seed 0: 1480 of 9000 questions, 4 questions/s, 31.3 min left in this cell",
        "[1/2] none · gqa · seed 0: 1720 of 9000 questions, 4 questions/s, 30.3 min left in this cell",
    ]


def test_one_slow_batch_is_told_of(monkeypatch):
    monkeypatch.setattr(events, "EVERY", 0.0)
    console = Console(file=StringIO(), width=200)
    names = {"model": "m", "method": "none", "label": "none", "task": "gqa", "seed": 0, "of": 2}
    cell = events.Named(**names, number=1, questions=24, folder="f")
    tell = events.Lines(console)
    tell(events.CellStarted(cell=cell))
    tell(events.Answered(cell=cell, answered=8, seconds=4000.0))
    assert console.file.getvalue() == (
        "[1/2] none · gqa · seed 0: 8 of 24 questions, 0.002 questions/s, 2 h 13 min left in this cell\n"
    )


def test_quiet_and_json_exclude_each_other(file):
    told = sweep(file, file.parent / "new", "--quiet", "--json")
    assert told.code == 2
    assert "--quiet and --json exclude each other" in told.stderr
    assert not (file.parent / "new").exists()
