"""Images of embedded questions, for checkpoints that see them as they are: neither lmms-eval nor torch is loaded."""

from __future__ import annotations

import io
import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from .. import models
from ..results.store.records import CellConfig
from ..synthetic import built

if TYPE_CHECKING:
    import pyarrow as pa

FOLDERS = {"gqa": "GQA_instructions", "mme": "MME", "pope": "POPE", "textvqa_val": "textvqa"}
"""Where the questions of a task lie; GQA's images lie apart."""
_MME = " Please answer"
"""Where lmms-eval cuts a question of MME off."""


def find(config: CellConfig, doc_id: int, prompt: str) -> tuple[Image.Image, int] | None:
    """The image of a question of a cell, and its patches a side; None where tasks and processors must be asked."""
    size, side = _seen(config.model)
    if config.origin != "embedded" or config.task not in FOLDERS or config.protocol or not size:
        return None
    folder = _folder()
    image = _image(folder, FOLDERS[config.task], doc_id, prompt) if folder else None
    return (image, side) if image and image.size == (size, size) else None


@lru_cache(maxsize=1)
def _folder() -> Path | None:
    """Where the data sets are, if they are built."""
    folder = built.place()
    return folder if built.sealed(folder) else None


@lru_cache(maxsize=8)
def _seen(model: str) -> tuple[int, int]:
    """Pixels and patches a side of the one square image that a checkpoint on this disk sees; zeros for others."""
    folder = Path(models.__file__).parent / "tiny" / "checkpoint" if model == "tiny" else Path(model)
    try:
        config, processor = (json.loads((folder / f"{name}config.json").read_text()) for name in ("", "processor_"))
        vision, images = config["vision_config"], processor["image_processor"]
        size, patch = vision["image_size"], vision["patch_size"]
        plain = config["model_type"] == "llava" and images["image_processor_type"] == "CLIPImageProcessor"
        whole = images["size"] == {"height": size, "width": size} and not images["do_center_crop"]
        return (size, size // patch) if plain and whole else (0, 0)
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError):
        return 0, 0


@lru_cache(maxsize=8)
def _table(folder: Path) -> pa.Table:
    """A data set of one split, as ``save_to_disk`` has written it."""
    import pyarrow as pa

    files = sorted(folder.glob("*/data-*.arrow"))
    return pa.concat_tables([pa.ipc.open_stream(pa.memory_map(str(file))).read_all() for file in files])


def _image(folder: Path, name: str, doc_id: int, prompt: str) -> Image.Image | None:
    """The image of a question; None where it is another question than that of the ``prompt`` now."""
    docs = _table(folder / name)
    asked = docs["question"][doc_id].as_py() if 0 <= doc_id < len(docs) else ""
    if asked.partition(_MME)[0].lower() != prompt.partition("\n")[0].lower():  # lmms-eval writes TextVQA's large
        return None
    if "image" in docs.column_names:
        image = docs["image"][doc_id]
    else:
        images = _table(folder / "GQA_images")
        image = images["image"][images["id"].index(docs["imageId"][doc_id]).as_py()]
    return Image.open(io.BytesIO(image["bytes"].as_py()))
