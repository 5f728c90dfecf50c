"""The four data sets in the cache: built on first use, checked against a manifest, rebuilt when damaged.

The manifest holds a SHA-256 for each data set over its questions and the decoded pixels of its images, so it does
not depend on how some version of a library writes files.
"""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, Image, load_from_disk
from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from ..errors import DataError
from .built import CALIBRATION, MANIFEST, place, seal, sealed, sha
from .schemas import FEATURES, SPLITS
from .tables import CALIBRATION_SEED, SEED, all_tables


def ensure(root: Path | None = None, *, calibration: bool = False) -> Path:
    """Folder with ``GQA_images``, ``GQA_instructions``, ``MME``, ``POPE`` and ``textvqa``, each for ``load_from_disk``.

    Built under ``root`` (default: ``$VISIBENCH_CACHE`` or ``~/.cache/visibench``) in some seconds when it is missing or
    damaged. ``calibration``: other scenes and questions of the same kinds, for settings that are found by measuring.
    Raises DataError when the generator does not give the data of the manifest.
    """
    file = CALIBRATION if calibration else MANIFEST
    manifest, folder = json.loads(file.read_text()), place(root, file)
    if sealed(folder):
        return folder
    root = folder.parent
    _check_writable(root)
    part = Path(tempfile.mkdtemp(prefix=".synthetic-", dir=root))
    try:
        built = _build(part, calibration)
        wrong = [name for name in manifest if built.get(name) != manifest[name]]
        if wrong:
            raise DataError(
                f"synthetic data differ from the manifest in {', '.join(wrong)}: install the versions of "
                "constraints.txt (numpy, pillow), or, if scenes or questions were meant to change, run "
                "python -m visibench.synthetic --write-manifest"
            )
        seal(part)
        shutil.rmtree(folder, ignore_errors=True)
        part.replace(folder)
    except OSError:
        if not sealed(folder):  # unless another process was quicker
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def write_manifest(*, calibration: bool = False) -> Path:
    """Build the data sets anew and write their hashes into the package."""
    file = CALIBRATION if calibration else MANIFEST
    with tempfile.TemporaryDirectory() as part:
        file.write_text(json.dumps(_build(Path(part), calibration), indent=2) + "\n")
    return file


def digest(rows: Dataset) -> str:
    """SHA-256 over all columns of all rows; images by their decoded pixels."""
    total = hashlib.sha256()
    seen: dict[bytes, str] = {}  # the same image stands behind several questions
    images = [name for name, kind in rows.features.items() if isinstance(kind, Image)]
    plain = rows
    for name in images:
        plain = plain.cast_column(name, Image(decode=False))
    for row in plain:
        for name in images:
            png = row[name]["bytes"]
            if png not in seen:
                seen[png] = sha(np.ascontiguousarray(Image().decode_example(row[name])).tobytes())
            row[name] = seen[png]
        total.update(json.dumps(row, sort_keys=True, ensure_ascii=True).encode() + b"\n")
    return total.hexdigest()


def _build(folder: Path, calibration: bool = False) -> dict[str, str]:
    """Write all data sets into ``folder`` and return the digests of what was written, read back."""
    bars = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        digests = {}
        for name, rows in all_tables(CALIBRATION_SEED if calibration else SEED).items():
            table = Dataset.from_list(rows, features=FEATURES[name])
            DatasetDict({SPLITS[name]: table}).save_to_disk(folder / name)
            digests[name] = digest(load_from_disk(str(folder / name))[SPLITS[name]])
        return digests
    finally:
        if bars:
            enable_progress_bar()


def _check_writable(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write to {root}: set VISIBENCH_CACHE to a folder of yours ({error})") from None
