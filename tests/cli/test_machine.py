"""What is recorded of the machine and of visibench's own commit."""

import os
import subprocess

import pytest
from visibench.results.store.records import environment
from visibench.utils import machine


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository in place of visibench's; returns a function that runs git there."""

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    (tmp_path / "method.py").write_text("keep = 1\n")
    (tmp_path / ".gitignore").write_text("runs\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    machine.code.cache_clear()
    yield git
    machine.code.cache_clear()


@pytest.mark.parametrize(
    ("file", "dirty"),
    [(None, False), ("method.py", True), ("new/method.py", True), ("notes.txt", False), ("runs/x.py", False)],
)
def test_commit_and_whether_code_differs_from_it(file, dirty, checkout):
    if file:
        path = machine.ROOT / file
        path.parent.mkdir(exist_ok=True)
        path.write_text("keep = 2\n")
    assert machine.code() == {"commit": checkout("rev-parse", "HEAD"), "dirty": dirty}


def test_no_checkout_and_no_git_are_no_commit(checkout, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.code() == {}
    machine.code.cache_clear()
    monkeypatch.undo()
    monkeypatch.setattr(machine, "ROOT", tmp_path / "site-packages")
    assert machine.code() == {}


def test_a_stored_environment_says_all_that_made_the_numbers(loaded):
    found = environment(loaded.describe())
    assert found.model["image_backend"] == loaded.processor.image_processor.backend
    assert {"hardware", "threads", "dtype", "attention", "image_processor"} <= set(found.model)
    assert {"visibench", "torch", "transformers", "lmms-eval", "pillow"} <= set(found.versions)
    assert found.host["processor"] == machine.processor() != ""
    assert 1 <= found.host["cores"] <= (os.cpu_count() or 1)
    assert found.host["memory_gib"] is None or found.host["memory_gib"] > 0.5
    assert isinstance(found.host["gpus"], list)
