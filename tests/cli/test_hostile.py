"""What users and crashes may hand to a command: YAML that hangs or breaks parsers, odd names and paths, odd files."""

import csv
import os
import stat
import time
from pathlib import Path

import pytest
from refusals import assert_refused
from storing import config, full, put
from visibench.commands.shared import run_folder
from visibench.errors import OptionError
from visibench.evals.sweeps.config import parse_config
from visibench.evals.sweeps.sweep import sweep
from visibench.results.store import disk
from visibench.results.store.store import Store
from visibench.utils import yaml_files

BASE = "model: tiny\ntasks: [gqa]\nmethods: [none]\n"
LAUGHS = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)
)
YAML = {
    "date": f"{BASE}limit: 2001-99-99\n",
    "number": f"{BASE}limit: 0x_\n",
    "tag": f"{BASE}limit: !!int abc\n",
    "float": f"{BASE}limit: !!float 1e\n",
    "binary": f"{BASE}out: !!binary x\n",
    "python": f"{BASE}out: !!python/object/apply:os.system [ls]\n",
    "nesting": f"{BASE}out: {'[' * 2000}{']' * 2000}\n",
    "aliases": LAUGHS + BASE,
    "itself": f"{BASE}out: &a [*a]\n",
    "huge number": f"{BASE}limit: {'9' * 5000}\n",
    "large": f"{BASE}limit: 99999999999999999999\n",
    "two documents": f"{BASE}---\n{BASE}",
    "no text": b"\xff\xfe\x00\xd8",
    "nothing": "",
    "key": "? [1, 2]\n: 3\n",
    "merge": f"{BASE}<<: 7\n",
    "infinite": f"{BASE}feature_cache_gb: .inf\n",
    "endless": f"{BASE}timing: {{repeats: 99999999999999999999}}\n",
}


@pytest.mark.parametrize("kind", YAML)
def test_yaml_of_any_kind_is_refused_in_one_line(cli, kind):
    content = YAML[kind]
    Path("odd.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused = cli("sweep", "odd.yaml")
    assert_refused(refused, "")
    assert "unforeseen" not in refused[2]
    assert [*Path().iterdir()] == [Path("odd.yaml")]


def test_aliases_that_stay_small_are_fine():
    assert yaml_files.parse("a: &a [1, 2]\nb: [*a, *a]\n") == {"a": [1, 2], "b": [[1, 2], [1, 2]]}
    assert yaml_files.parse("") is None


def test_includes_over_many_steps_are_refused(cli):
    for number in range(1500):
        Path(f"{number}.yaml").write_text(f"include: {number + 1}.yaml\n")
    assert_refused(cli("sweep", "0.yaml"), "0.yaml includes files over more than 50 steps: include them directly")


@pytest.mark.parametrize("value", ["2001-99-99", "[", "*a", "!!int abc", "[" * 2000, "\x00", "9" * 5000])
def test_values_of_any_kind_are_refused_in_one_line(cli, value):
    refused = cli("sweep", "quick", "--set", f"limit={value}")
    assert_refused(refused, "")
    assert "unforeseen" not in refused[2]


@pytest.mark.parametrize("label", ["", " ", "a\nb", "a\x1b[31m", "a\x00", "\u202e", "x" * 501, "\ud800"])
def test_names_that_cannot_be_shown_are_refused(label):
    content = {"model": "tiny", "tasks": ["gqa"], "methods": [{"name": "none", "label": label}]}
    with pytest.raises(OptionError, match=r"label: expected a name of 1 to 500 characters|surrogates"):
        parse_config(content, "x.yaml")


@pytest.mark.parametrize("name", ["a" * 300, "b/" * 3000, "\x00", "-", "~", "..", "nul\n"])
def test_paths_of_any_kind_are_one_line(cli, name):
    for command in (["sweep", name], ["table", name], ["run", "--model", name, "--method", "none", "--tasks", "gqa"]):
        code, out, err = cli(*command)
        assert (code, out, err.count("\n")) == (2, "", 1), command
    assert [*Path().iterdir()] == []


def test_a_run_lies_in_runs_whatever_the_way_to_its_model(tmp_path, monkeypatch):
    inner = tmp_path / "work" / "inner"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    for model, folder in (
        ("..", "work"),
        (".", "inner"),
        ("../..", tmp_path.name),
        ("/", "model"),
        ("a/tiny/", "tiny"),
    ):
        assert run_folder(model) == Path("runs") / folder


def test_a_run_does_not_lie_among_the_files_of_its_model(checkpoint, disk_data):
    content = {"model": str(checkpoint), "data": str(disk_data), "tasks": ["gqa"], "methods": ["none"]}
    before = sorted(checkpoint.rglob("*"))
    for out in (checkpoint, checkpoint / "runs" / "x"):
        with pytest.raises(OptionError, match=r"lies in that of model .*: choose another --out"):
            sweep(parse_config(content, "test"), out, None)
    assert sorted(checkpoint.rglob("*")) == before


@pytest.mark.parametrize("command", ["analyze", "calibrate"])
def test_nothing_measured_lies_there_either(command, cli, checkpoint, disk_data):
    before = sorted(checkpoint.rglob("*"))
    asked = [command, "--model", checkpoint, "--data", disk_data, "--out", checkpoint / "measured"]
    assert_refused(cli(*asked), "choose another --out")
    assert sorted(checkpoint.rglob("*")) == before


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--threads", 10**9),
        ("--repeats", 10**12),
        ("--layers", 10**12),
        ("--batch-sizes", 10**12),
        ("--lengths", f"{10**12}+576"),
    ],
)
def test_a_profile_of_absurd_sizes_is_refused(option, value, cli):
    assert_refused(cli("profile", "--model", "tiny", "--methods", "vtw", option, value), "")


def test_spreadsheets_find_no_formulas(cli, tmp_path):
    store, labels = Store(tmp_path), ["=cmd|' /C calc'!A0", "+1+1", "@SUM(1)", "-2+3", "plain"]
    put(store, config("none"))
    for seed, label in enumerate(labels):
        put(store, config("fastv", seed=seed, label=label))
    code, out, _ = cli("table", tmp_path, "--format", "csv")
    assert code == 0
    entries = [entry for row in csv.DictReader(out.splitlines()) for entry in row.values()]
    assert {f"'{label}" for label in labels[:4]} | {"plain"} <= {*entries}
    assert not [one for one in entries if one.startswith(("=", "@"))]


def test_pipes_are_not_read_for_ever(cli, tmp_path):
    store = full(Store(tmp_path))
    for name in ("metrics.json", "samples.parquet", "config.json"):
        file = store.path(config("none")) / name
        content = file.read_bytes()
        file.unlink()
        os.mkfifo(file)
        assert_refused(cli("table", tmp_path), f"cannot read {file} (no regular file)")
        file.unlink()
        file.write_bytes(content)
    assert cli("table", tmp_path)[0] == 0
    os.mkfifo("odd.yaml")
    assert_refused(cli("sweep", "odd.yaml"), "no configuration 'odd.yaml'")


def test_emptied_checksums_are_not_accepted(cli, tmp_path):
    store = full(Store(tmp_path))
    file = store.path(config("none")) / "metrics.json"
    cell = store.find(config("none"))
    file.write_text(cell.metrics.model_copy(update={"checksum": ""}).model_dump_json())
    assert_refused(cli("table", tmp_path), "was changed after its run")


def test_finished_runs_may_lie_where_nothing_may_be_written(tmp_path, monkeypatch):
    store = full(Store(tmp_path))
    (store.path(config("none")) / "answers.jsonl").write_text("left over")
    before = stat.S_IMODE(tmp_path.stat().st_mode)

    def refused(*arguments, **options):
        raise OSError(30, "Read-only file system")

    for name in ("unlink", "write_text", "write_bytes"):
        monkeypatch.setattr(Path, name, refused)
    assert store.done(config("none").model_copy(update={"label": "anew"})) is not None
    assert stat.S_IMODE(tmp_path.stat().st_mode) == before


def test_what_cannot_be_written_says_what_to_do(tmp_path):
    for number, mend in ((28, "make room"), (13, "have yourself allowed"), (36, "use shorter names"), (5, "fix that")):
        with (
            pytest.raises(disk.StorageError, match=rf"\(.*\): {mend}.*, or choose another --out"),
            disk.writing(tmp_path),
        ):
            raise OSError(number, os.strerror(number))


def test_leftovers_of_crashed_writers_go(tmp_path):
    store = Store(tmp_path)
    store.save("table.md", "a")
    old, new = tmp_path / "table.md.1234.partial", tmp_path / "table.csv.5678.partial"
    for file, age in ((old, 25), (new, 1)):
        file.write_text("half")
        os.utime(file, (time.time() - age * 3600,) * 2)
    store.save("table.md", "a")
    assert old.exists(), "nothing new was written"
    store.save("table.md", "b")
    assert not old.exists()
    assert new.exists(), "another process may be writing it"


def test_sending_a_folder_that_is_not_there_makes_none(cli):
    assert_refused(cli("wandb", "sync", "nosuch", "--mode", "offline"), "no folder 'nosuch'")
    assert [*Path().iterdir()] == []
