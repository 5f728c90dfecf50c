"""A run folder that is damaged, foreign or mixed: every command that reads one says so in one line and exits with 2."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from refusals import assert_refused
from storing import config, frame, put
from visibench.results.gate import baseline as baselines
from visibench.results.store.records import Failure, ScoreRecord, digest
from visibench.results.store.store import Store

COMMANDS = {
    "table": ["table", "run"],
    "plot": ["plot", "run", "--kind", "pareto"],
    "compare": ["compare", "run#none:gqa", "run#fastv:gqa"],
    "check": ["check", "run", "--baseline", "b.json"],
    "report": ["report", "run", "--out", "page.html", "--no-images"],
    "published": ["table", "run", "--against", "published"],
}


def answered(store, label, n=12, **changes):
    right = np.arange(n) % (2 if label == "none" else 3) == 0
    samples = frame(
        [f"i{i // 3}" for i in range(n)],
        right,
        pixels="p",
        visual_tokens=[[16, 8]] * n,
        kv_lengths=[[20, 12]] * n,
        executed_macs=[1e8] * n,
    )
    score = ScoreRecord(key="exact_match", title="exact match", value=float(right.mean()), maximum=1)
    settings = {key: changes.pop(key) for key in ("limit",) if key in changes}
    return put(store, config(label, **settings), samples=samples, scores=[score], **changes)


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """A folder with a run of two cells and the baseline made of it."""
    folder = tmp_path_factory.mktemp("intact")
    store = Store(folder / "run")
    for label in ("none", "fastv"):
        answered(store, label)
    baselines.save(baselines.baseline_of(store.cells()), folder / "b.json")
    return folder


@pytest.fixture
def run(intact, tmp_path) -> Store:
    """A copy to spoil, in the folder where `cli` works."""
    shutil.copytree(intact, tmp_path, dirs_exist_ok=True)
    return Store(tmp_path / "run")


def edited(file, **changes):
    """Other values of some keys; None: the key goes."""
    content = json.loads(file.read_text()) | changes
    file.write_text(
        json.dumps({key: value for key, value in content.items() if key not in changes or value is not None})
    )


def early(cell):
    """A cell as early versions wrote it, without hashes of the outcome."""
    edited(cell / "metrics.json", samples_hash=None, checksum=None)
    return cell / "samples.parquet"


def rewritten(file, change):
    change(pd.read_parquet(file)).to_parquet(file, index=False)


def flipped(file):
    """One bit of the first answers differs; header and footer are whole."""
    content = bytearray(file.read_bytes())
    content[60] ^= 1
    file.write_bytes(bytes(content))


def replaced(file, content=None):
    """A folder in a file's place, or other bytes in it."""
    file.unlink()
    file.mkdir() if content is None else file.write_bytes(content)


Damages = dict[str, tuple[Callable[[Path], object], str]]

SAMPLES: Damages = {
    "truncated": (lambda cell: replaced(cell / "samples.parquet", b"PAR1"), "damaged"),
    "cut in half": (lambda cell: halved(cell / "samples.parquet"), "damaged"),
    "a bit flipped": (lambda cell: flipped(cell / "samples.parquet"), "its hash differs"),
    "rewritten": (lambda cell: rewritten(cell / "samples.parquet", lambda old: old.assign(score=1.0)), "hash differs"),
    "missing": (lambda cell: (cell / "samples.parquet").unlink(), "cannot read"),
    "a folder": (lambda cell: replaced(cell / "samples.parquet"), "cannot read"),
    "no hash, truncated": (lambda cell: replaced(early(cell), b"PAR1"), "no whole Parquet file"),
    "no hash, cut in half": (lambda cell: halved(early(cell)), "no whole Parquet file"),
    "no hash, rows lost": (
        lambda cell: rewritten(early(cell), lambda old: old[:-1]),
        "11 questions, but its metrics 12",
    ),
    "no hash, column lost": (lambda cell: rewritten(early(cell), lambda old: old.drop(columns="image")), "'image'"),
    "no hash, words for numbers": (
        lambda cell: rewritten(early(cell), lambda old: old.assign(score="good")),
        "no numbers in column 'score'",
    ),
    "no hash, numbers for words": (
        lambda cell: rewritten(early(cell), lambda old: old.assign(answer=1)),
        "no text in column 'answer'",
    ),
}


def halved(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


RECORDS: Damages = {
    "config edited": (lambda cell: edited(cell / "config.json", batch_size=3), "config.json was changed after its run"),
    "config missing": (lambda cell: (cell / "config.json").unlink(), "cannot read"),
    "config of a newer schema": (lambda cell: edited(cell / "config.json", schema_version=2), "knows 1"),
    "metrics edited": (lambda cell: scored(cell, 0.99), "metrics.json was changed after its run"),
    "metrics of another cell": (lambda cell: edited(cell / "metrics.json", config_hash="0", checksum=""), "changed"),
} | {
    f"{name} {what}": (lambda cell, name=name, damage=damage: damage(cell / f"{name}.json"), says)
    for name in ("config", "metrics")
    for what, damage, says in (
        ("cut in half", halved, "no whole JSON file"),
        ("empty", lambda file: replaced(file, b""), "no whole JSON file"),
        ("no text", lambda file: replaced(file, b"\xff\xfe\x00"), "no whole JSON file"),
        ("a list", lambda file: replaced(file, b"[]"), "schema version None, this visibench knows 1"),
        ("a folder", replaced, "cannot read"),
        ("of an older schema", lambda file: edited(file, schema_version=0), "schema version 0, this visibench knows 1"),
        ("with an unknown key", lambda file: edited(file, colour="red"), "colour"),
    )
}


def scored(cell, value):
    scores = json.loads((cell / "metrics.json").read_text())["scores"]
    edited(cell / "metrics.json", scores=[scores[0] | {"value": value}])


@pytest.mark.parametrize("damage", ["metrics edited", "metrics of another cell", "metrics cut in half"])
def test_a_sweep_takes_no_damaged_outcome_for_done(damage, run):
    cell = config("fastv")
    assert run.find(cell)
    spoil, _ = RECORDS[damage]
    spoil(run.path(cell))
    assert run.find(cell) is None


def emptied(root):
    shutil.rmtree(root)
    root.mkdir()


def turned_to_file(root):
    shutil.rmtree(root)
    root.write_text("")


def with_file(root, name):
    emptied(root)
    (root / name).write_text("")


def moved_down(root):
    root.rename("was")
    shutil.copytree("was", root / "was")


def unfinished(root):
    for file in root.glob("cells/*/metrics.json"):
        file.unlink()


RUNS: Damages = {
    "missing": (shutil.rmtree, "no folder 'run' (it does not exist)"),
    "a file": (turned_to_file, "no folder 'run' (it is a file)"),
    "empty": (emptied, "no finished results in 'run' (it is empty)"),
    "not a run": (lambda root: with_file(root, "x"), "this is not the folder of a run"),
    "a folder above": (moved_down, "did you mean 'run/was'"),
    "cells a file": (lambda root: with_file(root, "cells"), "cannot read run/cells"),
    "none finished": (unfinished, "2 cells were begun and none is done"),
    "a cell copied": (
        lambda root: shutil.copytree(next(root.glob("cells/*none*")), root / "cells" / "copy"),
        "hold the same cell twice",
    ),
}


@pytest.mark.usefixtures("run")
def test_cells_that_were_asked_different_parts_of_a_task_are_no_part_of_a_baseline(cli):
    answered(Store("part"), "none")
    answered(Store("part"), "fastv", 6, limit=6)
    refused = cli("check", "part", "--baseline", "b.json", "--subset")
    assert_refused(refused, "was asked other questions of gqa than the rest: give the folder of one sweep")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("damage", SAMPLES)
def test_damaged_samples(damage, command, run, cli):
    spoil, says = SAMPLES[damage]
    refused(command, says, cli, lambda: spoil(run.path(config("fastv"))), names="fastv")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("damage", RECORDS)
def test_damaged_or_foreign_records(damage, command, run, cli):
    spoil, says = RECORDS[damage]
    refused(command, says, cli, lambda: spoil(run.path(config("fastv"))), names="fastv")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("damage", RUNS)
def test_what_is_no_run(damage, command, run, cli):
    spoil, says = RUNS[damage]
    refused(command, says, cli, lambda: spoil(run.root), names="run")


def refused(command, says, cli, spoil, names):
    spoil()
    result = cli(*COMMANDS[command])
    assert_refused(result, says)
    assert names in result[2], "the line names the file or folder"


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "published"])
def test_other_data_under_the_same_settings(command, run, cli):
    """The questions read alike and the settings agree, but the pixels differ."""
    answered(run, "fastv", data_hash="new")
    assert_refused(cli(*COMMANDS[command]), "data")


@pytest.mark.parametrize("command", ["table", "plot"])
def test_cells_that_are_not_finished_are_named(command, run, cli):
    (run.path(config("fastv")) / "metrics.json").unlink()
    code, out, err = cli(*COMMANDS[command])
    assert (code, err.count("\n")) == (0, 1)
    assert "1 of 2 cells of run are not finished (first: gqa-fastv-s0" in err
    assert "fastv" not in out
    run.fail(config("fastv"), [Failure(doc_id=3, error="no image", traceback="")])
    code, _, err = cli(*COMMANDS[command])
    assert (code, err.count("\n")) == (0, 1)
    assert "1 failed: see run/cells/gqa-fastv-s0" in err


def test_what_a_reader_refuses_a_sweep_runs_again(run):
    assert run.done(config("fastv")) is not None
    for spoil, _ in SAMPLES.values():
        shutil.rmtree(run.path(config("fastv")))
        spoil(answered(run, "fastv").path)
        assert run.done(config("fastv")) is None


def test_runs_of_versions_that_knew_fewer_fields_pass(run, cli):
    """A checksum is over what stands in the file, not over what this version would write."""
    file = run.path(config("fastv")) / "metrics.json"
    content = json.loads(file.read_text())
    del content["note"], content["categories"], content["environment"]["host"], content["environment"]["code"]
    del content["checksum"]
    file.write_text(json.dumps(content | {"checksum": digest(content)}))
    assert cli(*COMMANDS["table"])[0] == 0
    del content["samples_hash"]
    file.write_text(json.dumps(content))
    assert cli(*COMMANDS["table"])[0] == 0


def test_intact_runs_pass(run, cli):
    for command in COMMANDS.values():
        assert cli(*command)[0] == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_every_rename_is_synced(run, monkeypatch):
    """Each rename is followed by a sync of the folder that holds the name."""
    done: list[Path] = []
    replace = os.replace

    def replaced(old, new):
        replace(old, new)
        done.append(new)

    monkeypatch.setattr("os.replace", replaced)
    monkeypatch.setattr("os.fsync", lambda handle: done.append(Path(os.readlink(f"/proc/self/fd/{handle}"))))
    folder = answered(run, "tome").path
    (run.root / "sweep.yaml").unlink(missing_ok=True)
    run.save("sweep.yaml", "model: tiny\n")
    for file in (folder / "config.json", folder / "samples.parquet", folder / "metrics.json", run.root / "sweep.yaml"):
        at = done.index(file)
        partial, *renamed = done[at - 1 : at + 2]
        assert partial.match(f"{file.name}.*.partial")
        assert renamed == [file, file.parent]
    assert done.index(folder.parent) < done.index(folder / "config.json"), "the new folder's own name comes first"
