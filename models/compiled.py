"""torch.compile for the parts of decoder layers that stand beside the attention: norms and MLPs.

Nobody acts inside them, so they can be compiled under any method; layers as a whole cannot, since hooks and attention
functions would be fixed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import OptionError, boundary

if TYPE_CHECKING:
    from .adapters import Adapter

# Between its steps a fused kernel rounds as the steps by themselves do.
OPTIONS: Any = {"emulate_precision_casts": True}
REFUSED = (
    "cannot compile: leave compile out, or install what torch.compile needs (a C++ compiler, on a GPU Triton as well)"
)


def compile_parts(adapter: Adapter) -> None:
    """From now on they run compiled, for any number of tokens.

    Their classes become subclasses that differ in a compiled ``forward``: layers share what was compiled, and hooks and
    copies of the model go on as ever. One layer's run at once. Raises :class:`OptionError` where they cannot.
    """
    kinds: dict[type, type] = {}
    parts = adapter.beside_attention()
    for part in parts:
        kind = type(part)
        if kind not in kinds:
            forward: Any = torch.compile(kind.forward, dynamic=True, options=OPTIONS)
            kinds[kind] = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
        part.__class__ = kinds[kind]
    model, width = adapter.model, adapter.geometry.hidden
    with boundary(REFUSED, OptionError), torch.inference_mode():
        for part in parts[: len(parts) // len(adapter.layers)]:
            part(torch.zeros(1, 8, width, dtype=model.dtype, device=model.device))


def is_compiled(part: nn.Module) -> bool:
    """Whether its ``forward`` is a compiled one."""
    return hasattr(part.forward, "_torchdynamo_orig_callable")
