"""Fixtures shared by all tests."""

import json

import numpy as np
import pytest
import torch
from support import GOLDEN, make_llava
from transformers import LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration


@pytest.fixture(autouse=True)
def _no_grad():
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
