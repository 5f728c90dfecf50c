"""Models: loading, and where each family keeps its parts."""

from ..utils import torchvision

torchvision.ensure_importable()

from .load import LoadedModel, list_models, load_model  # noqa: E402

__all__ = ["LoadedModel", "list_models", "load_model"]
