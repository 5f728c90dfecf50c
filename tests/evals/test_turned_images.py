"""A sweep turns images as their EXIF data say before anything is made of them: input, hash and grid."""

import io

import numpy as np
import visibench
from PIL import Image
from visibench.evals.answers import cell, generate
from visibench.evals.answers.cell_spec import CellSpec
from visibench.evals.tasks.tasks import Task, load_tasks
from visibench.results.store.records import CellConfig
from visibench.results.store.store import Store

STORED = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8))
TURNED = Image.fromarray(np.ascontiguousarray(np.rot90(np.asarray(STORED), -1)))


def tagged() -> Image.Image:
    exif, stream = Image.Exif(), io.BytesIO()
    exif[0x112] = 6
    STORED.save(stream, "PNG", exif=exif)
    return Image.open(stream)


def test_a_tagged_image_is_asked_named_and_drawn_as_the_turned_one(loaded, disk_data, tmp_path, monkeypatch):
    dense = visibench.load_method("none")
    given = {"model": "m", "method": "none", "options": dense.hyperparameters(), "label": "none", "task": "pope"}
    config = CellConfig(**given, origin="data", batch_size=3, timing=None, limit=3)
    named = generate.picture_hash

    def answered(image: Image.Image, run: str):
        """Answers and hashes of three questions about one image, and the sizes of what is hashed and drawn."""
        sizes: list = []
        monkeypatch.setattr(Task, "images", lambda self, doc_id: [image])
        monkeypatch.setattr(
            generate, "picture_hash", lambda images: sizes.append((images[0].size, named(images))) or ""
        )
        (task,) = load_tasks(["pope"], str(disk_data))
        samples = cell.run_cell(loaded, CellSpec(config, dense, None), task, Store(tmp_path / run)).samples()
        return samples[["output", "prompt_visual_tokens", "places"]].to_dict(), sizes

    turned, stored = answered(TURNED, "turned"), answered(STORED, "stored")
    assert answered(tagged(), "tagged") == turned
    assert stored != turned
    assert {size for size, _ in turned[1]} == {(32, 48)}
