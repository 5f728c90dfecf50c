"""Pruning methods, one file each; importing this package registers them all.

To write one: a class under :func:`register` whose annotated attributes are its options, on one of

- :class:`Scored`: its ``score(view)`` is the method, its budget ``keep`` or ``tokens``; ``hook_points`` says which view
- :class:`Ranked`: the same without a budget; ``left`` says at which layers how many tokens stay
- :class:`Budgeted` or :class:`Method`: it answers at its hook points itself, with :class:`Keep` or :class:`Merge`, in
  the decoder through a :class:`Forward`

Beside these, :class:`Layered` lets layers be named on a model of 32.

``base`` holds these, ``pieces`` and ``grids`` what several files share, ``registry`` the methods by name, also those of
other packages and of single files.
"""

from importlib import import_module
from pkgutil import iter_modules

from ..engine.contract import BlockCut, BlockMerge, Forward, Join, Keep, Merge, Method, Positions
from .base import Budgeted, Layered, Ranked, Scored, top
from .registry import list_methods, load_method, register

__all__ = [
    "BlockCut",
    "BlockMerge",
    "Budgeted",
    "Forward",
    "Join",
    "Keep",
    "Layered",
    "Merge",
    "Method",
    "Positions",
    "Ranked",
    "Scored",
    "list_methods",
    "load_method",
    "register",
    "top",
]

for _module in iter_modules(__path__):
    if _module.name != "__main__":
        import_module(f"{__name__}.{_module.name}")
