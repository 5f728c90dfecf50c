"""Pruning methods, one file each, and their registry."""

from . import (
    cdpruner,
    dart,
    divprune,
    fastervlm,
    fastv,
    fitprune,
    none,
    prumerge,
    pyramiddrop,
    random,
    sparsevlm,
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
    "cdpruner",
    "dart",
    "divprune",
    "fastervlm",
    "fastv",
    "fitprune",
    "list_methods",
    "load_method",
    "none",
    "prumerge",
    "pyramiddrop",
    "random",
    "register",
    "sparsevlm",
    "top",
    "visionzip",
    "visipruner",
    "vispruner",
    "vtw",
]
