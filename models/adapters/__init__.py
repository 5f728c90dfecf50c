"""Model families: one family, one file, named by the ``model_type`` of its configuration.

``base``: what a file says of its family. ``registry``: finds the files. ``adapter``: one model seen through its family.
"""

from .adapter import Adapter
from .base import Family, Geometry, Images, VisionGeometry
from .registry import FAMILIES, UNFIT, family_of

__all__ = ["FAMILIES", "UNFIT", "Adapter", "Family", "Geometry", "Images", "VisionGeometry", "family_of"]
