"""What a newcomer meets first: imports, the torchvision cure, versions."""

import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import visibench
from visibench.utils import torchvision

ROOT = Path(visibench.__file__).parent


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=240).stdout


def test_import_is_light_and_names_are_there():
    loaded = python(
        "import sys, visibench; dir(visibench); print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    assert loaded.split() == ["False", "False"]
    for name in visibench.__all__:
        assert getattr(visibench, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'prunes'"):
        _ = visibench.prunes


@pytest.mark.slow
def test_pruning_a_model_of_ones_own_imports_no_harness():
    """Neither lmms-eval nor what only tables, pictures and sinks need."""
    code = """
import sys, torch, visibench
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
                          image_size=16, patch_size=4)
text = LlamaConfig(hidden_size=48, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, vocab_size=64)
model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=5)).eval()
ids = torch.tensor([[1, 2] + [5] * 16 + [3, 4]])
with visibench.prune(model, visibench.load_method("fastv", layer=2, keep=0.5)) as session:
    model(input_ids=ids, pixel_values=torch.randn(1, 3, 16, 16), attention_mask=torch.ones_like(ids))
print(session)
print(session.trace)
print(sorted({"lmms_eval", "wandb", "matplotlib", "pandas", "datasets", "pyarrow", "ray"} & set(sys.modules)))
"""
    assert python(code).splitlines() == [
        "PruningSession(fastv:keep=0.5 on LlavaForConditionalGeneration)",
        "Trace(1 rows, 4 layers, visual tokens 16 to 8)",
        "[]",
    ]


def test_versions_agree():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert visibench.__version__ == declared == version("visibench")


def test_constraints_pin_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {
        line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {name.split(">")[0].split("<")[0].split("=")[0].lower() for name in wanted}
    assert names <= pinned


def test_all_packages_of_the_tree_are_declared():
    declared = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    rooms = [file.parent.name for file in ROOT.glob("*/__init__.py")]
    found = {"visibench"} | {
        ".".join(("visibench", *folder.relative_to(ROOT).parts))
        for room in rooms
        for folder in [ROOT / room, *(ROOT / room).rglob("*")]
        if folder.is_dir() and any(folder.glob("*.py")) and folder.name != "__pycache__"
    }
    assert found == declared


@pytest.mark.skipif(torch.version.cuda is not None, reason="beside a CUDA torch torchvision needs no cure")
def test_torchvision_imports_beside_a_cpu_torch():
    """``import visibench`` alone cures it: its transforms work, and a missing kernel says so, not something odd."""
    code = """
import visibench, torchvision, torch
from torchvision.transforms.v2.functional import resize
print(tuple(resize(torch.zeros(3, 8, 8), [4, 4]).shape))
try:
    torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
except RuntimeError as error:
    print("C++ ops" in str(error) or "nms" in str(error))
"""
    assert python(code).split("\n")[:2] == ["(3, 4, 4)", "True"]


def test_cure_is_idempotent():
    assert torchvision.ensure_importable() == torchvision.ensure_importable()
