"""The bridge: lmms-eval asks and scores, a pruned model answers."""

import base64
import subprocess
import sys

import datasets
import hubdata
import numpy as np
import pytest
import torch
import visibench
from visibench.errors import DataError, InputError, OptionError, UnknownNameError
from visibench.evals.answers.generate import DEFAULT_MAX_NEW_TOKENS
from visibench.evals.answers.score import evaluate
from visibench.evals.tasks import tasks as tasks_module
from visibench.evals.tasks.tasks import TASKS, load_tasks

DENSE = visibench.load_method("none")
CONSTANT = {"gqa": "yes", "mme": "Yes.", "textvqa_val": "Yes", "pope": "yes"}
# What lmms-eval itself prints for these answers on these questions.
KNOWN = {
    "gqa": {"exact_match": 0.125},
    "mme": {"mme_perception_score": 150.0, "mme_cognition_score": 50.0},
    "textvqa_val": {"exact_match": 0.9875},
    "pope": {
        "pope_accuracy": 0.5,
        "pope_precision": 0.5,
        "pope_recall": 1.0,
        "pope_f1_score": 2 / 3,
        "pope_yes_ratio": 0.5,
    },
}


def task(name, root):
    return load_tasks([name], str(root))[0]


@pytest.mark.parametrize("layout", ["disk_data", "hub_data"])
def test_constant_answers_get_the_known_scores(layout, loaded, request):
    for task in load_tasks(list(CONSTANT), str(request.getfixturevalue(layout))):
        loaded.decode = lambda ids, answer=CONSTANT[task.name]: [answer] * len(ids)
        result = evaluate(loaded, DENSE, task, batch_size=3)
        assert result.outcome.metrics == pytest.approx(KNOWN[task.name])
        assert [score.key for score in result.outcome.scores] == [metric.key for metric in TASKS[task.name].metrics]
        assert (result.outcome.size, result.outcome.total, result.outcome.note) == (8, 8, "")
    assert result.outcome.categories == {"adversarial": 2 / 3, "popular": 1 / 3, "random": 0.5}


def test_answers_end_at_the_tasks_stop_string(loaded, disk_data):
    loaded.decode = lambda ids: ["yes\n\nand more"] * len(ids)
    result = evaluate(loaded, DENSE, task("pope", disk_data))
    assert result.outcome.metrics == pytest.approx(KNOWN["pope"])
    assert set(result.samples["output"]) == {"yes\n\nand more"}
    assert set(result.samples["answer"]) == {"yes"}


def test_maximum_of_mme_counts_perception_categories(loaded, disk_data):
    loaded.decode = lambda ids: ["yes"] * len(ids)
    assert evaluate(loaded, DENSE, task("mme", disk_data)).outcome.scores[0].maximum == 600
    assert evaluate(loaded, DENSE, task("mme", disk_data), limit=2).outcome.scores[0].maximum == 200


def test_each_answer_goes_to_its_own_question(loaded, disk_data):
    prompts, inputs = [], loaded.inputs

    def spy(questions, images, key=None):
        prompts.append(questions)
        return inputs(questions, images)

    loaded.inputs = spy
    loaded.decode = lambda ids: prompts[-1]
    samples = evaluate(loaded, DENSE, task("pope", disk_data), batch_size=3).samples
    assert [len(batch) for batch in prompts] == [3, 3, 2]
    assert [prompt for batch in prompts for prompt in batch] != samples["prompt"].tolist(), (
        "batches go by length, not in order"
    )
    assert samples["doc_id"].tolist() == list(range(8))
    for number, row in samples.iterrows():
        assert f"a {hubdata.COLOURS[number]} box" in row["answer"]
        assert row["answer"] == row["prompt"]
        assert row["question_id"] == str(number + 1)


@pytest.mark.parametrize("spec", [{"name": "none"}, {"name": "fastv", "keep": 0.5}, {"name": "random", "keep": 0.25}])
def test_batches_answer_like_single_questions(spec, loaded, disk_data):
    method, pope = visibench.load_method(**spec), task("pope", disk_data)
    one, many = (evaluate(loaded, method, pope, batch_size=size).samples for size in (1, 5))
    assert one["output"].nunique() > 2
    differ = ["executed_macs", "batch_macs", "latency_ms", "batch_questions"]
    assert one.drop(columns=differ).equals(many.drop(columns=differ))
    np.testing.assert_allclose(one["executed_macs"], many["executed_macs"])
    assert one["batch_macs"].equals(one["executed_macs"]), "a batch of one is not padded"


def test_what_a_batch_executed_is_that_of_its_longest_row_for_all(loaded, disk_data):
    """Each batch's sum is the multiply-adds of a dense prefill of rows that are all as long as its longest prompt."""
    result = evaluate(loaded, DENSE, task("gqa", disk_data), batch_size=8)
    samples, g = result.samples, loaded.geometry
    weights = 2 * g.hidden * g.heads * g.head_size + 2 * g.hidden * g.kv_heads * g.head_size
    weights += 3 * g.hidden * g.intermediate
    uneven = False
    for _, batch in samples.groupby("latency_ms"):
        shortfall = batch["prompt_tokens"].max() - batch["prompt_tokens"]
        width = batch["prompt_tokens"].max()
        pairs = width**2 - batch["prompt_tokens"] ** 2
        padding = g.layers * (shortfall * weights + pairs * 2 * g.heads * g.head_size)
        assert batch["batch_macs"].nunique() == 1
        assert batch["batch_macs"].sum() == pytest.approx((batch["executed_macs"] + padding).sum(), rel=1e-12)
        uneven |= bool(shortfall.any())
    assert uneven
    assert result.outcome.compute.batch_macs == pytest.approx(samples["batch_macs"].mean())
    assert result.outcome.compute.batch_macs > result.outcome.compute.macs


def test_dense_answers_are_those_of_plain_generate(loaded, disk_data):
    mme = task("mme", disk_data)
    samples = evaluate(loaded, DENSE, mme, batch_size=4).samples
    rows = hubdata.tables()["MME"][1]
    for i in (0, 5):
        question = rows[i]["question"].replace(" Please answer yes or no.", "")
        question += "\nAnswer the question using a single word or phrase."
        assert samples["prompt"][i] == question
        inputs = loaded.inputs([question], [[rows[i]["image"]]])
        ids = loaded.model.generate(**inputs, max_new_tokens=16, do_sample=False)
        expected = loaded.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert [samples["output"][i]] == expected


def test_samples_say_what_was_kept(loaded, disk_data):
    method = visibench.load_method("fastv", layer=3, keep=0.5)
    samples = evaluate(loaded, method, task("gqa", disk_data), limit=4, batch_size=3).samples
    assert len(samples) == 4
    for row in samples.to_dict("records"):
        assert row["prompt_visual_tokens"] == 16
        assert row["visual_tokens"] == [16] * 3 + [8] * 7
        assert row["kv_lengths"] == [row["prompt_tokens"] - 16 + n for n in row["visual_tokens"]]
        assert sum(_bits(row)) == 8
    assert samples["image"].tolist() == ["n0", "n0", "n1", "n1"]
    assert samples["target"].tolist() == ["red", "yes", "green", "no"]


def _bits(row) -> list[bool]:
    """Which visual tokens the column ``kept`` says are left, read without NumPy."""
    bits = "".join(f"{byte:08b}" for byte in base64.b64decode(row["kept"]))
    assert set(bits[row["prompt_visual_tokens"] :]) <= {"0"}
    return [bit == "1" for bit in bits[: row["prompt_visual_tokens"]]]


@pytest.mark.parametrize(("name", "left"), [("none", 16), ("vtw", 0), ("pooling", 0)])
def test_kept_tokens_are_those_of_the_prompt_alone(name, left, loaded, disk_data):
    method = visibench.load_method(name, **{"vtw": {"layer": 5}, "pooling": {"tokens": 4}}.get(name, {}))
    samples = evaluate(loaded, method, task("gqa", disk_data), limit=2).samples.to_dict("records")
    assert [sum(_bits(row)) for row in samples] == [left, left]
    assert {row["visual_tokens"][-1] for row in samples} == {4 if name == "pooling" else left}


def test_kept_names_the_tokens_that_one_question_alone_keeps(loaded, disk_data):
    method, gqa = visibench.load_method("fastv", layer=3, keep=0.5), task("gqa", disk_data)
    samples = evaluate(loaded, method, gqa, limit=4, batch_size=3).samples.to_dict("records")
    for row in samples:
        with visibench.prune(loaded.model, method) as session:
            loaded.model(**loaded.inputs([row["prompt"]], [gqa.images(row["doc_id"])]))
        assert _bits(row) == session.trace.kept(9)[0].tolist()


def test_cap_on_new_tokens_is_the_tasks_own_or_recorded(loaded, disk_data):
    for name, cap in {"gqa": 16, "pope": 128, "textvqa_val": DEFAULT_MAX_NEW_TOKENS}.items():
        generation = evaluate(loaded, DENSE, task(name, disk_data), limit=1).outcome.generation
        assert generation["max_new_tokens"] == cap
        assert generation["do_sample"] is False


def test_data_hash_follows_questions_and_pixels(loaded, disk_data, hub_data, tmp_path):
    digest = evaluate(loaded, DENSE, task("pope", disk_data)).outcome.data_hash
    assert (
        evaluate(loaded, visibench.load_method("random", keep=0.5), task("pope", hub_data)).outcome.data_hash == digest
    )
    assert evaluate(loaded, DENSE, task("pope", disk_data), limit=7).outcome.data_hash != digest
    rows = hubdata.tables()["POPE"][1]
    rows = rows.map(lambda row, i: row | {"image": hubdata.picture("pink")} if i == 7 else row, with_indices=True)
    hubdata.save_to_disk(tmp_path, POPE=rows.cast(hubdata.FEATURES["POPE"]))
    assert evaluate(loaded, DENSE, task("pope", tmp_path)).outcome.data_hash != digest


def test_limit_of_mme_is_raised_to_whole_pairs(loaded, disk_data):
    mme = task("mme", disk_data)
    assert mme.size(None) == (8, "")
    assert mme.size(4) == (4, "")
    assert mme.size(3) == (4, "limit 3 raised to 4: MME scores pairs of questions")
    result = evaluate(loaded, DENSE, mme, limit=5)
    assert result.outcome.size == 6
    assert result.outcome.note
    assert task("pope", disk_data).size(100) == (8, "")


@pytest.mark.parametrize("limit", [0, -3])
def test_empty_limit_is_refused(limit, disk_data):
    with pytest.raises(OptionError, match="limit"):
        task("pope", disk_data).size(limit)


def test_incomplete_pair_is_named(disk_data, tmp_path):
    hubdata.save_to_disk(tmp_path, MME=hubdata.tables()["MME"][1].select(range(7)))
    with pytest.raises(DataError, match="code_reasoning"):
        task("mme", tmp_path).size(None)


@pytest.mark.parametrize("damaged", [0, 5])
@pytest.mark.parametrize("how", ["truncated", "garbage"])
def test_damaged_image_is_named(damaged, how, loaded, tmp_path):
    rows = hubdata.tables()["POPE"][1].cast_column("image", datasets.Image(decode=False))
    good = rows[0]["image"]["bytes"]
    bad = good[: len(good) // 2] if how == "truncated" else b"no image"
    rows = rows.map(
        lambda row, i: row | {"image": {"bytes": bad, "path": None}} if i == damaged else row, with_indices=True
    )
    hubdata.save_to_disk(tmp_path, POPE=rows.cast(hubdata.FEATURES["POPE"]))
    with pytest.raises(DataError, match="pope" if damaged == 0 else "pope: the image of question 5"):
        evaluate(loaded, DENSE, task("pope", tmp_path))
    assert not any(module._forward_pre_hooks for module in loaded.model.modules())


def test_question_without_image_is_refused(loaded, tmp_path):
    rows = hubdata.tables()["POPE"][1].map(lambda row, i: row | {"image": None} if i == 3 else row, with_indices=True)
    hubdata.save_to_disk(tmp_path, POPE=rows.cast(hubdata.FEATURES["POPE"]))
    with pytest.raises(InputError, match="question 3 has no image"):
        evaluate(loaded, DENSE, task("pope", tmp_path))


def test_missing_image_of_gqa_is_named(loaded, tmp_path):
    hubdata.save_to_disk(tmp_path, GQA_images=hubdata.tables()["GQA_images"][1].select(range(3)))
    with pytest.raises(DataError, match="n3"):
        evaluate(loaded, DENSE, task("gqa", tmp_path))


def test_out_of_memory_says_what_to_do(loaded, disk_data, monkeypatch):
    def generate(**options):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(loaded.model, "generate", generate)
    with pytest.raises(visibench.errors.VisibenchError, match="batch"):
        evaluate(loaded, DENSE, task("pope", disk_data))


# ---- finding tasks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "data", "error", "message"),
    [
        (["gqaa"], "embedded", UnknownNameError, "did you mean 'gqa'"),
        (["scienceqa_imgg"], "embedded", UnknownNameError, "did you mean 'scienceqa_img'"),
        (["pope_full"], "embedded", OptionError, "group"),
        (["pope", "pope"], "embedded", OptionError, "twice"),
        ([], "embedded", OptionError, "no tasks"),
        (["pope"], "nowhere", DataError, "nowhere"),
        (["scienceqa_img"], "{disk}", DataError, "ScienceQA"),
        (["hellaswag"], "embedded", OptionError, "generate_until"),
    ],
)
def test_unusable_tasks(names, data, error, message, disk_data):
    with pytest.raises(error, match=message):
        load_tasks(names, data.format(disk=disk_data))


def test_names_are_checked_before_data_is_read(monkeypatch):
    monkeypatch.setattr(tasks_module, "_embedded_root", lambda: pytest.fail("data was read"))
    with pytest.raises(UnknownNameError):
        load_tasks(["pope", "nonsense"])


def test_hub_data_by_name(hub_data, loaded, monkeypatch):
    asked, load = [], datasets.load_dataset

    def load_dataset(path, *args, **options):
        asked.append((path, options.get("token")))
        return load(str(hub_data / path.split("/")[-1]), *args, **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded.decode = lambda ids: ["yes"] * len(ids)
    for task in load_tasks(["gqa", "pope"], "hub"):
        assert task.origin == "hub"
        assert evaluate(loaded, DENSE, task).outcome.metrics == pytest.approx(KNOWN[task.name])
    # No login is asked for, and GQA's images are opened once, not copied for every question.
    assert asked == [("lmms-lab-encoder/GQA", None)] * 2 + [("lmms-lab-encoder/POPE", None)]


def test_unreachable_hub_is_one_line(monkeypatch):
    def load_dataset(*args, **options):
        raise ConnectionError("Couldn't reach it\nreally")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match="network") as caught:
        load_tasks(["gqa"], "hub")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_import_of_lmms_eval_is_contained():
    code = """
import torch, warnings, loguru
from PIL import ImageFile
before = set(loguru.logger._core.handlers)
import visibench.evals.tasks.lmms_eval
assert set(loguru.logger._core.handlers) == before
assert ("ignore", None, Warning, None, 0) not in warnings.filters
assert not ImageFile.LOAD_TRUNCATED_IMAGES
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
