"""Models: loading, published sizes (geometry), where families keep their parts (adapters), the embedded one (tiny)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .load import LoadedModel, list_models, load_model

__all__ = ["LoadedModel", "list_models", "load_model"]

_HOME = dict.fromkeys(__all__, ".load")


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)
