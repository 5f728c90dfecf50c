"""Weights & Biases: what wandb's own reader finds in what was written, offline."""

import base64
import json
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from accountless import KEY, environment
from PIL import Image
from storing import config, frame, put
from visibench.errors import OptionError
from visibench.reports.image_loader import DIMMED, ImageLoader
from visibench.reports.wandb.content import summary
from visibench.reports.wandb.sink import Destination
from visibench.results.figures import plots
from visibench.results.store.records import ScoreRecord
from visibench.results.store.store import Store
from visibench.results.tables.tables import build

IMAGES = [f"i{n // 2}" for n in range(40)]


def answered(store, method, right, keep=1.0, **named):
    options = {} if method == "none" else {"keep": keep}
    score = [float(n % 10 < 10 * right) for n in range(40)]
    samples = frame(IMAGES, score, output="a word", kv_lengths=[[30, 20 if keep < 1 else 30]] * 40)
    samples["visual_tokens"] = [[16, round(16 * keep)]] * 40
    samples["executed_macs"] = 2e9
    value = ScoreRecord(key="exact_match", title="exact match", value=statistics.fmean(score), maximum=1)
    return put(store, config(method, options=options, **named), samples=samples, scores=[value])


def full(folder: Path) -> Store:
    store = Store(folder)
    answered(store, "none", 0.9)
    answered(store, "fastv", 0.6, 0.5)
    store.save("sweep.yaml", "model: tiny\n")
    return store


def records(file: Path):
    """The records of a run, by kind, read with wandb's own reader."""
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    reader, found = DataStore(), defaultdict(list)
    reader.open_for_scan(str(file))
    while (data := reader.scan_data()) is not None:
        record = Record.FromString(data)
        kind = record.WhichOneof("record_type")
        found[kind].append(getattr(record, kind))
    return found


def values(items) -> dict:
    """Items of a summary or history by their (joined) keys."""
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder synced offline, twice: (its path, standard error, where HOME was, runs by name)."""
    base = tmp_path_factory.mktemp("wandb")
    (base / "home").mkdir()
    (base / "cwd").mkdir()
    full(base / "run")
    code = "import sys; from visibench.cli import app; a = sys.argv[1:]; [app(a, standalone_mode=False) for _ in '12']"
    arguments = ["wandb", "sync", str(base / "run"), "--mode", "offline", "--tags", "a,b", "--samples", "5"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=base / "cwd",
        env=environment(base / "home", WANDB_API_KEY=KEY),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = [records(file) for file in sorted((base / "run" / "wandb").glob("offline-run-*/*.wandb"))]
    return base, done.stderr, {run["run"][0].display_name: run for run in found}


FASTV = "fastv · gqa · seed 0"


@pytest.mark.slow
def test_one_run_for_each_cell_and_one_for_the_sweep(written):
    _, said, runs = written
    assert set(runs) == {"none · gqa · seed 0", FASTV, "run"}
    for run in runs.values():
        (told,) = {(r.project, r.run_group, tuple(r.tags)) for r in run["run"]}
        assert told == ("visibench", "run", ("a", "b"))
        assert [exit.exit_code for exit in run["exit"]] == [0]
    assert [run["run"][0].job_type for run in runs.values()].count("cell") == 2
    assert "2 of 2 cells and their tables" in said


def test_syncing_again_writes_nothing(written):
    base, said, _ = written
    assert len(list((base / "run" / "wandb").glob("offline-run-*"))) == 3
    assert "0 of 2 cells in group 'run'" in said


def test_config_is_the_cells_with_its_environment(written):
    base, _, runs = written
    (cell,) = (cell for cell in Store(base / "run").cells() if cell.config.method == "fastv")
    found = {item.key: json.loads(item.value_json) for item in runs[FASTV]["run"][0].config.update}
    assert cell.config.model_dump(mode="json").items() <= found.items()
    assert found["environment"] == cell.metrics.environment.model_dump(mode="json")


def test_summary_holds_scores_with_intervals_and_costs(written):
    base, _, runs = written
    found = {key: value for part in runs[FASTV]["summary"] for key, value in values(part.update).items()}
    (table,) = build(Store(base / "run").cells())
    interval = next(row for row in table.rows if row.method == "fastv").evidence.scores["gqa"]["exact_match"]
    expected = {
        "gqa/exact_match": 0.6,
        "gqa/exact_match/ci_low": interval.low,
        "gqa/exact_match/ci_high": interval.high,
        "score_percent": 60,
        "retained_percent": 100 * 0.6 / 0.9,
        "visual_tokens/prompt": 16,
        "visual_tokens/T": 12,
        "visual_tokens/last": 8,
        "compute/gflops": 2,
        "compute/ffn_gflops": 2,
        "kv_cache/entries": 25,
        "prefill_ms/median": 2,
        "prefill_ms/iqr": 1,
    }
    assert {key: found.get(key) for key in expected} == pytest.approx(expected)
    assert interval.low < 0.6 < interval.high


def test_table_of_answers_is_bounded(written):
    base, _, runs = written
    (step,) = runs[FASTV]["history"]
    path = values(step.item)["samples.path"]
    (file,) = (base / "run" / "wandb").glob(f"offline-run-*/files/{path}")
    table = json.loads(file.read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [row["doc_id"] for row in rows] == list(range(5))
    assert {row["output"] for row in rows} == {"a word"}
    assert {row["visual_tokens_mean"] for row in rows} == {12}
    assert {row["executed_gflops"] for row in rows} == {2}


def test_artifacts_hold_the_cells_files_and_the_tables(written):
    base, _, runs = written
    manifests = {
        (artifact.type, artifact.name): {file.path: file for file in artifact.manifest.contents}
        for run in runs.values()
        for artifact in run["artifact"]
    }
    (cell,) = (cell for cell in Store(base / "run").cells() if cell.config.method == "fastv")
    sent = manifests["cell", cell.path.name]
    assert set(sent) == {"config.json", "metrics.json", "samples.parquet"}
    for name, file in sent.items():
        assert Path(file.local_path).read_bytes() == (cell.path / name).read_bytes()
    assert set(manifests["sweep", "run-tables"]) == {"table.md", "table.csv", "table.json", "sweep.yaml"}


def test_sweep_run_holds_the_table_and_every_figure_with_its_data(written):
    base, _, runs = written
    (step,) = runs["run"]["history"]
    found = values(step.item)
    media = base / "run" / "wandb"
    for kind in plots.KINDS:
        (image,) = media.glob(f"offline-run-*/files/{found[f'plots/{kind}.path']}")
        assert image.read_bytes().startswith(b"\x89PNG")
        (data,) = media.glob(f"offline-run-*/files/{found[f'plots/{kind}_data.path']}")
        assert json.loads(data.read_text())["data"]
    (file,) = media.glob(f"offline-run-*/files/{found['table.path']}")
    table = json.loads(file.read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [(row["method"], row["gqa:exact_match"]) for row in rows] == [("none", 0.9), ("fastv", 0.6)]
    assert [row["retained_percent"] for row in rows] == pytest.approx([100, 100 * 0.6 / 0.9])
    assert [row["executed_tmacs_question_alone"] for row in rows] == pytest.approx([2e-3, 2e-3])


def test_nothing_private_and_nothing_elsewhere(written):
    base, _, runs = written
    assert list((base / "cwd").iterdir()) == []
    assert [path for path in (base / "home").rglob("*") if path.is_file()] == []
    for run in runs.values():
        record = run["run"][0]
        assert not record.host
        assert not record.git.remote_url
        assert not {"stats", "output", "output_raw", "environment"} & set(run)
    for file in (base / "run").rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file
        assert file.name not in ("requirements.txt", "wandb-metadata.json", "output.log")


def test_retained_needs_a_dense_cell_on_the_same_questions(tmp_path):
    store = full(tmp_path)
    cells = {cell.config.method: cell for cell in store.cells()}
    assert "retained_percent" not in summary(cells["fastv"], [])
    assert summary(cells["none"], [])["gqa/exact_match"] == 0.9


def test_a_control_has_a_summary_of_its_own(tmp_path):
    store = full(tmp_path)
    control = answered(store, "fastv", 0.3, 0.5, label="control of fastv", control=True)
    (dense,) = (cell for cell in store.cells() if cell.config.method == "none")
    told = summary(control, [dense])
    assert [told[name] for name in ("gqa/exact_match", "retained_percent")] == pytest.approx([0.3, 100 * 0.3 / 0.9])


def test_the_same_cell_has_the_same_run_and_other_groups_have_others():
    assert Destination("a").run_id("x") == Destination("a", mode="offline", rows=3).run_id("x")
    assert Destination("a").run_id("x") != Destination("b").run_id("x")


def test_a_key_that_cannot_be_one_is_refused_unprinted(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", "short-secret")
    with pytest.raises(OptionError, match="40") as refused:
        Destination("a").check()
    assert "short-secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("viewer", "says"),
    [
        (ValueError("verify your API key"), "does not take the API key (ValueError: verify your API key)"),
        (ConnectionError("refused"), "does not answer (ConnectionError: refused): nothing was sent"),
        (SimpleNamespace(username="me", entity="me", teams=["lab"]), "cannot write to entity 'other': it has lab, me"),
    ],
)
def test_key_and_entity_are_asked_for_before_the_work(viewer, says, monkeypatch, tmp_path, cli):
    import wandb

    class Api:
        def __init__(self, timeout): ...

        @property
        def viewer(self):
            if isinstance(viewer, Exception):
                raise viewer
            return viewer

    full(tmp_path)
    monkeypatch.setattr(wandb, "Api", Api)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr("visibench.reports.wandb.sink.prepare", lambda folder: (folder / "wandb").mkdir())
    monkeypatch.setattr("visibench.reports.wandb.sink.Sink.send", lambda *given: pytest.fail("too early"))
    code, _, err = cli("wandb", "sync", str(tmp_path), "--entity", "other")
    assert code == 2
    assert says in " ".join(err.split())


def test_cells_that_ask_the_same_share_its_images(tmp_path, monkeypatch):
    (cell,) = asked(tmp_path).cells()
    drawn, loader = [], ImageLoader()
    make = loader._pictures
    monkeypatch.setattr(loader, "_pictures", lambda *given: drawn.append(given[-2]) or make(*given))
    first, second = (loader.overlaid(cell, [0, 1]) for _ in range(2))
    assert drawn == [0, 1]
    assert first[0]["image"].tobytes() == second[0]["image"].tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["flops --model tiny --method none", "methods"])
def test_other_commands_do_not_load_wandb(command):
    code = "import sys\nfrom visibench.cli import app\napp(sys.argv[1:], standalone_mode=False)\n"
    code += "print('wandb' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *command.split()], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def asked(folder: Path) -> Store:
    """Two real questions, of which half of the image stayed in the first, and merged tokens alone in the second."""
    from visibench.evals.tasks.tasks import load_tasks

    (task,) = load_tasks(["gqa"])
    samples = frame(["a", "b"], [1.0, 0.0], output="a word", prompt_visual_tokens=144)
    samples["prompt"] = [task.question(i)[0] for i in range(2)]
    samples["visual_tokens"] = [[144, 72], [144, 5]]
    samples["kept"] = [base64.b64encode(np.packbits(np.arange(144) < n).tobytes()).decode() for n in (72, 0)]
    value = ScoreRecord(key="exact_match", title="exact match", value=0.5, maximum=1)
    store = Store(folder)
    put(store, config("fastv", options={"keep": 0.5}), samples=samples, scores=[value])
    return store


def test_images_show_which_tokens_stayed(tmp_path):
    (cell,) = asked(tmp_path).cells()
    found = ImageLoader().overlaid(cell, [0, 1])
    assert [set(images) for images in found.values()] == [{"image", "kept"}, {"image"}]
    image, kept = (np.asarray(found[0][name], dtype=float) for name in ("image", "kept"))
    half = len(image) // 2
    assert (kept[:half] == image[:half]).all()
    assert np.abs(kept[half:] - DIMMED * image[half:]).max() <= 1


@pytest.mark.slow
def test_tables_hold_the_images(tmp_path):
    asked(tmp_path / "run")
    (tmp_path / "home").mkdir()
    arguments = ["wandb", "sync", str(tmp_path / "run"), "--mode", "offline"]
    code = "import sys; from visibench.cli import app; app(sys.argv[1:], standalone_mode=False)"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment(tmp_path / "home"), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    files = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    tables = [a for file in files for a in records(file)["artifact"] if a.type == "run_table" and "samples" in a.name]
    (entries,) = ({entry.path: Path(entry.local_path) for entry in table.manifest.contents} for table in tables)
    content = json.loads(entries.pop("samples.table.json").read_text())
    rows = [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]
    shown = [row[name]["path"] for row in rows for name in ("image", "kept") if row[name]]
    assert len(shown) == 3, "the second question has no picture of what stayed"
    assert set(shown) == set(entries)
    (size,) = {Image.open(entries[path]).size for path in shown}
    assert size[0] == size[1]
