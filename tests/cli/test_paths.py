"""Names and files that users hand to commands, of any kind: each ends in one line that nobody calls unforeseen."""

import os
from pathlib import Path

import pytest
from PIL import Image
from refusals import assert_refused
from storing import full
from visibench.results.store import disk
from visibench.results.store.store import Store

NAMED = ["x" * 300, "x" * 300 + ".jsonl", "a/" * 3000, "é" * 140, "pipe", "pipe.yaml", "pipe.py", "", "..", "\udcff"]
"""Too long for a file system or for a path, pipes that would be read for ever, no name, and no text."""


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A run and some pipes in the folder where `cli` works."""
    monkeypatch.chdir(tmp_path)
    full(Store("run"))
    for name in ("pipe", "pipe.yaml", "pipe.jsonl", "pipe.py", "pipe.json"):
        os.mkfifo(name)
    return sorted(Path().rglob("*"))


def commands(name, checkpoint, data):
    run = {"--model": checkpoint, "--method": "none", "--tasks": "pope", "--data": data, "--out": "out"}
    for option in ("--model", "--method", "--tasks", "--data", "--include-path", "--protocol"):
        yield ["run", *(part for pair in (run | {option: name}).items() for part in pair)]
    for text in (f"./{name}.py:x", f"fastv@{name}.yaml"):
        yield ["run", *(part for pair in (run | {"--method": text}).items() for part in pair)]
    yield ["sweep", name]
    yield ["table", name]
    yield ["plot", f"{name}.json"]
    yield ["report", name]
    yield ["compare", name, "run#none:gqa"]
    yield ["check", "run", "--baseline", name or "none.json"]
    yield ["profile", name or "none"]
    yield ["analyze", "--model", checkpoint, "--data", data, "--tasks", name]
    yield ["analyze", "--model", checkpoint, "--data", data, "--against", f"{name}.json"]
    yield ["calibrate", "--model", checkpoint, "--data", name]
    yield ["show", "--model", "tiny", "--methods", "none", "--question", "What?", "--image", name]
    yield ["methods", f"{name}.py"]
    yield ["wandb", "sync", f"{name}/no", "--mode", "offline"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED, ids=[f"{name[:6]}-{len(name)}" for name in map(ascii, NAMED)])
@pytest.mark.usefixtures("there")
def test_names_of_any_kind_are_refused_in_one_line_by_every_command(name, checkpoint, disk_data, cli):
    before = sorted(Path().rglob("*"))
    protocols = ("", ".."), ("", "")  # what says nothing may stand where something is optional
    for command in commands(name, checkpoint, disk_data):
        if name in protocols[0] and {"--include-path", "--protocol"} & {*command}:
            continue
        code, out, err = cli(*command)
        assert (code, out, err.count("\n")) == (2, "", 1), (command, err)
        assert "unforeseen" not in err, command
        assert sorted(Path().rglob("*")) == before, command


def test_a_task_of_a_long_name_is_unknown_and_one_in_a_file_of_a_long_name_runs(cli, checkpoint, disk_data):
    run = ["run", "--model", checkpoint, "--method", "none", "--data", disk_data, "--out", "out", "--no-timing"]
    assert_refused(cli(*run, "--tasks", "x" * 300), "unknown task 'xxx")
    assert_refused(cli("table", "x" * 300), "no folder")
    file = Path(f"{'é' * 120}.jsonl")
    file.write_text('{"image": "0.png", "question": "What?", "answers": "yes"}\n')
    Image.new("RGB", (9, 9)).save("0.png")
    assert cli(*run, "--tasks", file)[0] == 0


def test_a_file_that_nobody_looked_at_before_is_named_with_what_to_do(cli, monkeypatch):
    def fails():
        raise PermissionError(13, "Permission denied", "some/file")

    monkeypatch.setattr("visibench.evals.settings.method_spec.describe_methods", fails)
    code, _, err = cli("methods")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("error: cannot use some/file (Permission denied): have yourself allowed to do that, or give")


def test_what_is_written_is_whole_or_not_there_and_leaves_links_and_devices_alone(tmp_path):
    target, link, pipe = tmp_path / "page.html", tmp_path / "link.html", tmp_path / "pipe"
    target.write_text("before")
    link.symlink_to(target)
    with pytest.raises(RuntimeError), disk.whole(link) as partial:  # noqa: PT012
        partial.write_text("half")
        raise RuntimeError
    assert target.read_text() == "before"
    disk.write(link, "behind")
    assert link.is_symlink()
    assert target.read_text() == "behind"
    os.mkfifo(pipe)
    disk.write(pipe, "said")
    assert pipe.read_text() == "said", "nobody may ever read a pipe"
    disk.write(Path(os.devnull), "said")
    assert Path(os.devnull).is_char_device()
    assert sorted(tmp_path.iterdir()) == [link, target, pipe]


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["wandb", "sync", "."], "wandb (File exists): fix that"),
        (["run", "--model", "tiny", "--method", "none", "--tasks", "pope", "--out", "wandb/out"], "wandb/out"),
        (["plot", "profile.json", "--out", "wandb/a.png"], "profile.json is no profile"),
    ],
)
def test_links_that_lead_in_a_circle_are_one_clear_line(cli, command, says):
    Path("wandb").symlink_to("wandb")
    Path("profile.json").write_text("{}")
    result = cli(*command)
    assert_refused(result, says)
    assert "unforeseen" not in result[2]


@pytest.mark.usefixtures("there")
def test_a_page_is_not_written_to_a_pipe(cli):
    assert_refused(cli("report", "run", "--no-images", "--out", "pipe"), "cannot write to pipe (a pipe")


def test_a_folder_that_stays_empty_goes_again(tmp_path):
    with pytest.raises(RuntimeError), disk.made(tmp_path / "a" / "b"):
        raise RuntimeError
    assert not (tmp_path / "a").exists()
    with disk.made(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").touch()
    with pytest.raises(RuntimeError), disk.made(tmp_path / "a" / "b"):
        raise RuntimeError
    assert (tmp_path / "a" / "b" / "file").exists()
