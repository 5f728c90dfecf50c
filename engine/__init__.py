"""The engine: runs a model under a pruning method. The only part of visibench that touches tensors of the model.

In the order of the arrows: roles of tokens (layout), runs of layers with the same tokens (segment), what methods may
return (decisions), attention maths (attention/), what a layer computes before it runs (ahead), images as units and
what a tower computed of them (units/), the record (trace), what methods may read (views), the contract between both
(contract), vision at work (vision/), the cache and what it holds (cache), what a call is given (inputs), calls of the
model and of ``generate`` (passes, generation), hooks (session). docs/engine.md is the design.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .layout import TokenLayout
    from .session import PruningSession, prune
    from .trace import Trace

__all__ = ["PruningSession", "TokenLayout", "Trace", "prune"]

_HOME = {"PruningSession": ".session", "TokenLayout": ".layout", "Trace": ".trace", "prune": ".session"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)
