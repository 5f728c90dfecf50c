"""Methods in single files: found, refused, told apart by content, and put through the invariants as a command."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import visibench
import yaml
from support import collate, make_batch
from visibench.errors import DataError, UnknownNameError, VisibenchError
from visibench.evals.settings.method_spec import MethodSpec, parse
from visibench.evals.sweeps.cells import cell_specs
from visibench.evals.sweeps.config import load_config, parse_config
from visibench.methods import Ranked, register
from visibench.methods.base import RankedForward

EXAMPLE = Path(visibench.__file__).parent / "examples" / "my_method.py"
NOISY = """
import torch
from visibench.methods import Scored, register

@register("noisy", "Noisy")
class Noisy(Scored):
    "Keep tokens by chance."
    hook_points = ("projector",)

    def score(self, view):
        return torch.rand(view.present.shape)
"""


def config(method, **more):
    return parse_config({"model": "tiny", "tasks": ["pope"], "methods": [method], **more}, "test")


def digests(method):
    return [cell.config.digest() for cell in cell_specs(config(method)) if cell.config.method != "none"]


def test_example_keeps_the_tokens_of_largest_norm(llava):
    (sample,) = make_batch([(5, 9, 1)])
    norms = llava.model.get_image_features(pixel_values=sample["pixel_values"]).pooler_output[0].norm(dim=-1)
    with visibench.prune(llava, parse(f"{EXAMPLE}:largest_norm:tokens=5")) as session:
        llava(**sample)
    assert session.trace.kept(0)[0].nonzero().flatten().tolist() == norms.topk(5).indices.sort().values.tolist()


def test_text_and_yaml_name_the_same_method(tmp_path, monkeypatch):
    """Also without its name, where the file has one; relative to the working directory."""
    shutil.copy(EXAMPLE, tmp_path / "mine.py")
    monkeypatch.chdir(tmp_path)
    method = parse("./mine.py:largest_norm:keep=0.25")
    assert str(method) == "largest_norm:keep=0.25"
    assert parse("mine.py:keep=0.25") == method
    content = {
        "model": "tiny",
        "tasks": ["pope"],
        "methods": [{"name": "largest_norm", "path": "mine.py", "keep": 0.5}],
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content))
    loaded, _ = load_config("sweep.yaml", ["methods.largest_norm.keep=0.25"])
    cell = cell_specs(loaded)[-1]
    assert cell.method == method
    assert (cell.config.method, cell.config.label) == ("largest_norm", "largest_norm:keep=0.25")
    assert (cell.config.method_file, cell.config.reference) == (
        str(tmp_path / "mine.py"),
        f"{tmp_path / 'mine.py'}:largest_norm",
    )
    assert "largest_norm" not in visibench.list_methods()


def test_content_of_the_file_counts_and_its_place_does_not(tmp_path):
    first, second = tmp_path / "a.py", tmp_path / "b.py"
    for file in (first, second):
        shutil.copy(EXAMPLE, file)
    assert digests(f"{first}:keep=0.5") == digests(f"{second}:keep=0.5")
    second.write_text(second.read_text() + "\n# changed\n")
    assert digests(f"{first}:keep=0.5") != digests(f"{second}:keep=0.5")


def test_registered_methods_are_stored_as_ever():
    dense, fastv = (cell.config for cell in cell_specs(config("fastv:keep=0.5")))
    assert not {"method_file", "method_hash"} & set(json.loads(fastv.model_dump_json()))
    assert (dense.reference, fastv.reference) == ("none", "fastv")


@pytest.mark.parametrize(
    ("code", "reference", "error", "message"),
    [
        (None, "mine.py", DataError, "No such file or directory"),
        ("x = 1\n1 / 0", "mine.py:mine", VisibenchError, r"mine.py cannot be imported \(line 2\): ZeroDivisionError"),
        ("def f(:", "mine.py", VisibenchError, "mine.py cannot be imported.*SyntaxError"),
        ("import sys\nsys.exit(3)", "mine.py", VisibenchError, r"\(line 2\): SystemExit: 3"),
        ("x = 1", "mine.py", VisibenchError, "registers no method: decorate its class with @register"),
        (NOISY, "mine.py:nosy", UnknownNameError, "no method 'nosy' in .*; did you mean 'noisy'"),
        (NOISY.replace('"noisy"', '"fastv"'), "mine.py", VisibenchError, "method 'fastv' is registered twice"),
        (NOISY.replace("projector", "projected"), "mine.py", VisibenchError, "did you mean 'projector'"),
        (NOISY + NOISY.replace("oisy", "isy"), "mine.py", UnknownNameError, "several methods in .*: name one"),
    ],
)
def test_unusable_files_are_refused_in_one_line(code, reference, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if code is not None:
        Path("mine.py").write_text(code)
    with pytest.raises(error, match=message) as caught:
        MethodSpec.parse(reference)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_method_travels_to_another_process_and_not_to_another_file(tmp_path):
    file = tmp_path / "mine.py"
    shutil.copy(EXAMPLE, file)
    (tmp_path / "method").write_bytes(pickle.dumps(parse(f"{file}:largest_norm:keep=0.25")))
    code = f"import pickle, pathlib; print(pickle.loads(pathlib.Path({str(tmp_path / 'method')!r}).read_bytes()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280)
    assert done.stdout == "largest_norm:keep=0.25\n", done.stderr
    file.write_text(file.read_text() + "\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280)
    assert "is not the file it was when this run began" in done.stderr


def test_method_of_a_file_runs(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(EXAMPLE, "mine.py")
    command = ["run", "--model", "tiny", "--method", "./mine.py:largest_norm:keep=0.25", "--tasks", "pope"]
    code, out, err = cli(*command, "--limit", "2", "--no-timing", "--json")
    assert code == 0, err
    (cell,) = json.loads(out)["cells"]
    assert cell["config"]["method"] == "largest_norm"
    assert len(cell["config"]["method_hash"]) == 16
    assert set(cell["visual_tokens"]["per_layer"]) == {36}
    assert cli("table", "runs/tiny")[0] == 0  # what was stored is read again


@pytest.mark.slow
def test_check_method_passes_the_example_and_says_what_breaks(cli, tmp_path):
    code, out, _ = cli("check-method", str(EXAMPLE))
    assert code == 0
    assert "largest_norm: all 20 invariants hold" in out
    assert max(map(len, out.splitlines())) <= 80
    (tmp_path / "noisy.py").write_text(NOISY)
    code, out, _ = cli("check-method", f"{tmp_path / 'noisy.py'}:noisy", "--json")
    assert code == 1
    broken = {result["what"] for result in json.loads(out)["noisy"] if not result["holds"]}
    assert "the result depends on the inputs alone, and leaves torch's generator as it was" in broken
    assert "KV caches hold what the trace says: the text, and the visual tokens that are left" not in broken
    assert cli("check-method", str(tmp_path / "none.py"))[0] == 2


# ---- what is refused when a method is registered, or runs without what it needs -------------------------------------


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"hook_points": ("vision",)}, r"mine acts at 'vision' and needs vision\(\)"),
        ({"hook_points": ("decoder",)}, r"mine acts at 'decoder' and needs begin\(\)"),
        ({"hook_points": ("decode",), "begin": lambda *_: None}, "unknown hook point 'decode'; did you mean 'decoder'"),
        ({"stage": ("vision",), "vision": lambda *_: None}, "mine has no hook_points: say where it acts"),
    ],
)
def test_methods_that_would_do_nothing_are_refused(members, message):
    with pytest.raises(VisibenchError, match=message):
        register("mine", "Mine")(type("Mine", (visibench.methods.Method,), members))


def test_scores_that_were_never_seen_raise(llava):
    class Blind(Ranked):
        name, title, hook_points = "blind", "Blind", ("attention", "decoder")

        def left(self, layout, geometry):
            return {2: layout.visual.device_counts}

    batch = collate(make_batch([(5, 9, 1)]))
    forward = RankedForward(Blind(), {2: torch.tensor([16])})
    with pytest.raises(VisibenchError, match="blind: no scores for layer 2"):
        forward.layer_input(2, batch)
