"""visibench: visual-token pruning methods behind one interface, and a benchmark that compares them.

The public names are loaded on first use, so that ``import visibench`` costs no torch import. It makes a
CUDA build of torchvision importable beside a CPU build of torch, for whoever imports it next.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .utils import torchvision

if TYPE_CHECKING:
    from .engine import TokenLayout, prune
    from .methods import list_methods, load_method
    from .models import load_model
    from .results.tables.notebook import tables

__version__ = "0.2.0"
__all__ = ["TokenLayout", "__version__", "list_methods", "load_method", "load_model", "prune", "tables"]

torchvision.install()

_HOME = {
    "prune": ".engine",
    "TokenLayout": ".engine",
    "load_method": ".methods",
    "list_methods": ".methods",
    "load_model": ".models",
    "tables": ".results.tables.notebook",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'visibench' has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
