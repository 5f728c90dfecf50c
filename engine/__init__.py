"""The engine: runs a model under a pruning method. The only part of visibench that touches tensors of the model."""

from ..utils import torchvision

torchvision.ensure_importable()

from .layout import TokenLayout  # noqa: E402
from .session import PruningSession, prune  # noqa: E402
from .trace import Trace  # noqa: E402

__all__ = ["PruningSession", "TokenLayout", "Trace", "prune"]
