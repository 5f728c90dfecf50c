"""Random values, files and methods: whatever is handed to a command, it ends with a code that says how, in one line.

Seeded, so that every run asks the same; VISIBENCH_FUZZ=100 asks a hundred times as much, with another seed each time.
"""

import io
import json
import os
import shutil
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from odd_method import PLACES, written
from PIL import Image
from storing import full
from visibench.cli import main
from visibench.results.store.store import Store

MORE = int(os.environ.get("VISIBENCH_FUZZ", "1"))
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300 * MORE)]
CODES = {0, 2, 3, 130, 143}


def asked(count):
    """So many examples, times what was asked for."""
    return settings(
        max_examples=count * MORE,
        deadline=None,
        derandomize=MORE == 1,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def ended(*arguments, foreseen=True) -> tuple[int, str]:
    """Run a command; its code and what it said, once that is as it must be."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["visibench", *map(str, arguments)]
    try:
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as stopped:
            main()
    finally:
        sys.argv = before
    said = err.getvalue()
    assert stopped.value.code in CODES, said
    assert "Traceback" not in said
    assert not foreseen or "unforeseen" not in said, said
    if stopped.value.code == 2:
        assert [line for line in said.splitlines() if line.startswith("error: ")] == said.splitlines()[-1:], said
        assert len(said.splitlines()[-1]) < 2000
    return stopped.value.code, said


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


ODD = """-1 0 1e999 nan .. / ~ = , : a=b tiny none pope fastv:keep=2 fastv:keep=nan fastv:layer=-1 2001-99-99 [[ {a:1}
fastv:keep=0.5,keep=0.4 staged:enter=5,exit=2 cuda:9 true""".split()
ODD += [
    "",
    "a\nb",
    "\x1b[2J",
    "\x00",
    "é" * 200,
    "\ud800",
    "9" * 30,
    f"random:seed={'9' * 30}",
    f"random:tokens={10**30}",
]
WORDS = st.text(max_size=12) | st.sampled_from(ODD)
OPTIONS = {
    "run": ["--model", "--method", "--tasks", "--device", "--dtype", "--seed", "--limit", "--batch-size", "--data"],
    "sweep": ["--set", "--only", "--only-tasks", "--limit", "--workers", "--shard", "--executor", "--wandb"],
    "table": ["--format", "--columns", "--margin", "--against"],
    "compare": ["--margin", "--json"],
    "flops": ["--method", "--model", "--lengths"],
    "published": ["--format"],
    "budget": ["--target", "--methods", "--task", "--samples", "--weights", "--lengths", "--layers"],
    "profile": ["--methods", "--weights", "--batch-sizes", "--lengths", "--repeats", "--warmup", "--threads"],
    "calibrate": ["--methods", "--tasks", "--data", "--evaluation", "--target", "--limit", "--kl", "--spare", "--seed"],
    "analyze": ["--tasks", "--data", "--limit", "--layers", "--only", "--against", "--seed"],
    "show": ["--image", "--question", "--methods", "--out", "--weights"],
    "plot": ["--kind", "--task", "--format", "--width", "--out"],
    "report": ["--questions", "--out"],
    "check": ["--baseline"],
    "reproduce": ["--limit", "--data"],
    "check-method": [],
    "wandb": ["--mode", "--project", "--group", "--tags", "--samples"],
}
PLACES_OF = {
    "sweep": ["quick"],
    "table": ["nosuch"],
    "compare": ["a#b:c", "d"],
    "plot": ["nosuch"],
    "report": ["nosuch"],
    "check": ["nosuch"],
    "check-method": ["nosuch.py"],
    "wandb": ["sync", "nosuch"],
}
# Of what could run, a last word that is none keeps it from doing so.
LAST = {"run": ["--tasks", "nosuch"], "sweep": ["--only-tasks", "nosuch"], "reproduce": ["nosuch"]}
LAST |= {key: ["--model", "nosuch"] for key in ("budget", "profile", "calibrate", "analyze", "show")}


@asked(80)
@given(st.data())
def test_options(data):
    command = data.draw(st.sampled_from(sorted(OPTIONS)))
    option = st.sampled_from(OPTIONS[command] or ["--json"])
    given_options = data.draw(st.lists(st.tuples(option, WORDS), min_size=1, max_size=3))
    with TemporaryDirectory() as folder, chdir(folder):
        words = [part for option in given_options for part in option]
        ended(command, *PLACES_OF.get(command, []), *words, *LAST.get(command, []))
        assert contents(Path(folder)) == {}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = """model models tasks methods limit batch_size seeds budget timing data device dtype include add out references
feature_cache_gb attention nosuch""".split()


READERS = {
    "preset": (["method", "options", "source", "model", "evidence"], {"method": "fastv", "source": "x"}),
    "protocol": (["system", "template", "image_aspect", "min_pixels", "suffix", "scoring", "extends"], {}),
    "task": (["task", "dataset_path", "dataset_kwargs", "include", "doc_to_text", "metric_list"], {"task": "odd"}),
    "profile": (["model", "methods", "lengths", "batch_sizes", "threads", "repeats", "layers"], {}),
}
"""Kinds of YAML beside a sweep's: keys, and values to begin with."""


@asked(40)
@given(st.data(), st.binary(max_size=4), st.integers(0))
def test_yaml_of_other_kinds(data, noise, place):
    kind = data.draw(st.sampled_from(sorted(READERS)))
    keys, base = READERS[kind]
    content = base | data.draw(st.dictionaries(st.sampled_from(keys), VALUES, max_size=3))
    content = {"odd": content} if kind == "protocol" else content
    text = yaml.safe_dump(content, allow_unicode=True).encode("utf-8", "surrogatepass")
    at = place % (len(text) + 1)
    run = ["run", "--model", "nosuch", "--data", ".", "--method", "none"]
    asks = {
        "preset": [*run, "--tasks", "pope", "--method", "fastv@odd.yaml"],
        "protocol": [*run, "--tasks", "pope", "--protocol", "odd.yaml:odd"],
        "task": [*run, "--tasks", "odd.yaml"],
        "profile": ["profile", "odd.yaml", "--model", "nosuch"],
    }
    with TemporaryDirectory() as folder, chdir(folder):
        Path("odd.yaml").write_bytes(text[:at] + noise + text[at:])
        before = contents(Path(folder))
        ended(*asks[kind])
        assert contents(Path(folder)) == before


@asked(50)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3), st.binary(max_size=4), st.integers(0))
def test_yaml(changes, noise, place):
    base = {"model": "tiny", "tasks": ["pope"], "methods": ["fastv:keep=0.5"]} | changes
    text = yaml.safe_dump(base, allow_unicode=True).encode("utf-8", "surrogatepass")
    at = place % (len(text) + 1)
    with TemporaryDirectory() as folder, chdir(folder):
        Path("odd.yaml").write_bytes(text[:at] + noise + text[at:])
        before = contents(Path(folder))
        ended("sweep", "odd.yaml", "--only-tasks", "nosuch")
        assert contents(Path(folder)) == before


def spoilt(file: Path, noise: bytes, place: int, how: str) -> None:
    content = file.read_bytes()
    at = place % (len(content) + 1)
    changed = {"cut": content[:at], "put in": content[:at] + noise + content[at:], "replaced": noise}
    file.write_bytes(changed[how])


HOW = st.sampled_from(["cut", "put in", "replaced"])


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    full(Store(folder))
    return folder


COMMANDS = [
    ["table", "run", "--format", "json"],
    ["plot", "run", "--out", "pictures"],
    ["report", "run", "--no-images", "--out", "page.html"],
    ["compare", "run#none:gqa", "run#fastv:gqa"],
    ["check", "run", "--baseline", "nosuch"],
]


@asked(20)
@given(st.integers(0), st.binary(min_size=1, max_size=9), st.integers(0), HOW, st.sampled_from(COMMANDS))
def test_run_folders(stored, which, noise, place, how, command):
    with TemporaryDirectory() as folder, chdir(folder):
        run = shutil.copytree(stored, Path(folder) / "run")
        files = sorted(file for file in run.rglob("*") if file.is_file())
        spoilt(files[which % len(files)], noise, place, how)
        before = contents(run)
        ended(*command)
        assert contents(run) == before


@asked(10)
@given(st.integers(0), st.binary(min_size=1, max_size=9), st.integers(0), HOW)
def test_bytes_of_checkpoints(checkpoint, disk_data, which, noise, place, how):
    with TemporaryDirectory() as folder:
        model = shutil.copytree(checkpoint, Path(folder) / "model")
        files = sorted(file for file in model.iterdir() if file.is_file())
        spoilt(files[which % len(files)], noise, place, how)
        run = ["run", "--model", model, "--data", disk_data, "--tasks", "pope", "--limit", 1, "--no-timing"]
        before = contents(model)
        ended(*run, "--method", "none", "--out", Path(folder) / "out")
        assert contents(model) == before


FORMATS = [("PNG", "RGB"), ("PNG", "P"), ("PNG", "I;16"), ("PNG", "LA"), ("JPEG", "RGB"), ("JPEG", "CMYK")]
FORMATS += [("GIF", "P"), ("TIFF", "F"), ("TIFF", "RGB"), ("WEBP", "RGB"), ("BMP", "RGB"), ("DDS", "RGB")]


def image(kind: str, mode: str) -> bytes:
    values, stream = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8), io.BytesIO()
    made = Image.fromarray(values[..., 0].astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(values)
    (made if made.mode == mode else made.convert(mode)).save(stream, kind)
    return stream.getvalue()


@asked(25)
@given(st.sampled_from(FORMATS), st.integers(0), st.binary(min_size=1, max_size=9), st.integers(0, 200), HOW)
def test_bytes_of_images(checkpoint, kind, which, noise, place, how):
    with TemporaryDirectory() as folder, chdir(folder):
        files = [Path("0.png"), Path("mine.jsonl")]
        files[0].write_bytes(image(*kind))
        files[1].write_text('{"image": "0.png", "question": "What?", "answers": "yes"}\n')
        spoilt(files[which % 4 == 0], noise, place, how)
        before = contents(Path(folder))
        code, said = ended("run", "--model", checkpoint, "--tasks", "mine.jsonl", "--no-timing", "--method", "none")
        assert code == 0 or (code == 2 and "mine.jsonl" in said and contents(Path(folder)) == before)


ENTRIES = VALUES | st.sampled_from([*ODD, ["0.png", "0.png"], {"path": "0.png"}, {"bytes": "x"}, "/dev/stdin"])


@asked(12)
@given(st.sampled_from(["image", "question", "answers", "id", "category", "choices", "odd"]), ENTRIES)
def test_entries_of_questions(checkpoint, key, value):
    with TemporaryDirectory() as folder, chdir(folder):
        Path("0.png").write_bytes(image("PNG", "RGB"))
        row = {"image": "0.png", "question": "What?", "answers": "yes", key: value}
        Path("mine.jsonl").write_text(json.dumps(row, default=str))
        code, said = ended("run", "--model", checkpoint, "--tasks", "mine.jsonl", "--no-timing", "--method", "none")
        assert code == 0 or (code == 2 and "mine.jsonl" in said)


NUMBERS = (
    st.integers(-2, 300)
    | st.integers(-1, 5).map(lambda power: 10 ** (3 * power))
    | st.none()
    | st.text(max_size=3)
    | st.floats(-1, 1)
    | st.just([])
    | st.just({})
)


@asked(10)
@given(st.integers(0), NUMBERS)
def test_sizes_of_checkpoints(checkpoint, disk_data, which, value):
    with TemporaryDirectory() as folder:
        model = shutil.copytree(checkpoint, Path(folder) / "model")
        config = json.loads((model / "config.json").read_text())
        keys = [
            (part, key) for part in (config, config["text_config"], config["vision_config"]) for key in sorted(part)
        ]
        part, key = keys[which % len(keys)]
        part[key] = value
        (model / "config.json").write_text(json.dumps(config))
        run = ["run", "--model", model, "--data", disk_data, "--tasks", "pope", "--limit", 1, "--no-timing"]
        ended(*run, "--method", "none", "--out", Path(folder) / "out")


DOES = [
    "raise Exception('a\\nb')",
    "sys.exit(0)",
    "raise MemoryError",
    "raise OSError(28, 'x')",
    "return 7",
    "return self",
]


@asked(5)
@given(st.sampled_from(sorted(PLACES)), st.sampled_from(DOES))
def test_methods(checkpoint, disk_data, place, does):
    if place == "module" and does.startswith("return"):
        return
    with TemporaryDirectory() as folder, chdir(folder):
        written(place, does)
        Path("out").mkdir()
        Path("out/sweep.yaml").write_text("methods: [none]")
        run = ["run", "--model", checkpoint, "--data", disk_data, "--tasks", "pope", "--limit", 1, "--no-timing"]
        code, _ = ended(*run, "--method", "./odd.py:odd", "--out", "out", foreseen=False)
        assert code in (2, 3) or does.startswith("return")
        assert code != 2 or contents(Path("out")) == {"sweep.yaml": b"methods: [none]"}
