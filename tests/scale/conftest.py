"""A small sweep, and what it gives in one process."""

import signal

import pytest
from rich.console import Console
from storing import outcomes
from visibench.evals.sweeps.config import parse_config
from visibench.evals.sweeps.sweep import sweep
from visibench.evals.workers import driver

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def config(checkpoint, disk_data):
    methods = ["fastv:keep=0.5", {"name": "random", "keep": 0.25, "seeds": [0, 1]}]
    content = {"model": str(checkpoint), "data": str(disk_data), "tasks": ["gqa", "mme"], "methods": methods}
    return parse_config(content | {"limit": 7, "batch_size": 2, "timing": {"repeats": 2, "warmup": 0}}, "test")


@pytest.fixture(scope="module")
def straight(config, tmp_path_factory) -> list:
    return outcomes(sweep(config, tmp_path_factory.mktemp("straight"), QUIET))


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
