"""Families by ``model_type`` of the configuration: a file of that name beside this one, and bare decoders."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from ..support import DECODERS
from .base import Family

_OTHERS = {"adapter", "base", "registry"}
_PACKAGE = __name__.rpartition(".")[0]
_HERE = sorted({module.name for module in iter_modules(import_module(_PACKAGE).__path__)} - _OTHERS)

FAMILIES: dict[str, Family] = dict.fromkeys(DECODERS, Family(decoder="model")) | {
    name: import_module(f"{_PACKAGE}.{name}").FAMILY for name in _HERE
}
"""All that have an adapter; those of images last."""
