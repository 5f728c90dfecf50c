"""Images of questions, loaded again from where the run had them, and shown as its model saw them."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..errors import VisibenchError
from ..evals.tasks.tasks import EMBEDDED, Task, load_tasks
from ..models.inputs import as_rgb
from ..models.protocols import Protocol, find
from ..results.store.records import CellConfig
from ..results.store.store import Cell
from ..utils.bounded_cache import GIB, BoundedCache
from ..utils.token_grids import drawable, kept_tokens, placed, read, views
from . import embedded_images
from .question_image import QuestionImage, numbered

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..models import LoadedModel

LONGEST = 336
"""Pixels of the longer side of an image in a report, at most."""
DIMMED = 0.25
"""Brightness of patches whose tokens did not stay, of their own."""
_LOSSLESS = 40_000  # bytes up to which an image is stored as PNG


class ImageLoader:
    """A :data:`~visibench.reports.question_image.ImageSource`; keeps tasks, and the processor of each model."""

    def __init__(self) -> None:
        self._models: dict[tuple[str, Protocol], LoadedModel | str] = {}
        self._tasks: dict[tuple[str, str, Protocol], Task | str] = {}
        self._shown: BoundedCache[list[QuestionImage] | str] = BoundedCache(_size, GIB // 8)

    def __call__(self, config: CellConfig, prompts: Mapping[int, str]) -> dict[int, list[QuestionImage] | str]:
        """The images of the questions ``prompts`` (by doc_id) of a cell, or why one cannot be shown."""
        # What is not one of lmms-eval's own is found by its file.
        source = config.sources.get("task", "")
        own = Path(source.partition(":")[0]).is_absolute()
        asked = find(config.protocol or "hf")
        entry, data = (source, EMBEDDED) if own else (config.task, config.origin)
        place = (entry, data, asked, config.model)  # other cells of a sweep show the same questions
        show = partial(self._pictures, config, asked, entry, data)
        return {
            doc_id: self._shown.get((*place, doc_id, prompt), partial(show, doc_id, prompt))
            for doc_id, prompt in prompts.items()
        }

    def overlaid(self, cell: Cell, doc_ids: Sequence[int]) -> dict[int, dict[str, Image.Image]]:
        """Images of questions of a cell: ``image``, and ``kept``, where patches are dim whose tokens did not stay.

        More images, and more views of one, are numbered: ``image_2``, ``kept_2`` …

        A :data:`~visibench.reports.wandb.sink.OverlaySource`. What cannot be shown is missing.
        """
        rows = cell.samples().set_index("doc_id").loc[list(doc_ids)]
        overlaid = {}
        for doc_id, pictures in self(cell.config, rows["prompt"].to_dict()).items():
            if isinstance(pictures, str):
                continue
            row, tokens = rows.loc[doc_id], int(rows.loc[doc_id].get("prompt_visual_tokens", 0))
            images = [_decoded(picture) for picture in pictures]
            kept = kept_tokens(row.get("kept"), tokens)
            grids, whole = [picture.grid for picture in pictures], all(picture.whole for picture in pictures)
            places = placed(read(row.get("places")), tokens, grids, whole)
            overlaid[doc_id] = {numbered("image", place): image for place, image in enumerate(images, start=1)}
            if kept and drawable(kept, row["visual_tokens"][-1], places):
                for place, view in enumerate(views(kept, places), start=1):
                    overlaid[doc_id][numbered("kept", place)] = dimmed(images[view.image], view.cells)
        return overlaid

    def _task(self, name: str, origin: str, protocol: Protocol) -> Task | str:
        """A task; or why its data cannot be had."""
        key = (name, origin, protocol)
        if key not in self._tasks:
            try:
                (self._tasks[key],) = load_tasks([name], origin, protocol=protocol)
            except VisibenchError as error:
                self._tasks[key] = str(error)
        return self._tasks[key]

    def _pictures(
        self, config: CellConfig, protocol: Protocol, entry: str, data: str, doc_id: int, prompt: str
    ) -> list[QuestionImage] | str:
        known = embedded_images.find(config, doc_id, prompt)
        if known is not None:
            image, side = known
            return [stored(image, _as_the_model_saw(image.width, image.height), side)]
        task = self._task(entry, data, protocol)
        if isinstance(task, str):
            return task
        if not 0 <= doc_id < len(task.docs):
            return f"the data have changed since the run: there is no question {doc_id}"
        try:
            now, images = task.question(doc_id)
        except VisibenchError as error:
            return str(error)
        if now != prompt:
            return "the data have changed since the run: this question is another one now"
        loaded = self._model(config.model, protocol)
        if isinstance(loaded, str):
            about = f"as in the data (what the model saw is not known: {loaded})"
            return [stored(image, about, whole=False) for image in images]
        return [_as_seen(loaded, image) for image in images]

    def _model(self, name: str, protocol: Protocol) -> LoadedModel | str:
        """The model without weights, for its sizes and its processor; or why there is none."""
        from ..models import load_model  # transformers, which nobody needs where the data are gone

        if (name, protocol) not in self._models:
            try:
                self._models[name, protocol] = load_model(name, device="cpu", weights="meta", protocol=protocol)
            except VisibenchError as error:
                self._models[name, protocol] = str(error)
        return self._models[name, protocol]


def _size(shown: list[QuestionImage] | str) -> int:
    return len(shown) if isinstance(shown, str) else sum(len(picture.uri) for picture in shown)


def _as_seen(loaded: LoadedModel, image: Image.Image) -> QuestionImage:
    """The image behind resizing and cropping, before its values are scaled; as it is where it is cut into tiles."""
    vision = loaded.geometry.vision
    pixels = (
        None
        if loaded.processor is None or loaded.adapter.kind != "llava"
        else seen(loaded.processor, *loaded.protocol.shaped(loaded.processor, [as_rgb(image)]))
    )
    if pixels is None or vision is None:
        return stored(
            image,
            "as in the data (the model sees it in other sizes, or as tiles)",
            whole=loaded.adapter.kind != "llava",
        )
    side = math.isqrt(vision.tokens)
    square = side**2 == vision.tokens and pixels.shape[0] == pixels.shape[1]
    return stored(Image.fromarray(pixels), _as_the_model_saw(*pixels.shape[1::-1]), side if square else 0)


def _as_the_model_saw(width: int, height: int) -> str:
    return f"as the model saw it, {width} × {height} pixels"


def _decoded(picture: QuestionImage) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(picture.uri.partition(",")[2]))).convert("RGB")


def dimmed(image: Image.Image, kept: NDArray[np.bool_]) -> Image.Image:
    """The image with all cells of a grid dark but those that are ``kept``, bool (rows, columns)."""
    cells = np.where(kept, 255, round(255 * DIMMED)).astype(np.uint8)
    mask = Image.fromarray(cells).resize(image.size, Image.Resampling.NEAREST)
    return Image.composite(image, Image.new("RGB", image.size), mask)


def seen(processor: Any, image: Image.Image) -> NDArray[np.uint8] | None:
    """What the image processor makes of an image, uint8 (height, width, 3); None if it makes several images of it."""
    made = processor.image_processor(images=[as_rgb(image)], do_rescale=False, do_normalize=False, return_tensors="pt")[
        "pixel_values"
    ]
    if made.ndim != 4 or len(made) != 1:
        return None
    return made[0].float().round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def stored(image: Image.Image, about: str, grid: int = 0, *, whole: bool = True) -> QuestionImage:
    """The image in a page, at most :data:`LONGEST` pixels wide and high: PNG, or JPEG where that is large."""
    small = as_rgb(image)
    small.thumbnail((LONGEST, LONGEST))
    data, kind = _encoded(small, "PNG", compress_level=3), "png"  # more takes long, and is no smaller for pictures
    if len(data) > _LOSSLESS:
        data, kind = _encoded(small, "JPEG", quality=85, optimize=True), "jpeg"
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return QuestionImage(uri, small.width, small.height, grid, about, whole)


def _encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()
