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
