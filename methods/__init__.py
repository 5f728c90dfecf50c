"""Pruning methods, one file each, and their registry."""

from . import dart, fastv, none, pyramiddrop, random, visipruner, vtw
from .base import Budgeted, Forward, Keep, Merge, Method, top
from .registry import list_methods, load_method, register

__all__ = [
    "Budgeted",
    "Forward",
    "Keep",
    "Merge",
    "Method",
    "dart",
    "fastv",
    "list_methods",
    "load_method",
    "none",
    "pyramiddrop",
    "random",
    "register",
    "top",
    "visipruner",
    "vtw",
]
