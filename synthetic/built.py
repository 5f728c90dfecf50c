"""Where the data sets lie once they are built, and whether they are whole. Nothing that builds them is imported."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

MANIFEST = Path(__file__).with_name("manifest.json")
CALIBRATION = Path(__file__).with_name("calibration.json")
"""The manifest of questions that no evaluation asks."""
_SEAL = "built.json"  # written last into a finished folder: the hashes of its files


def place(root: Path | None = None, manifest: Path = MANIFEST) -> Path:
    """Their folder under ``root`` (default: ``$VISIBENCH_CACHE`` or ``~/.cache/visibench``), built or not."""
    root = Path(root or os.environ.get("VISIBENCH_CACHE") or Path.home() / ".cache" / "visibench")
    return root / f"synthetic-{sha(json.dumps(json.loads(manifest.read_text()), sort_keys=True).encode())[:12]}"


def seal(folder: Path) -> None:
    """Note that a folder is finished."""
    (folder / _SEAL).write_text(json.dumps(_files(folder), indent=2) + "\n")


def sealed(folder: Path) -> bool:
    """Whether the folder was finished and every file in it is still what it was (a fraction of a second)."""
    try:
        return json.loads((folder / _SEAL).read_text()) == _files(folder)
    except (OSError, ValueError):
        return False


def _files(folder: Path) -> dict[str, Any]:
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != _SEAL and not p.name.startswith("cache-"))
    return {str(p.relative_to(folder)): sha(p.read_bytes()) for p in paths}


def sha(data: bytes) -> str:
    """SHA-256, in hex."""
    return hashlib.sha256(data).hexdigest()
