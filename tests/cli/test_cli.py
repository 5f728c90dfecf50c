"""The command line: what it prints, and what it says when it cannot."""

import csv
import gc
import json
import resource
import subprocess
import sys

import datasets
import hubdata
import pytest
import visibench
import yaml
from refusals import assert_refused
from storing import full
from visibench.commands import runs
from visibench.models import LoadedModel
from visibench.results.store.store import Store


def run(model, *more, method="none", tasks="pope"):
    return ["run", "--model", str(model), "--method", method, "--tasks", tasks, *map(str, more)]


def test_help_is_quick_and_loads_nothing_heavy():
    code = "import sys; sys.argv = ['visibench', '--help']\nfrom visibench.__main__ import main\ntry: main()\n"
    code += "finally: print([m for m in ('torch', 'transformers', 'pandas', 'pydantic') if m in sys.modules])"
    times = []
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert done.stdout.splitlines()[-1] == "[]"
    for command in ("methods", "models", "tasks", "run", "sweep", "table"):
        assert command in done.stdout
    # Processor time, because the cores may be busy with something else, which slows it all the same.
    assert min(times) <= 0.3


def test_version(cli):
    assert cli("--version") == (0, f"visibench {visibench.__version__}\n", "")


def test_no_command_prints_help(cli):
    code, out, _ = cli()
    assert code == 0
    assert "sweep" in out


@pytest.mark.parametrize(
    ("command", "known"), [("methods", "visipruner"), ("models", "tiny"), ("tasks", "textvqa_val")]
)
def test_lists(command, known, cli):
    code, out, err = cli(command)
    assert (code, err) == (0, "")
    assert known in out
    code, out, err = cli(command, "--json")
    assert (code, err) == (0, "")
    assert known in [entry["name"] for entry in json.loads(out)]


def test_method_list_spells_defaults_as_the_command_line_reads_them(cli):
    _, out, _ = cli("methods")
    assert "stages=shallow+middle+deep" in out
    (fastv,) = (entry for entry in json.loads(cli("methods", "--json")[1]) if entry["name"] == "fastv")
    layer = fastv["options"]["layer"]
    assert (layer["type"], layer["default"]) == ("int", 2)
    assert "decoder layer" in layer["meaning"]
    assert fastv["paper"] == "2403.06764"


def test_run_prints_scores_tokens_compute_and_time(cli, checkpoint, disk_data):
    arguments = run(checkpoint, "--data", disk_data, "--limit", 3, "--batch-size", 2, method="fastv:keep=0.5")
    code, out, err = cli(*arguments)
    assert code == 0
    assert "F1 %" in out
    assert "MFLOPs" in out
    assert "prefill" in out
    assert "Visual tokens at each layer's input, pope: 16 16 8 8 8 8 8 8 8 8" in out
    assert "pope 3 of 8" in out
    assert "SUBSET" in out
    assert f"visibench table runs/{checkpoint.name}" in " ".join(err.split())
    code, again, err = cli(*arguments)
    assert (code, again) == (0, out)
    assert "done already" in err


def test_run_with_json_prints_nothing_else(cli, checkpoint, disk_data, monkeypatch):
    decode = LoadedModel.decode

    def noisy(self, ids):
        print("noise")
        return decode(self, ids)

    monkeypatch.setattr(LoadedModel, "decode", noisy)
    arguments = ["--data", disk_data, "--limit", 2, "--seed", 3, "--out", "here", "--json"]
    code, out, _ = cli(*run(checkpoint, *arguments, method="random:tokens=4", tasks="gqa,mme"))
    assert code == 0
    result = json.loads(out)
    assert result["out"] == "here"
    assert [cell["config"]["task"] for cell in result["cells"]] == ["gqa", "mme"]
    assert result["cells"][0]["config"]["options"]["seed"] == 3
    assert result["cells"][0]["visual_tokens"]["mean"] == 4
    assert result["cells"][0]["executed_tflops"] > 0
    assert len(result["cells"][0]["prefill"]["times_ms"]) == 20


def test_sweep_and_table(cli, checkpoint, disk_data, tmp_path):
    config = {"model": str(checkpoint), "data": str(disk_data), "tasks": ["gqa"], "methods": ["fastv:tokens=4"]}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(config | {"timing": None}))
    code, out, err = cli("sweep", "my.yaml", "--limit", 4)
    assert code == 0
    assert "[2/2] fastv:tokens=4 · gqa" in err
    assert cli("table", "runs/my") == (0, out, "")
    for form, read in (("md", str), ("csv", lambda text: list(csv.reader(text.splitlines()))), ("json", json.loads)):
        code, text, err = cli("table", "runs/my", "--format", form)
        assert (code, err) == (0, "")
        assert read(text)
        assert (tmp_path / "runs" / "my" / f"table.{form}").read_text() == text
    # Another limit is another experiment: two tables, never one.
    assert cli("sweep", "my.yaml", "--limit", 2)[0] == 0
    assert "Table 2 of 2, not to be compared" in cli("table", "runs/my")[1]


NOWHERE = "nowhere-at-all"
UNUSABLE = [
    (run("tiny", method="fastvv:keep=0.5"), "did you mean 'fastv'"),
    (run("tiny", method="fastv:keep=0.5,lair=2"), "unknown option 'lair'"),
    (run("tiny", method="fastv:keep=-1"), "keep must lie in [0, 1]"),
    (run("tiny", method="random:tokens=-5"), "tokens"),
    (run("tiny", method="fastv:keep"), "key=value"),
    (run("tiny", "--seed", 1, method="random:keep=0.5,seed=2"), "seed is given twice"),
    (run("tiny", tasks="popr"), "did you mean 'pope'"),
    (run("tiny", tasks=","), "tasks"),
    (run("tiny", "--limit", 0), "--limit"),
    (run("tiny", "--limit", -4), "--limit"),
    (run("tiny", "--limit", "few"), "--limit"),
    (run("tiny", "--batch-size", 0), "--batch-size"),
    (run("tiny", "--data", NOWHERE), NOWHERE),
    (run("tiny", "--colour", "red"), "--colour"),
    (["run", "--model", "tiny", "--tasks", "pope"], "--method"),
    (["walk"], "walk"),
    (["sweep", NOWHERE], NOWHERE),
    (["sweep", "quick", "--limit", "0"], "--limit"),
    (["table", NOWHERE], NOWHERE),
    (["table", ".", "--format", "docx"], "docx"),
    (["table", "."], "no finished results"),
]


@pytest.mark.parametrize(
    ("arguments", "says"), UNUSABLE, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, says, cli):
    assert_refused(cli(*arguments), says)


def test_commands_that_read_do_so_without_the_garbage_collector(cli, monkeypatch, tmp_path):
    seen, read = [], runs.finished
    monkeypatch.setattr(runs, "finished", lambda *args, **named: seen.append(gc.isenabled()) or read(*args, **named))
    full(Store(tmp_path))
    code, _, err = cli("table", tmp_path)
    assert code == 0, err
    assert cli("table", tmp_path, "--columns", "odd")[0] == 2
    assert (seen, gc.isenabled()) == ([False, False], True)


def test_unknown_models_devices_and_dtypes(cli, checkpoint, disk_data):
    data = ["--data", disk_data, "--limit", 1]
    assert_refused(cli(*run("tinny", *data)), "did you mean 'tiny'")
    assert_refused(cli(*run(checkpoint, *data, "--device", "abacus")), "abacus")
    assert_refused(cli(*run(checkpoint, *data, "--dtype", "float3")), "float3")
    assert_refused(cli(*run(checkpoint, *data, method="fastv:keep=0.5,layer=99")), "layer=99")


def test_unknown_key_in_a_configuration(cli, tmp_path):
    (tmp_path / "bad.yaml").write_text("model: tiny\ntaks: [pope]\nmethods: [none]\ntasks: [pope]\n")
    assert_refused(cli("sweep", "bad.yaml"), "unknown key 'taks'; did you mean 'tasks'")


@pytest.mark.parametrize(
    ("image", "says"),
    [({"bytes": b"no image", "path": None}, "question 2 cannot be decoded"), (None, "question 2 has no image")],
)
def test_questions_without_a_readable_image(image, says, cli, checkpoint, tmp_path):
    rows = hubdata.tables()["POPE"][1].cast_column("image", datasets.Image(decode=False))
    rows = rows.map(lambda row, i: row | {"image": image} if i == 2 else row, with_indices=True)
    hubdata.save_to_disk(tmp_path / "data", POPE=rows.cast(hubdata.FEATURES["POPE"]))
    assert_refused(cli(*run(checkpoint, "--data", "data")), says, code=3)


def test_an_output_folder_that_is_a_file(cli, checkpoint, disk_data, tmp_path):
    (tmp_path / "file").write_text("")
    assert_refused(cli(*run(checkpoint, "--data", disk_data, "--out", "file")), "cannot write")


def test_ctrl_c_says_how_to_go_on(cli, checkpoint, disk_data, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("visibench.evals.answers.generate.answer", interrupted)
    code, out, err = cli(*run(checkpoint, "--data", disk_data))
    assert (code, out) == (130, "")
    assert "goes on where" in err

    monkeypatch.setattr("visibench.evals.compute.prefills.prefills", interrupted)
    code, out, err = cli("flops", "--model", checkpoint, "--method", "none", "--data", disk_data)
    assert (code, out) == (130, "")
    assert err.strip() == "error: interrupted", "nothing is kept that it could go on from"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--set", "limit=-3", "--limit", 10], "limit is given twice, as limit=-3 and limit=10"),
        (["--set", "feature_cache_gb=3", "--feature-cache-gb", 1], "feature_cache_gb is given twice"),
        (["--set", "out=zzz", "--out", "yyy"], "out is given twice"),
        (["--only", ""], "--only names no method"),
        (["--only-tasks", ","], "--only-tasks names no task"),
        (["--only-tasks", "gqa", "--set", "limit={nope: 5}"], "limit names task 'nope'"),
    ],
)
def test_nothing_given_to_a_sweep_is_passed_over(cli, tmp_path, monkeypatch, options, says):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("sweep", "quick", *map(str, options))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err
    assert not list(tmp_path.iterdir())
