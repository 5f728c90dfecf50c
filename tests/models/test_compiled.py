"""Norms and MLPs by torch.compile: the same answers, and one line where it cannot be had."""

import copy
import os
import shutil
import subprocess
import sys

import pytest
import torch
import visibench
from decoders import CONFIGS, decoder_model, miniature, row_samples
from visibench.errors import OptionError
from visibench.evals.tasks.tasks import load_tasks
from visibench.models import load_model
from visibench.models.adapters import Adapter
from visibench.models.compiled import compile_parts

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler"
)
METHODS = [
    visibench.load_method("none"),
    visibench.load_method("visipruner", shallow_layers=4),
    visibench.load_method("pyramiddrop", layers="scaled"),  # takes over what norms have made
    visibench.load_method("v2drop", layers="scaled"),
    visibench.load_method("transprune", accumulate=(1, 2, 3), cuts=(2, 4, 6)),  # reads MLPs
    visibench.load_method("divprune", tokens=36),
]


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny", device="cpu")


@pytest.fixture(scope="module")
def compiled():
    return load_model("tiny", device="cpu", compile=True)


@pytest.fixture(scope="module")
def questions():
    """Of two tasks, so that prompts differ in length."""
    return [task.question(number) for task in load_tasks(["gqa", "textvqa_val"]) for number in range(8)]


def answers(loaded, method, questions):
    texts, images = zip(*questions, strict=True)
    with torch.no_grad(), visibench.prune(loaded.model, method):
        return loaded.model.generate(**loaded.inputs([*texts], [*images]), max_new_tokens=8, do_sample=False)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_answers_are_those_of_the_plain_model(tiny, compiled, questions, method):
    assert torch.equal(answers(compiled, method, questions), answers(tiny, method, questions))


@needs_compiler
@pytest.mark.slow
def test_a_copy_runs_on_its_own_weights(compiled):
    inputs = compiled.synthetic_inputs(1, 8, 144)
    own = copy.deepcopy(compiled.model)
    for weights in own.model.language_model.layers[0].mlp.parameters():
        weights.data.zero_()
    with torch.no_grad():
        assert not torch.equal(own(**inputs).logits, compiled.model(**inputs).logits)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma3", "cohere2_vision", "qwen2_vl", "glm4v", "llava_onevision"])
def test_decoders_with_other_norms_and_mlps(kind):
    own, found = miniature(kind, CONFIGS[kind], "sdpa"), []
    compile_parts(Adapter(own))
    for model in (own, decoder_model(kind, "sdpa")):
        with torch.no_grad(), visibench.prune(model, visibench.load_method("fastv", layer=1, keep=0.5)):
            found.append(model(**row_samples(kind)[0]).logits)
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


@needs_compiler
@pytest.mark.slow
def test_what_is_compiled_is_recorded(compiled):
    assert compiled.describe()["compile"]
    assert "compile" not in load_model("tiny", device="cpu").describe()


@pytest.mark.parametrize("more", [{"device_map": "cpu"}, {"quantization": "8bit"}, {"weights": "meta"}])
def test_packed_and_spread_weights_are_refused(more):
    with pytest.raises(OptionError, match="compile is about plain weights on one device"):
        load_model("tiny", compile=True, **more)


@pytest.mark.slow
def test_without_a_compiler_nothing_runs(tmp_path):
    lacking = os.environ | {"CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    options = "--model tiny --compile --method none --tasks pope --limit 2 --no-timing --out".split()
    command = [sys.executable, "-m", "visibench", "run", *options, str(tmp_path / "run")]
    ended = subprocess.run(command, capture_output=True, text=True, env=lacking)
    assert ended.returncode == 2
    assert "error: cannot compile: leave compile out, or install what torch.compile needs" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not [*tmp_path.glob("run/*/samples*")]
