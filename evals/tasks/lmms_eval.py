"""lmms-eval, imported with its side effects contained.

Importing lmms-eval takes over the process: it removes every loguru sink of the host and logs to standard output,
silences all warnings, and tells Pillow to accept truncated images. Import its names from here and none of that lasts.
Where lmms-eval runs already, and imports this package for one of its models, it is the host and keeps its ways.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import Any
from unittest.mock import patch

from loguru import logger
from PIL import ImageFile

_is_host = "lmms_eval.evaluator" in sys.modules


@contextmanager
def _contained() -> Iterator[None]:
    """Undo what an import of lmms-eval does to logging, warnings and Pillow."""
    truncated = ImageFile.LOAD_TRUNCATED_IMAGES
    sinks = patch.multiple(logger, remove=lambda *args: None, add=lambda *args, **options: -1)
    try:
        with warnings.catch_warnings(), sinks:
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = truncated


with _contained():
    import lmms_eval.api.task as _task
    import lmms_eval.evaluator as _evaluator
    from lmms_eval.api.instance import GenerationResult, TokenCounts
    from lmms_eval.api.model import lmms
    from lmms_eval.api.task import ConfigurableTask
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.models.model_utils.gen_metrics import log_metrics
    from lmms_eval.tasks import TaskManager
    from lmms_eval.utils import Collator, load_yaml_config, simple_parse_args_string

__all__ = [
    "Collator",
    "ConfigurableTask",
    "Decoding",
    "GenerationResult",
    "TaskManager",
    "TokenCounts",
    "lmms",
    "load_yaml_config",
    "log_metrics",
    "quiet",
    "simple_evaluate",
    "simple_parse_args_string",
    "with_images",
]


class Decoding(ConfigurableTask):
    """A task whose images may be written as pandas writes them."""

    def download(self, *args: Any, **options: Any) -> None:
        """Load the data, and see to such images."""
        super().download(*args, **options)
        if self.dataset_no_image is not self.dataset:
            for split, docs in self.dataset_no_image.items():
                self.dataset_no_image[split] = docs.remove_columns(_written(docs))
        with_images(self.dataset)


def with_images(data: Any) -> Any:
    """A ``DatasetDict``, images decoded also where they are ``{bytes, path}`` without a note that these are images."""
    from datasets import Image

    for split, docs in data.items():
        for column in _written(docs):
            docs = docs.cast_column(column, Image())
        data[split] = docs
    return data


def _written(docs: Any) -> list[str]:
    """Columns of images as pandas writes them."""
    return [name for name, kind in docs.features.items() if isinstance(kind, dict) and set(kind) == {"bytes", "path"}]


if not _is_host:  # loguru's own switch for libraries: what matters reaches the user as an exception
    logger.disable("lmms_eval")


@contextmanager
def quiet() -> Iterator[None]:
    """Within: lmms-eval draws no bars, logs nothing, and leaves standard output, which may carry JSON, alone."""
    real = _evaluator.tqdm

    def no_bar(*args: Any, **options: Any) -> Any:
        return real(*args, **options | {"disable": True})

    with ExitStack() as stack:
        stack.enter_context(patch.object(_evaluator, "tqdm", no_bar))
        stack.enter_context(patch.object(_task, "tqdm", no_bar))
        stack.enter_context(redirect_stdout(sys.stderr))
        logger.disable("utils")  # the name under which lmms-eval imports the code of its tasks
        stack.callback(logger.enable, "utils")
        yield
