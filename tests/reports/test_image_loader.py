"""Pictures in reports are those that the model saw."""

import base64
import io
import subprocess
import sys

import numpy as np
import pytest
import visibench
import visibench.synthetic
from PIL import Image, ImageOps
from storing import config
from visibench.evals.tasks.tasks import load_tasks
from visibench.reports import embedded_images
from visibench.reports.image_loader import ImageLoader, seen, stored

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8))


def sideways():
    exif, stream = Image.Exif(), io.BytesIO()
    exif[0x112] = 6
    PHOTO.save(stream, "PNG", exif=exif)
    return Image.open(stream)


def deep():
    return Image.fromarray(np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16))


@pytest.mark.parametrize(
    ("image", "plain"),
    [
        (sideways(), ImageOps.exif_transpose(sideways())),
        (deep(), Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))),
    ],
    ids=["turned by EXIF", "16 bits"],
)
def test_pictures_are_turned_and_scaled_as_for_the_model(image, plain):
    processor = visibench.load_model("tiny", device="cpu", weights="meta").processor
    assert np.array_equal(seen(processor, image), seen(processor, plain))
    page = stored(image, "as in the data")
    shown = Image.open(io.BytesIO(base64.b64decode(page.uri.partition(",")[2])))
    assert np.array_equal(np.asarray(shown), np.asarray(plain.convert("RGB")))


TASKS = ("gqa", "mme", "textvqa_val", "pope")


@pytest.mark.slow
def test_embedded_images_are_those_that_tasks_and_processor_give(monkeypatch):
    asked = {task.name: {doc_id: task.text(doc_id) for doc_id in (0, 1, 77, 499)} for task in load_tasks(TASKS)}
    found = {name: ImageLoader()(config(task=name), prompts) for name, prompts in asked.items()}
    assert all(
        embedded_images.find(config(task=name), doc_id, prompt)
        for name, prompts in asked.items()
        for doc_id, prompt in prompts.items()
    )
    monkeypatch.setattr(embedded_images, "find", lambda *args: None)
    assert found == {name: ImageLoader()(config(task=name), prompts) for name, prompts in asked.items()}
    assert "as the model saw it, 144 × 144 pixels" in {one.about for (one,) in found["gqa"].values()}


@pytest.mark.slow
def test_neither_lmms_eval_nor_torch_is_loaded_for_them():
    prompt = load_tasks(["pope"])[0].text(3)
    code = f"""
import sys
from visibench.reports.image_loader import ImageLoader
from visibench.results.store.records import CellConfig
cell = CellConfig(model="tiny", method="none", options={{}}, label="none", task="pope")
assert not isinstance(ImageLoader()(cell, {{3: {prompt!r}}})[3], str)
sys.exit(bool({{"torch", "lmms_eval", "transformers"}} & {{*sys.modules}}))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_not_as_embedded_is_asked_of_tasks_and_processor(tmp_path, monkeypatch):
    folder = embedded_images.built.place()
    if not embedded_images.built.sealed(folder):
        visibench.synthetic.ensure()
    prompt = "is there A ring in the image?\nAnswer the question using a single word or phrase."
    doc_id = embedded_images._table(folder / "POPE")["question"].index("Is there a ring in the image?").as_py()
    image, side = embedded_images.find(config(task="pope"), doc_id, prompt)
    assert (image.size, side) == ((144, 144), 12)
    others = {"model": "llava-hf/llava-1.5-7b-hf"}, {"origin": "hub"}, {"protocol": {"name": "x"}}
    for other in others:
        assert embedded_images.find(config(task="pope", **other), doc_id, prompt) is None
    assert embedded_images.find(config(task="mine"), doc_id, prompt) is None
    for place, said in ((doc_id, "is there a ring?"), (-1, prompt), (10**6, prompt)):
        assert embedded_images.find(config(task="pope"), place, said) is None
    monkeypatch.setenv("VISIBENCH_CACHE", str(tmp_path))
    embedded_images._folder.cache_clear()
    assert embedded_images.find(config(task="pope"), doc_id, prompt) is None
    embedded_images._folder.cache_clear()
