"""Fixtures shared by all tests."""

import json
import os
import sys
from pathlib import Path

# Before torch is imported, here and in subprocesses: on small models, threads that wait for each other cost the most.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hubdata
import numpy as np
import pytest
import torch
from support import GOLDEN, make_llava
from transformers import LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration
from visibench.cli import main
from visibench.models import LoadedModel, load_model


@pytest.fixture(autouse=True)
def _no_grad_and_the_same_numbers():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def golden_llama() -> LlamaForCausalLM:
    """The decoder on which the vectors were recorded."""
    config = json.loads((GOLDEN / "llama.json").read_text())
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in config.items() if k not in ("model_type", "torch_dtype")}))
    weights = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / "llama.npz").items()}
    model.load_state_dict(weights)
    return model.eval()


@pytest.fixture(scope="session")
def golden_inputs() -> dict[str, torch.Tensor]:
    return {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / "inputs.npz").items()}


@pytest.fixture(scope="session")
def llava() -> LlavaForConditionalGeneration:
    return make_llava()


@pytest.fixture(scope="module")
def own() -> LlavaForConditionalGeneration:
    """A model of the file's own, to be spoilt and mended."""
    return make_llava(layers=6)


@pytest.fixture(scope="session")
def disk_data(tmp_path_factory) -> Path:
    """Eight questions a task, as ``save_to_disk`` writes them."""
    return hubdata.save_to_disk(tmp_path_factory.mktemp("disk"))


@pytest.fixture(scope="session")
def hub_data(tmp_path_factory) -> Path:
    """The same questions, laid out like the hub."""
    return hubdata.save_like_hub(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A LLaVA with random weights and its processor."""
    return hubdata.save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def loaded(checkpoint) -> LoadedModel:
    """That checkpoint, loaded."""
    return load_model(str(checkpoint))


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    """Run a command in an empty folder; returns (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["visibench", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        assert isinstance(stopped.value.code, int)
        return stopped.value.code, captured.out, captured.err

    return call
