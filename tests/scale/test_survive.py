"""Cells that are interrupted, fail in part, or meet a full disk: nothing lost, nothing mixed, nothing hidden."""

import errno
import json
import os
import signal
from dataclasses import dataclass

import datasets
import hubdata
import pytest
import torch
import visibench
from rich.console import Console
from storing import DENSE, outcome, pope_config
from visibench.errors import IncompleteError, StorageError
from visibench.evals.answers import generate
from visibench.evals.answers.cell import run_cell
from visibench.evals.answers.cell_spec import CellSpec
from visibench.evals.answers.checkpoint import Batch, KeptAnswers
from visibench.evals.answers.generate import HOPELESS, Bridge, Nonfinite, answer
from visibench.evals.sweeps.config import parse_config
from visibench.evals.sweeps.sweep import sweep
from visibench.evals.tasks.tasks import load_tasks
from visibench.methods import Budgeted, Forward, Keep, top
from visibench.results.store.samples import Answer
from visibench.results.store.store import Store
from visibench.results.tables.render import render
from visibench.results.tables.tables import build


@dataclass(frozen=True)
class Dice(Budgeted):
    """Draws tokens from torch's own generator, as the code of a paper might."""

    name = "dice"
    title = "Dice"
    hook_points = ("decoder",)

    def begin(self, layout, geometry):
        return DiceForward(self)


class DiceForward(Forward):
    def __init__(self, method):
        self.method = method

    def layer_input(self, layer, view):
        if layer != 1:
            return None
        scores = torch.rand(view.present.shape, dtype=torch.float64)
        return Keep(top(scores, self.method.budget(view.layout.visual.device_counts), view.present))


@pytest.fixture
def pope(disk_data):
    return load_tasks(["pope"], str(disk_data))[0]


@pytest.fixture
def ran(monkeypatch) -> list[int]:
    """Sizes of the batches that the model really answered."""
    sizes, generate = [], Bridge._generate

    def counted(self, inputs, *rest):
        ids = generate(self, inputs, *rest)
        sizes.append(len(inputs["input_ids"]))
        return ids

    monkeypatch.setattr(Bridge, "_generate", counted)
    return sizes


def after(count):
    """Stops the work once so many batches are answered."""
    seen = []

    def on_batch(questions):
        seen.append(questions)
        if len(seen) == count:
            raise KeyboardInterrupt

    return on_batch


# ---- going on where it stopped ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [Dice(keep=0.5), visibench.load_method("random", keep=0.25, seed=3)], ids=str)
def test_a_cell_stopped_after_any_batch_ends_like_one_in_one_go(method, loaded, pope, tmp_path, ran):
    straight = run_cell(loaded, CellSpec(pope_config(method), method), pope, Store(tmp_path / "straight"))
    torch.manual_seed(99)
    for done in (1, 2):
        store = Store(tmp_path / str(done))
        with pytest.raises(KeyboardInterrupt):
            run_cell(loaded, CellSpec(pope_config(method), method), pope, store, after(done))
        assert store.done(pope_config(method)) is None
        ran.clear()
        resumed = run_cell(loaded, CellSpec(pope_config(method), method), pope, store)
        assert ran == [3, 3, 2][done:]
        assert outcome(resumed) == outcome(straight)
        assert {file.name for file in resumed.path.iterdir()} == {"config.json", "samples.parquet", "metrics.json"}


def test_shards_add_up_to_the_cell(loaded, pope, tmp_path, ran):
    method = Dice(keep=0.5)
    straight = run_cell(loaded, CellSpec(pope_config(method, batch_size=2), method), pope, Store(tmp_path / "straight"))
    store, config = Store(tmp_path / "shards"), pope_config(method, batch_size=2)
    folder = store.begin(config)
    ran.clear()
    for shard in (2, 0, 1):
        answer(loaded, CellSpec(config, method), pope, folder, shard=(shard, 3))
    assert len(list(folder.glob("answers-*of3.jsonl"))) == 3
    assert ran == [2, 2, 2, 2]
    assert outcome(run_cell(loaded, CellSpec(config, method), pope, store)) == outcome(straight)
    assert ran == [2, 2, 2, 2], "the last pass scores and answers nothing"
    assert not list(folder.glob("answers*"))


def test_changed_images_never_mix(loaded, pope, tmp_path, ran):
    store, config = Store(tmp_path / "run"), pope_config()
    with pytest.raises(KeyboardInterrupt):
        run_cell(loaded, CellSpec(config, DENSE), pope, store, after(3))
    rows = hubdata.tables()["POPE"][1]
    rows = rows.map(lambda row, i: row | {"image": hubdata.picture("pink")} if i == 7 else row, with_indices=True)
    hubdata.save_to_disk(tmp_path / "data", POPE=rows.cast(hubdata.FEATURES["POPE"]))
    changed = load_tasks(["pope"], str(tmp_path / "data"))[0]
    ran.clear()
    resumed = run_cell(loaded, CellSpec(config, DENSE), changed, store)
    assert len(ran) == 1, "only the batch with the changed image"
    assert outcome(resumed) == outcome(run_cell(loaded, CellSpec(config, DENSE), changed, Store(tmp_path / "fresh")))


def made(number) -> Batch:
    texts = {"prompt": f"is it {number}?", "output": "ja\u2028nein\r\n", "pixels": "p", "kept": "8A=="}
    tokens = {"prompt_tokens": 9, "new_tokens": 1, "prompt_visual_tokens": 4}
    layers = {"visual_tokens": [4, 2], "kv_lengths": [9, 7], "executed_macs": 0.1 + number}
    record = Answer(**texts, **tokens, **layers, nonfinite=False, latency_ms=7.5, batch_questions=1)
    return Batch(f"key{number}", {number: record}, {"ffn": 0.1 + number}, hardware="cpu")


def test_a_file_cut_anywhere_keeps_its_whole_lines_and_takes_new_ones(tmp_path):
    whole = KeptAnswers(tmp_path, "b")
    lengths = [(tmp_path / "answers.jsonl").stat().st_size]
    for number in range(3):
        whole.add(made(number))
        lengths.append((tmp_path / "answers.jsonl").stat().st_size)
    content = (tmp_path / "answers.jsonl").read_bytes()
    for length in range(0, len(content) + 1, 23):
        (tmp_path / "answers.jsonl").write_bytes(content[:length])
        cut = KeptAnswers(tmp_path, "b")
        kept = max(sum(length >= end for end in lengths) - 1, 0)
        assert list(cut.batches) == [f"key{number}" for number in range(kept)]
        cut.add(made(7))
        again = KeptAnswers(tmp_path, "b").batches
        assert again == {batch.asked: batch for batch in [*map(made, range(kept)), made(7)]}


def test_answers_to_something_else_count_for_nothing(tmp_path):
    KeptAnswers(tmp_path, "old").add(made(0))
    (tmp_path / "answers-1of2.jsonl").write_bytes(b"\xff\x00 no JSON\n{}\n")
    assert KeptAnswers(tmp_path, "new").batches == {}
    assert KeptAnswers(tmp_path, "old").batches == {}, "the new one has begun the file again"


def test_damaged_lines_are_asked_again(tmp_path):
    KeptAnswers(tmp_path, "b").add(made(0))
    with (tmp_path / "answers.jsonl").open("ab") as stream:
        stream.write(b'{"asked": "x"}\nnonsense\n[1]\n{"asked": "y", "records": {"1": {"prompt": "p"}}}\n')
    KeptAnswers(tmp_path, "b").add(made(1))
    assert list(KeptAnswers(tmp_path, "b").batches) == ["key0", "key1"]


# ---- memory, failures, logits -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_batches_without_room_run_in_halves_and_tables_say_so(loaded, pope, tmp_path, ran, monkeypatch):
    method, at = visibench.load_method("fastv", keep=0.5), loaded.adapter.layers[5]
    config = pope_config(method, batch_size=4)
    straight = run_cell(loaded, CellSpec(config, method), pope, Store(tmp_path / "straight"))
    ran.clear()

    def full(module, inputs, options):
        if len(inputs[0] if inputs else options["hidden_states"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = at.register_forward_pre_hook(full, with_kwargs=True)
    done = run_cell(loaded, CellSpec(config, method), pope, Store(tmp_path / "halves"))
    hook.remove()
    assert ran == [2, 2, 2, 2]
    assert done.metrics.remarks == ["8 of 8 answered in batches smaller than 4 (out of memory)"]
    assert done.samples()["output"].equals(straight.samples()["output"])
    assert [cell.samples()["batch_questions"].unique().tolist() for cell in (done, straight)] == [[2], [4]]
    assert done.metrics.remarks[0] in render(build([done]), "md")
    assert straight.metrics.remarks == []


def test_a_question_that_fails_leaves_the_cell_unfinished(loaded, disk_data, tmp_path, ran):
    rows = hubdata.tables()["POPE"][1].cast_column("image", datasets.Image(decode=False))
    bad = {"image": {"bytes": b"no image", "path": None}}
    rows = rows.map(lambda row, i: row | bad if i == 4 else row, with_indices=True)
    hubdata.save_to_disk(tmp_path / "data", POPE=rows.cast(hubdata.FEATURES["POPE"]))
    (damaged,), (mended,) = load_tasks(["pope"], str(tmp_path / "data")), load_tasks(["pope"], str(disk_data))
    store, config = Store(tmp_path / "run"), pope_config()
    with pytest.raises(IncompleteError, match=r"1 of 8 questions failed, question 4, DataError: .*failures\.jsonl"):
        run_cell(loaded, CellSpec(config, DENSE), damaged, store)
    (line,) = (store.path(config) / "failures.jsonl").read_text().splitlines()
    assert json.loads(line)["doc_id"] == 4
    assert "Traceback" in json.loads(line)["traceback"]
    assert store.done(config) is None
    assert store.unfinished() == [store.path(config)]
    ran.clear()
    done = run_cell(loaded, CellSpec(config, DENSE), mended, store)
    assert len(ran) == 1, "the batch of the failed question, as a whole"
    assert outcome(done) == outcome(run_cell(loaded, CellSpec(config, DENSE), mended, Store(tmp_path / "straight")))
    assert not (done.path / "failures.jsonl").exists()


@pytest.fixture
def settings(checkpoint, disk_data) -> dict:
    where = {"model": str(checkpoint), "data": str(disk_data), "tasks": ["pope", "gqa"], "timing": None}
    return where | {"methods": ["none", "fastv:keep=0.5"], "batch_size": 1, "limit": 6}


def test_a_failing_method_does_not_stop_the_others(settings, tmp_path, monkeypatch):
    tried = []

    def begin(self, layout, geometry):
        tried.append(1)
        raise RuntimeError("no such head\nreally")

    monkeypatch.setattr(type(visibench.load_method("fastv", keep=0.5)), "begin", begin)
    monkeypatch.setattr(generate, "HOPELESS", 5)
    with pytest.raises(IncompleteError) as caught:
        sweep(parse_config(settings, "test"), tmp_path, Console(quiet=True))
    assert [(done.config.method, done.config.task) for done in caught.value.cells] == [
        ("none", "pope"),
        ("none", "gqa"),
    ]
    assert caught.value.exit_code == 3
    message = str(caught.value)
    assert message.startswith("2 of 4 cells are incomplete")
    assert "fastv:keep=0.5 · gqa · seed 0: 5 of 6 questions failed, first question" in message
    assert "RuntimeError: no such head; given up after 5 failures in a row, 1 question not asked: see" in message
    assert len(tried) == 2 * 5 < 2 * HOPELESS
    assert len(build(Store(tmp_path).cells())[0].rows) == 1


def test_a_cell_that_is_given_up_says_so_and_counts_what_is_left(loaded, pope, tmp_path, monkeypatch):
    """Of eight questions one by one: four answered, three failed; of the last, what another shard has is not left."""
    run, fail = Bridge._run, []

    def failing(self, chunk):
        if fail:
            raise RuntimeError("no such head")
        return run(self, chunk)

    monkeypatch.setattr(Bridge, "_run", failing)
    monkeypatch.setattr(generate, "HOPELESS", 3)
    config, store = pope_config(batch_size=1), Store(tmp_path)
    answer(loaded, CellSpec(config, DENSE), pope, folder := store.begin(config), shard=(7, 8))
    with pytest.raises(KeyboardInterrupt):
        run_cell(loaded, CellSpec(config, DENSE), pope, store, after(3))
    fail.append(1)
    with pytest.raises(IncompleteError, match=r"^3 of 8 questions failed, .* in a row, 1 question not asked: see"):
        run_cell(loaded, CellSpec(config, DENSE), pope, store)
    *failed, last = map(json.loads, (folder / "failures.jsonl").read_text().splitlines())
    assert len(failed) == 3
    assert (last["doc_id"], last["error"]) == (None, "given up after 3 failures in a row, 1 question not asked")
    monkeypatch.setattr(generate, "HOPELESS", 4)
    with pytest.raises(IncompleteError, match=r"^4 of 8 questions failed, .*: no such head: see"):
        run_cell(loaded, CellSpec(config, DENSE), pope, store)


def test_a_failing_scorer_keeps_the_answers(loaded, pope, tmp_path, ran, monkeypatch):
    store, config = Store(tmp_path), pope_config()
    with monkeypatch.context() as patched:
        patched.setattr("visibench.evals.answers.score._metrics", lambda results: 1 / 0)
        with pytest.raises(IncompleteError, match="failed, ZeroDivisionError"):
            run_cell(loaded, CellSpec(config, DENSE), pope, store)
    assert [failure.doc_id for failure in store.failures(config)] == [None]
    assert ran == [3, 3, 2]
    run_cell(loaded, CellSpec(config, DENSE), pope, store)
    assert ran == [3, 3, 2]


def test_nan_and_infinite_logits_are_counted(loaded, pope, tmp_path):
    calls = []

    def poison(module, inputs, output):
        calls.append(output.shape[0])
        if len(calls) == 1:
            output[0, -1, 5] = float("nan")
            output[2, -1, 7] = float("inf")
        return output

    hook = loaded.model.lm_head.register_forward_hook(poison)
    done = run_cell(loaded, CellSpec(pope_config(), DENSE), pope, Store(tmp_path))
    hook.remove()
    assert done.metrics.nonfinite == done.samples()["nonfinite"].sum() == 2
    assert done.metrics.remarks == ["2 of 8 with NaN or infinite logits"]


def test_forbidden_tokens_are_no_fault():
    watch, low = Nonfinite(), float("-inf")
    fine, nothing = torch.tensor([[low, 0.0], [1.0, 2.0]]), torch.tensor([[0.0, 1.0], [low, low]])
    assert watch(None, fine) is fine
    assert watch.rows() == [False, False]
    watch(None, nothing)
    watch(None, fine)
    assert watch.rows() == [False, True]


# ---- disks and Ctrl-C ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_full_disk_at_any_write_is_one_line_and_loses_nothing(loaded, pope, tmp_path, monkeypatch, ran):
    config, fsync, writes, fails = pope_config(limit=2, batch_size=1), os.fsync, [], 0
    straight = run_cell(loaded, CellSpec(config, DENSE), pope, Store(tmp_path / "straight"))

    def full(handle):
        writes.append(handle)
        if len(writes) == fails:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    for fails in range(1, 99):
        store = Store(tmp_path / str(fails))
        writes.clear()
        ran.clear()
        try:
            run_cell(loaded, CellSpec(config, DENSE), pope, store)
            break
        except StorageError as error:
            said = str(error)
        assert "No space left" in said
        assert "\n" not in said
        assert not list(store.root.rglob("*.partial"))
        done = store.done(config) or run_cell(loaded, CellSpec(config, DENSE), pope, store)
        assert outcome(done) == outcome(straight)
        assert len(ran) <= 3, "at most the batch that could not be stored ran twice"
    assert fails > 12


def test_a_full_disk_behind_a_scorer_ends_the_sweep(loaded, pope, tmp_path, monkeypatch):
    def full(*arguments, **options):
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise RuntimeError("scorer failed") from error

    monkeypatch.setattr("visibench.evals.answers.score._simple_evaluate", full)
    with pytest.raises(StorageError, match="no room left"):
        run_cell(loaded, CellSpec(pope_config(), DENSE), pope, Store(tmp_path))


def test_ctrl_c_finishes_the_batch_that_runs(settings, tmp_path, monkeypatch, ran):
    generate, config = Bridge._generate, parse_config(settings | {"tasks": ["pope"], "methods": ["none"]}, "test")

    def pressed(self, *arguments):
        if len(ran) == 2:
            signal.raise_signal(signal.SIGINT)
        return generate(self, *arguments)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patched:
        patched.setattr(Bridge, "_generate", pressed)
        with pytest.raises(KeyboardInterrupt):
            sweep(config, tmp_path, Console(quiet=True))
    assert signal.getsignal(signal.SIGINT) is before
    assert len(ran) == 3, "the third batch was running"
    assert len(next(tmp_path.glob("cells/*/answers.jsonl")).read_text().splitlines()) == 1 + 3
    sweep(config, tmp_path, Console(quiet=True))
    assert len(ran) == 6


def test_a_second_ctrl_c_stops_at_once(settings, tmp_path, monkeypatch, request):
    # A shell's background jobs are told to ignore it; then there would be nothing to go back to.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    went_on = []

    def pressed(self, *arguments):
        signal.raise_signal(signal.SIGINT)
        went_on.append(1)
        signal.raise_signal(signal.SIGINT)
        went_on.append(2)

    monkeypatch.setattr(Bridge, "_generate", pressed)
    with pytest.raises(KeyboardInterrupt):
        sweep(parse_config(settings, "test"), tmp_path, Console(quiet=True))
    assert went_on == [1]
