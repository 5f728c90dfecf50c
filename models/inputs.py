"""Questions and images as users hand them over, made what a processor takes: right, or refused in one clear line."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import singledispatch
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import FOREIGN, DataError, InputError, reason
from ..utils.files import read

_ORIENTATION = 0x112  # the EXIF tag


def prepared(questions: Sequence[str], images: Sequence[Sequence[Any]]) -> list[list[Image.Image]]:
    """The images of each question as :func:`as_rgb` makes them.

    Raises :class:`InputError` unless each question is text and has a list of them, and names the image that cannot be
    used.
    """
    if len(questions) != len(images):
        raise InputError(f"{len(questions)} questions, but images for {len(images)}")
    for row, (question, pictures) in enumerate(zip(questions, images, strict=True)):
        if not isinstance(question, str):
            raise InputError(f"questions[{row}] is a {type(question).__name__}, not text")
        if not isinstance(pictures, list | tuple):
            raise InputError(
                f"images[{row}] is a {type(pictures).__name__}, not the list of images of question {row}: give "
                "[[image], …] with a list for each question, empty where it has none"
            )
    return [
        [_located(picture, row, place) for place, picture in enumerate(pictures)] for row, pictures in enumerate(images)
    ]


def _located(picture: Any, row: int, place: int) -> Image.Image:
    try:
        return as_rgb(picture)
    except InputError as error:
        raise InputError(f"images[{row}][{place}]: {error}") from error


def as_rgb(picture: Any) -> Image.Image:
    """A PIL image, the path of one, or an array of uint8, upright and with three channels of 8 bits.

    16-bit grey values are scaled; alpha is left out, as Pillow does. Raises :class:`InputError` for what has no pixels
    or no known range of values, and :class:`DataError` for a file that cannot be read.
    """
    image = upright(_opened(picture))
    if 0 in image.size:
        raise InputError(f"an image of {image.width} × {image.height} pixels")
    narrow = _in_8_bits(image)
    try:
        return narrow.convert("RGB")
    except ValueError as error:
        raise InputError(f"an image of mode {image.mode} cannot be made RGB ({error}): convert it first") from error


def upright(image: Image.Image) -> Image.Image:
    """The image, turned as its EXIF data say."""
    return ImageOps.exif_transpose(image) if image.getexif().get(_ORIENTATION, 1) != 1 else image


def undecoded(error: BaseException) -> str:
    """Why an image cannot be decoded, in one line. On damaged files, Pillow's decoders raise errors of any type."""
    if isinstance(error, UnidentifiedImageError):  # its text names an object in memory
        return "not an image"
    return getattr(error, "strerror", None) or reason(error)


def _loaded(look: Callable[[], Image.Image], name: str) -> Image.Image:
    """What ``look`` finds, decoded: Pillow reads the pixels of a file when they are first needed."""
    try:
        image = look()
        image.load()
    except FOREIGN as error:
        raise DataError(f"cannot read {name}: {undecoded(error)}") from error
    return image


@singledispatch
def _opened(picture: Any) -> Image.Image:
    raise InputError(f"cannot use a {type(picture).__name__}: give a PIL image, a path or a uint8 array")


@_opened.register
def _(picture: Image.Image) -> Image.Image:
    return _loaded(lambda: picture, "image")


@_opened.register(str)
@_opened.register(Path)
def _(picture: str | Path) -> Image.Image:
    return _loaded(lambda: Image.open(io.BytesIO(read(picture))), f"image {str(picture)!r}")


@_opened.register
def _(picture: np.ndarray) -> Image.Image:
    channels = picture.shape[2:] or (1,)
    if picture.dtype != np.uint8 or picture.ndim not in (2, 3) or channels[0] not in (1, 3, 4):
        raise InputError(
            f"an array of {picture.dtype} {picture.shape}: give uint8, (height, width) or (height, width, 3)"
        )
    return Image.fromarray(picture.squeeze(2) if channels == (1,) and picture.ndim == 3 else picture)


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Pillow would cut values above 255 off."""
    if not image.mode.startswith(("I", "F")):
        return image
    values: NDArray[Any] = np.asarray(image)
    # A PNG file of 16 bits is I;16, or I in older versions of Pillow.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return Image.fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode == "I" and values.min() >= 0 and values.max() <= 255:
        return image
    raise InputError(
        f"an image of mode {image.mode} with values from {values.min():g} to {values.max():g}: scale it to 8 bits first"
    )


def as_text(question: str, processor: Any) -> str:
    """The question without tokens that stand for images: some tasks write ``<image>`` where they speak of one.

    A space behind its first character makes such a token plain text.
    """
    for name in ("image_token", "video_token"):
        token = getattr(processor, name, None)
        if token:
            question = question.replace(token, f"{token[0]} {token[1:]}")
    return question


def special_tokens(texts: Sequence[str], tokenizer: Any) -> dict[str, bool]:
    """Options of a processor under which no prompt begins with two BOS tokens: a chat template may write its own."""
    bos = getattr(tokenizer, "bos_token", None)
    return {"add_special_tokens": False} if bos and all(text.startswith(bos) for text in texts) else {}
