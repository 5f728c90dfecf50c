"""Models: loading (load), what a processor is given (inputs), how a model is asked (protocols), the embedded one
(tiny), published sizes (geometry). Where families keep their parts (adapters), and what of them was tested (support).
"""

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
