"""Where the vision features of a sweep are kept between its cells."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...engine.vision.features import FeatureStore
from ...models import LoadedModel
from ...models.load import fingerprint
from ...results.store.records import digest
from .config import SweepConfig


def feature_store(loaded: LoadedModel, config: SweepConfig, say: Callable[[str], Any]) -> FeatureStore:
    """The store of a process that works for a sweep; see :func:`store_of`."""
    return store_of(loaded, config.model, config.kept, config.keep_features, say)


def store_of(loaded: LoadedModel, name: str, limit: int, keep: bool, say: Callable[[str], Any]) -> FeatureStore:
    """A store for the model that is called ``name``, with files under ``$VISIBENCH_CACHE`` or ``~/.cache/visibench``.

    Features belong to a checkpoint, its vision settings, dtype, device and machine, and versions of the libraries.
    """
    model: Any = loaded.model
    identity = digest(
        {
            "checkpoint": fingerprint(name),
            "revision": getattr(model.config, "_commit_hash", None),
            "vision": model.config.vision_config.to_dict(),
            "model": {key: str(value) for key, value in loaded.describe().items()},
        }
    )
    root = Path(os.environ.get("VISIBENCH_CACHE") or Path.home() / ".cache" / "visibench")
    return FeatureStore(limit, root / "features", identity=identity, keep=keep, say=say)
