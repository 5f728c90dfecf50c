"""Pruning methods, one file each, and their registry."""

from . import (
    dart,
    divprune,
    fastervlm,
    fastv,
    fitprune,
    none,
    pyramiddrop,
    random,
    visionzip,
    visipruner,
    vispruner,
    vtw,
)
from .base import BlockMerge, Budgeted, Forward, Keep, Merge, Method, top
from .registry import list_methods, load_method, register

__all__ = [
    "BlockMerge",
    "Budgeted",
    "Forward",
    "Keep",
    "Merge",
    "Method",
    "dart",
    "divprune",
    "fastervlm",
    "fastv",
    "fitprune",
    "list_methods",
    "load_method",
    "none",
    "pyramiddrop",
    "random",
    "register",
    "top",
    "visionzip",
    "visipruner",
    "vispruner",
    "vtw",
]
