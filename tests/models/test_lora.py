"""A folder of a LoRA adapter is its base model with the adapter merged: what peft computes without merging."""

import json
import shutil

import pytest
import torch
from refusals import assert_refused
from safetensors.torch import load_file, save_file
from visibench.errors import DataError, OptionError
from visibench.models.load import fingerprint, load_model

pytestmark = pytest.mark.slow
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def trained(checkpoint, tmp_path_factory):
    """A folder of an adapter with random weights, and its logits on a prompt, as peft has them."""
    peft = pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("adapter")
    settings = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=r".*language_model.*[qv]_proj")
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(load_model(str(checkpoint)).model, settings).eval()
    wrapped.save_pretrained(folder)
    return folder, wrapped(input_ids=torch.arange(3, 12)[None]).logits


@pytest.fixture
def adapter(trained, tmp_path):
    """A copy to damage."""
    return shutil.copytree(trained[0], tmp_path / "adapter")


def test_logits_are_those_of_the_base_with_its_adapter(trained, checkpoint):
    folder, logits = trained
    loaded = load_model(str(folder))
    ids = torch.arange(3, 12)[None]
    torch.testing.assert_close(loaded.model(input_ids=ids).logits, logits, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(load_model(str(checkpoint)).model(input_ids=ids).logits, logits, atol=1e-2)
    assert loaded.describe()["base"] == str(checkpoint)
    assert type(loaded.model).__name__ == "LlavaForConditionalGeneration"


def test_its_fingerprint_follows_the_adapter_and_the_base(adapter, checkpoint, tmp_path):
    before = fingerprint(str(adapter))
    base = shutil.copytree(checkpoint, tmp_path / "base")
    settings = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(settings | {"base_model_name_or_path": str(base)}))
    moved = fingerprint(str(adapter))
    weights = load_file(base / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, base / "model.safetensors", {"format": "pt"})
    assert len({before, moved, fingerprint(str(adapter))}) == 3


def test_what_does_not_fit_is_refused(adapter, cli, disk_data):
    with pytest.raises(OptionError, match="packed weights: leave quantization out"):
        load_model(str(adapter), quantization="8bit", device="cpu")
    weights = load_file(adapter / WEIGHTS)
    first = sorted(weights)[0]
    save_file({name: tensor for name, tensor in weights.items() if name != first}, adapter / WEIGHTS)
    with pytest.raises(DataError, match="does not fit its base model: 1 tensors"):
        load_model(str(adapter))
    (adapter / WEIGHTS).unlink()
    (adapter / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(DataError, match="save the adapter as safetensors"):
        load_model(str(adapter))
    settings = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(settings | {"peft_type": "IA3"}))
    run = ["run", "--model", str(adapter), "--data", disk_data, "--tasks", "pope", "--method", "none", "--limit", 1]
    assert_refused(cli(*run), "LORA alone can be merged")
    (adapter / CONFIG).write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    assert_refused(cli(*run), "names no base model")
