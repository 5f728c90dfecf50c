"""Whatever goes wrong ends as one line with an exit code that says so, and nothing ends as a success by mistake."""

import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from odd_method import PLACES, written
from refusals import assert_refused
from storing import full
from visibench.cli import main
from visibench.commands.shared import methods_in
from visibench.results.store.store import Store
from visibench.utils import interrupt, output

ODD = ["EOFError", "KeyError('a\\nb')", "SystemExit", "MemoryError", "RecursionError"]
METHODS = "visibench.evals.settings.method_spec.describe_methods"


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "does", ["sys.exit(0)", *(pytest.param(f"raise {odd}", marks=pytest.mark.slow) for odd in ODD)]
)
def test_a_method_that_fails_anywhere_is_no_success(cli, checkpoint, disk_data, place, does):
    run = ["run", "--model", checkpoint, "--data", disk_data, "--tasks", "pope", "--limit", 1, "--no-timing"]
    written(place, does)
    code, out, err = cli(*run, "--method", "./odd.py:odd", "--out", "out")
    assert (code, out) == (PLACES[place], "")
    last = err.splitlines()[-1]
    assert last.startswith("error: ")
    assert "Traceback" not in err
    if code == 2:
        assert_refused((code, out, err), "")
        (kept,) = re.findall(r"\(traceback in (\S+)\)", last)
        assert does.partition("(")[0].removeprefix("raise ") in Path(kept).read_text()
        Path(kept).unlink()
        assert not Path("out").exists()


def test_what_nobody_foresaw_is_one_line_and_a_file(cli, monkeypatch):
    def fails(*arguments):
        raise ZeroDivisionError("in\x1b[31m\nside")

    monkeypatch.setattr(METHODS, fails)
    code, out, err = cli("methods")
    assert_refused((code, out, err), "error: unforeseen: ZeroDivisionError: in\\x1b[31m (traceback in ")
    kept = Path(err.split("traceback in ")[1].rstrip(")\n"))
    assert "in fails" in kept.read_text()
    kept.unlink()


def test_lines_are_of_a_length_to_be_read(cli):
    assert_refused(cli("run", "--model", "tiny", "--method", "x" * 9999, "--tasks", "pope"), " … ")
    assert len(cli("table", "y" * 12000)[2]) < 2000


def test_a_wrong_option_names_the_help_of_its_command(cli):
    assert_refused(cli("compare", "a", "b", "c"), "extra argument(s) (c) (see `visibench compare --help`)")
    assert_refused(cli("wandb", "sync", "--nothing"), "(see `visibench wandb sync --help`)")


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        (["fastv, vtw"], ["fastv", "vtw"]),
        (["fastv:keep=0.25,visipruner@tiny"], ["fastv:keep=0.25", "visipruner@tiny"]),
        (["fastv:layer=2,keep=0.5,vtw:layer=3", "tome"], ["fastv:layer=2,keep=0.5", "vtw:layer=3", "tome"]),
        (["./a.py:a:keep=0.5,./a.py:b"], ["./a.py:a:keep=0.5", "./a.py:b"]),
    ],
)
def test_several_methods_in_one_option(texts, found):
    assert methods_in(texts) == found


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_tables_print_in_any_encoding(tmp_path, encoding, monkeypatch):
    full(Store(tmp_path))
    screen = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "argv", ["visibench", "table", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    screen.seek(0)
    assert "+0.0 -69.8" in screen.read()


def test_what_an_encoding_lacks_is_spelled(monkeypatch):
    screen = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", screen)
    output.take_all_characters()
    print("± é … ≥ ő 漢 \udcff")
    screen.seek(0)
    assert screen.read() == "± é ... >= o ? ?\n"


@pytest.mark.slow
def test_output_that_cannot_be_written_is_no_success():
    with open("/dev/full", "w") as full_device:
        command = [sys.executable, "-m", "visibench", "methods"]
        done = subprocess.run(command, stdout=full_device, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*No space left on device.*\n", done.stderr)


@pytest.mark.slow
def test_a_reader_that_goes_away_is_one_line():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "visibench", "methods"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (2, "error: nobody reads the output any more\n")


def test_sigterm_is_like_ctrl_c_with_a_code_of_its_own(cli, monkeypatch):
    monkeypatch.setattr(interrupt, "_terminated", False)
    # A shell starts what runs in its background with Ctrl-C ignored.
    before = {one: signal.signal(one, signal.default_int_handler) for one in (signal.SIGINT, signal.SIGTERM)}
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        monkeypatch.setattr(METHODS, lambda number=number: signal.raise_signal(number))
        assert cli("methods") == (code, "", "error: interrupted\n")
    for one, handler in before.items():
        signal.signal(one, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_stops_behind_a_signal_is_called_by_it(number, monkeypatch):
    """Workers say only that they were stopped."""
    monkeypatch.setattr(interrupt, "_terminated", False)
    with pytest.raises(interrupt.RAISED[number]) as raised, interrupt.stoppable(lambda text: None):  # noqa: PT012
        signal.raise_signal(number)
        raise KeyboardInterrupt
    assert type(raised.value) is interrupt.RAISED[number]


def test_ranks_that_are_none_are_refused(cli, monkeypatch):
    for given in ("0", "-1", "two"):
        monkeypatch.setenv("WORLD_SIZE", given)
        assert_refused(cli("methods"), f"WORLD_SIZE={given} is no number of processes")


REFUSED = [
    ["--device", "mps"],
    ["--device", "cpu:7"],
    ["--device", "cuda:99"],
    ["--dtype", "int8"],
    ["--attention", "flex_attention"],
    ["--attention", "paged|sdpa"],
    ["--model", "nowhere/at-all"],
    ["--model", "."],
    ["--method", "fastv:layer=77"],
    ["--method", "nosuch"],
    ["--tasks", "nosuch"],
    ["--data", "nowhere"],
    ["--wandb", "offline", "--wandb-project", "a/b"],
    ["--wandb", "offline", "--method", "fastv:layer=77"],
    ["--seed", str(2**64), "--method", "random:keep=0.5"],
]


@pytest.mark.parametrize("options", REFUSED, ids=" ".join)
def test_a_refused_command_writes_nothing(cli, checkpoint, disk_data, options, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    run = {"--model": checkpoint, "--data": disk_data, "--tasks": "pope", "--limit": 1, "--method": "none"}
    run |= dict(zip(options[::2], options[1::2], strict=True))
    (out := Path("out")).mkdir()
    (out / "sweep.yaml").write_text("methods: [none]")
    code, printed, err = cli("run", *(part for option in run.items() for part in option), "--out", out)
    assert (code, printed, err.count("\n")) == (2, "", 1)
    assert "unforeseen" not in err
    assert [(file.name, file.read_text()) for file in Path().rglob("*") if file.is_file()] == [
        ("sweep.yaml", "methods: [none]")
    ]
    assert [*Path().iterdir()] == [out]
    assert [*out.iterdir()] == [out / "sweep.yaml"]
