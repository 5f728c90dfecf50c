"""The model that lmms-eval calls ``visibench``: under lmms-eval's own loop, command line and ranks."""

import json
import os
import subprocess
import sys
import tomllib
from argparse import Namespace
from importlib.metadata import EntryPoint, distribution
from pathlib import Path

import datasets
import pytest
import visibench
from loguru import logger
from transformers import AutoImageProcessor
from visibench.errors import OptionError, VisibenchError
from visibench.evals.answers import lmms_model
from visibench.evals.answers.lmms_model import Visibench
from visibench.evals.answers.score import evaluate
from visibench.evals.settings.method_spec import parse
from visibench.evals.tasks import lmms_eval
from visibench.evals.tasks.definitions import find
from visibench.evals.tasks.tasks import load_tasks
from visibench.models import load_model
from visibench.models.load import EMBEDDED
from visibench.models.protocols import Protocol
from visibench.utils.token_grids import read

FOLDERS = {"pope": "POPE", "mme": "MME", "textvqa_val": "textvqa"}
RANDOM = "random:keep=0.25,seed=3"
ROOT = Path(visibench.__file__).parent
GROUP = "lmms_eval.models"
ENTRY_POINTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][GROUP]


@pytest.fixture(scope="module")
def definitions(hub_data, tmp_path_factory) -> Path:
    """lmms-eval's own tasks, reading from a folder: what a user passes as ``--include_path``."""
    folder = tmp_path_factory.mktemp("definitions")
    for name, data in FOLDERS.items():
        lines = f"include: {find(name).file}", f"task: local_{name}", f"dataset_path: {hub_data / data}"
        (folder / f"local_{name}.yaml").write_text("\n".join((*lines, "dataset_kwargs: {}\n")))
    return folder


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny")


def expected(tiny, method, name, data, limit=None):
    """What ``visibench run`` computes of the same questions."""
    return evaluate(tiny, parse(method), load_tasks([name], str(data))[0], batch_size=3, limit=limit)


def ask(arguments, tasks, definitions, tmp_path, **options):
    """lmms-eval's ``simple_evaluate`` with its model and tasks by name, as its command line calls it."""
    model = Visibench.create_from_arg_string(arguments, {"batch_size": "3", "max_batch_size": None, "device": None})
    with lmms_eval.quiet():
        return lmms_eval.simple_evaluate(
            model=model,
            tasks=tasks,
            task_manager=lmms_eval.TaskManager(include_path=str(definitions), include_defaults=False),
            bootstrap_iters=0,
            cli_args=Namespace(process_with_media=False, output_path=str(tmp_path)),
            **options,
        )


def same(results, samples, result):
    """Whether lmms-eval's results and logged answers of a task are those of ``result``."""
    named = {f"{key},none": value for key, value in result.outcome.metrics.items()}
    assert named
    assert {key: results[key] for key in named} == named
    assert [sample["doc_id"] for sample in samples] == result.samples["doc_id"].tolist()
    answers = [sample["filtered_resps"] for sample in samples]
    assert [a if isinstance(a, str) else a[0] for a in answers] == result.samples["answer"].tolist()
    return True


@pytest.mark.parametrize(
    "method", ["visipruner", *(pytest.param(method, marks=pytest.mark.slow) for method in ("none", RANDOM))]
)
def test_scores_and_records_are_those_of_visibench_run(method, tiny, definitions, hub_data, tmp_path):
    name, _, options = method.partition(":")
    record = tmp_path / "new" / "record.json"
    arguments = f"pretrained=tiny,method={name},method_args={options.replace(',', ';')},record={record}"
    found = ask(arguments, ["local_pope", "local_mme"], definitions, tmp_path)
    written = json.loads(record.read_text())
    assert (written["method"], written["options"]) == (name, parse(method).hyperparameters())
    macs, tokens = [], []
    for task in ("mme", "pope"):
        result = expected(tiny, method, task, hub_data)
        local = f"local_{task}"
        assert same(found["results"][local], sorted(found["samples"][local], key=lambda s: s["doc_id"]), result)
        rows = [row for row in written["samples"] if row["task"] == local]
        assert [row["places"] for row in rows] == result.samples["places"].map(read).tolist()
        for column in set(rows[0]) & set(result.samples) - {"task", "latency_ms", "places"}:
            assert [row[column] for row in rows] == result.samples[column].tolist()
        assert {"visual_tokens", "kv_lengths", "executed_macs"} <= set(rows[0]) & set(result.samples)
        macs += result.samples["executed_macs"].tolist()
        tokens += [sum(layers) / len(layers) for layers in result.samples["visual_tokens"]]
    assert found["throughput"]["avg_executed_macs"] == pytest.approx(sum(macs) / 16)
    assert found["throughput"]["avg_visual_tokens"] == pytest.approx(sum(tokens) / 16)
    counts = found["samples"]["local_pope"][0]["token_counts"][0]
    assert counts["input_tokens"] == result.samples["prompt_tokens"][found["samples"]["local_pope"][0]["doc_id"]]


def test_tasks_of_the_hub_by_their_own_names(checkpoint, hub_data, tmp_path, monkeypatch):
    """With the hub's data in a folder, lmms-eval's stock task gives what ``visibench run --data hub`` gives."""
    load = datasets.load_dataset

    def load_dataset(path, *args, token=None, **options):
        return load(str(hub_data / path.split("/")[-1]), *args, **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = ask(f"pretrained={checkpoint},method=fastv:keep=0.5", ["pope"], find("pope").file.parent, tmp_path)
    result = expected(load_model(str(checkpoint)), "fastv:keep=0.5", "pope", "hub")
    assert same(found["results"]["pope"], found["samples"]["pope"], result)


def test_every_spelling_of_a_method_is_the_same(checkpoint):
    for arguments in (
        "method=fastv,method_args=layer=2;keep=0.25",
        "method=fastv:layer=2;keep=0.25",
        'method="fastv:layer=2,keep=0.25"',
    ):
        model = Visibench.create_from_arg_string(f"pretrained={checkpoint},{arguments},batch_size=4")
        assert model.method == visibench.load_method("fastv", layer=2, keep=0.25)
        assert model.batch_size == 4


def test_what_greedy_generation_leaves_out_is_said(checkpoint, definitions, tmp_path):
    said = []
    sink = logger.add(lambda line: said.append(str(line)), level="WARNING", format="{message}")
    ask(f"pretrained={checkpoint}", ["local_pope"], definitions, tmp_path, limit=2)
    assert not any("greedily" in line for line in said)
    ask(
        f"pretrained={checkpoint}",
        ["local_pope"],
        definitions,
        tmp_path,
        limit=2,
        gen_kwargs="do_sample=True,num_beams=4",
    )
    logger.remove(sink)
    (line,) = (line for line in said if "greedily" in line)
    assert line.strip() == "local_pope: answers are generated greedily, without its num_beams=4, do_sample=True"


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ("method=none", {}, "needs pretrained="),
        ("pretrained", {}, "expected key=value"),
        ("pretrained=nowhere", {}, "unknown model 'nowhere'"),
        ("pretrained=tiny,method=fastw", {}, "did you mean 'fastv'"),
        ("pretrained=tiny,method=fastv,method_args=layers=2", {}, "layers"),
        ("pretrained=tiny,method=fastv:layer=99;keep=0.5", {}, "layer"),
        ("pretrained=tiny,method=fastv:layer=2,keep=0.5", {}, "unknown model argument 'keep'"),
        ("pretrained=tiny,method=fastv:keep=0.5,method_args=keep=0.5", {}, "twice"),
        ("pretrained=tiny,batch_size=4", {"batch_size": "8"}, "batch_size is given twice"),
        ("pretrained=tiny", {"batch_size": "auto"}, "batch_size must be a whole number"),
        ("pretrained=tiny", {"max_batch_size": 8}, "--max_batch_size 8 is not used"),
        ("pretrained=tiny,device=gpu", {}, "unknown device 'gpu'"),
        ("pretrained=tiny,dtype=float8", {}, "unknown dtype 'float8'"),
        ("pretrained=tiny,quantization=2bit", {}, "unknown quantization '2bit'"),
        ("pretrained=tiny,max_pixels=0", {}, "max_pixels: input should be greater than or equal to 1"),
        ("pretrained=tiny,min_pixels=4096", {}, "protocol hf sets min_pixels, which"),
        (f"pretrained=tiny,record={__file__}", {}, "is there already"),
    ],
)
def test_mistakes_end_in_one_line(arguments, options, message, capsys):
    with pytest.raises(SystemExit) as caught:
        Visibench.create_from_arg_string(arguments, options)
    assert caught.value.code == 2
    *before, line = capsys.readouterr().err.splitlines()
    assert all("Loading weights" in other for other in before if other)
    assert line.startswith("error: ")
    assert message in line


def test_what_a_model_is_loaded_with_comes_to_load_model(monkeypatch):
    given = {}
    monkeypatch.setattr(lmms_model, "load_model", lambda name, **options: given.update(options) or load_model("tiny"))
    Visibench.create_from_arg_string(
        "pretrained=tiny,quantization=4bit,device_map=auto,attn_implementation=eager,min_pixels=3136,max_pixels=1605632"
    )
    assert given.pop("protocol").record() == {"name": "hf", "min_pixels": 3136, "max_pixels": 1605632}
    said = {"quantization": "4bit", "device_map": "auto", "attn_implementation": "eager"}
    assert given == {"device": "auto", "dtype": "auto", "trust_remote_code": False, "compile": False} | said


def test_what_a_model_is_loaded_with_is_recorded(definitions, tmp_path):
    """Where weights lie and how they attend; limits of pixels, as a processor that knows them got them."""
    record = tmp_path / "record.json"
    model = Visibench.create_from_arg_string(
        f"pretrained=tiny,device_map=cpu,attn_implementation=eager,record={record}"
    )
    model.loaded.protocol = Protocol(max_pixels=1605632)
    with lmms_eval.quiet():
        lmms_eval.simple_evaluate(
            model=model,
            tasks=["local_pope"],
            task_manager=lmms_eval.TaskManager(include_path=str(definitions), include_defaults=False),
            bootstrap_iters=0,
            limit=1,
            cli_args=Namespace(process_with_media=False, output_path=str(tmp_path)),
        )
    written = json.loads(record.read_text())
    assert written["environment"]["model"]["attention"] == "eager"
    assert written["protocol"] == {"name": "hf", "max_pixels": 1605632}


def test_each_rank_takes_its_own_gpu(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert lmms_model._of_this_rank("auto") == "auto"  # one rank: as load_model decides
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert [lmms_model._of_this_rank(device) for device in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    with pytest.raises(OptionError, match="one GPU"):
        lmms_model._of_this_rank("cuda:0")


def test_mistakes_raise_in_python():
    with pytest.raises(VisibenchError, match="fastw"):
        Visibench(pretrained="tiny", method="fastw")


def test_entry_point_leads_to_the_model():
    ((name, value),) = ENTRY_POINTS.items()
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    registry = ModelRegistryV2()
    registry.register_manifest(EntryPoint(name, value, GROUP).load()())
    assert registry.get_model_class("visibench") is Visibench


# ---- lmms-eval's own command line -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """All that is installed, this package with its entry points too, but torchvision.

    lmms-eval's program imports torchvision before it looks for models, and a CUDA build of that fails beside a CPU
    build of torch. It runs without torchvision, as README says; nothing else is done for it here.
    """
    folder, installed = tmp_path_factory.mktemp("site"), Path(str(distribution("visibench").locate_file("")))
    for file in installed.iterdir():
        if not file.name.startswith(("torchvision", "__editable__")):
            (folder / file.name).symlink_to(file)
    if not (folder / "visibench").exists():  # installed in editable mode
        (folder / "visibench").symlink_to(ROOT)
    return folder


RANKS = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--no-python"


@pytest.fixture(scope="module")
def without_torchvision():
    """The model with the image processor that transformers takes then; its pixels differ a little."""
    loaded = load_model("tiny")
    loaded.processor.image_processor = AutoImageProcessor.from_pretrained(EMBEDDED["tiny"], backend="pil")
    return loaded


def command(site, definitions, tmp_path, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(site), "NO_COLOR": "1", "HF_HUB_OFFLINE": "1"}
    shared = "--include_path", definitions, "--output_path", tmp_path, "--log_samples", "--batch_size", 3
    line = [sys.executable, "-S", *map(str, (*arguments, "--model", "visibench", *shared))]
    return subprocess.run(line, capture_output=True, text=True, timeout=280, env=environment, cwd=tmp_path)


def written(folder: Path, task: str):
    """Results and samples of a task, from the files that lmms-eval wrote."""
    (results,) = (json.loads(file.read_text()) for file in folder.glob("tiny/*_results.json"))
    (samples,) = (file.read_text().splitlines() for file in folder.glob(f"tiny/*_samples_{task}.jsonl"))
    return results, sorted(map(json.loads, samples), key=lambda sample: sample["doc_id"])


@pytest.mark.slow
def test_command_line(site, without_torchvision, definitions, hub_data, tmp_path):
    model = "pretrained=tiny,method=fastv,method_args=layer=2;keep=0.25"
    done = command(
        site, definitions, tmp_path, "-m", "lmms_eval", "--tasks", "local_textvqa_val", "--model_args", model
    )
    assert done.returncode == 0, done.stderr
    assert "Postprocessed 8 docs" in done.stderr + done.stdout  # lmms-eval keeps its own log
    results, samples = written(tmp_path, "local_textvqa_val")
    result = expected(without_torchvision, "fastv:layer=2,keep=0.25", "textvqa_val", hub_data)
    assert same(results["results"]["local_textvqa_val"], samples, result)


@pytest.mark.slow
def test_two_ranks_give_what_one_gives(site, without_torchvision, definitions, hub_data, tmp_path):
    """Seven questions on two ranks: one of them asks its last question again, which must not count."""
    method, record = RANDOM, tmp_path / "record.json"
    model = f"pretrained=tiny,method={method.replace(',', ';')},record={record}"
    ranks = (*RANKS, sys.executable, "-S", "-m", "lmms_eval")
    arguments = "--tasks", "local_pope", "--limit", 7, "--model_args", model
    done = command(site, definitions, tmp_path, *ranks, *arguments)
    assert done.returncode == 0, done.stderr
    results, samples = written(tmp_path, "local_pope")
    result = expected(without_torchvision, method, "pope", hub_data, limit=7)
    assert same(results["results"]["local_pope"], samples, result)
    rows = json.loads(record.read_text())["samples"]
    for column in ("doc_id", "output", "new_tokens", "visual_tokens", "kv_lengths"):
        assert [row[column] for row in rows] == result.samples[column].tolist()
    assert [row["executed_macs"] for row in rows] == pytest.approx(result.samples["executed_macs"].tolist())
    assert results["throughput"]["avg_executed_macs"] == pytest.approx(result.samples["executed_macs"].mean())


@pytest.mark.slow
def test_mistake_ends_all_ranks(site, definitions, tmp_path):
    ranks = (*RANKS, sys.executable, "-S", "-m", "lmms_eval")
    done = command(site, definitions, tmp_path, *ranks, "--tasks", "local_pope", "--model_args", "pretrained=nowhere")
    assert done.returncode != 0
    assert "error: unknown model 'nowhere'" in done.stderr
