"""Pictures in reports are those that the model saw."""

import base64
import io

import numpy as np
import pytest
import visibench
from PIL import Image, ImageOps
from visibench.reports.image_loader import seen, stored

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
