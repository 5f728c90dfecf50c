"""What a call of the model asks of a device, counted exactly: operations, kernels, memory and waits; no time.

On a GPU small batches take as long as it takes to hand out their kernels, and every value read back to Python waits for
all that was handed out before. Counted on any machine; kernels that only one device has (fused attention) count there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from ...engine import prune
from ...methods import Method
from ...models import LoadedModel
from ...models.geometry import build, configuration

PHASES = ("vision", "prefill", "decode")
READS = {
    getattr(Tensor, name)
    for name in (
        *("tolist", "item", "nonzero", "numpy", "__array__", "__dlpack__"),
        *("__bool__", "__int__", "__float__", "__index__"),
    )
} | {torch.nonzero, torch.equal, torch.allclose, torch.masked_select}
# They hand out memory, or a view that the schema does not call one.
_NO_KERNEL = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "_reshape_alias",
}


class Reads(TorchFunctionMode):
    """Names in ``found`` each read of a device's value; numbers made on the host, and what follows from them, are free.

    On a CPU reading costs nothing, so what would wait for a GPU is counted: every conversion of a tensor to Python
    values. Indexing with a boolean mask is one: it asks how many there are. As a session's ``watch`` it counts
    what the method and what carries it out read, and nothing else.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._spans: list[str] | None = None
        self._host = WeakTensorKeyDictionary()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        self._spans = self._spans or []
        self._spans.append(part)
        yield
        self._spans.pop()

    def watching(self) -> Reads:
        """The same, counting inside spans called ``method`` alone."""
        self._spans = []
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        free = all(tensor in self._host for tensor in tensors) and (tensors or func is torch.tensor)
        masked = func is Tensor.__getitem__ and _has_mask(args[1])
        counts = self._spans is None or "method" in self._spans
        if counts and not free and (func in READS or masked):
            self.found.append(func.__name__)
        result = func(*args, **kwargs)
        if free and "device" not in kwargs:
            self._host.update({leaf: True for leaf in tree_leaves(result) if isinstance(leaf, Tensor)})
        return result


def _has_mask(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, Tensor) and part.dtype == torch.bool for part in parts)


@dataclass(frozen=True)
class Launches:
    """Of one phase: ``operations`` dispatched by torch, ``kernels`` among them (views and empty memory are none),
    ``written`` bytes of new tensors, ``reads`` of values back to Python."""

    operations: int = 0
    kernels: int = 0
    written: int = 0
    reads: int = 0

    def __sub__(self, other: Launches) -> Launches:
        return Launches(*(getattr(self, name) - getattr(other, name) for name in self.__dataclass_fields__))


class Launched(TorchDispatchMode):
    """Counts while active."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.kernels = self.written = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        name, returned = func.overloadpacket.__name__, func._schema.returns
        views = any(value.alias_info is not None and not value.alias_info.is_write for value in returned)
        if not views and name not in _NO_KERNEL:
            self.kernels += 1
        makes = all(value.alias_info is None for value in returned) and name != "_unsafe_view"
        if makes:
            self.written += sum(leaf.nbytes for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result


def narrow(name: str) -> LoadedModel:
    """A published model with all its layers and tokens and random weights, but narrow: counts do not depend on it."""
    config = configuration(name)
    for part in (config.text_config, config.vision_config):
        part.hidden_size, part.intermediate_size, part.num_attention_heads = 64, 64, 4
    config.text_config.num_key_value_heads, config.text_config.head_dim, config.text_config.vocab_size = 4, 16, 512
    config.text_config.pad_token_id, config.image_token_index = 0, 500
    config.image_token_id = 500
    model = build(config, "random", None, torch.device("cpu"), torch.float32, "sdpa")
    return LoadedModel(f"{name}, narrow", model.eval(), None, "random")


def count_launches(loaded: LoadedModel, method: Method | None, inputs: Mapping[str, Any]) -> dict[str, Launches]:
    """By phase: ``vision`` (tower and projector), ``prefill`` (all that comes before and behind it, up to the first
    token's logits) and ``decode``, the step that follows. ``method``: None for the model alone."""
    marks: list[Launches] = []
    launched, reads = Launched(), Reads()

    def mark(*_: Any) -> None:
        marks.append(Launches(launched.operations, launched.kernels, launched.written, len(reads.found)))

    model: Any = loaded.model
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(nullcontext() if method is None else prune(model, method))
        stack.callback(loaded.adapter.vision_tower.register_forward_pre_hook(mark, prepend=True).remove)
        stack.callback(loaded.adapter.projector.register_forward_hook(mark).remove)
        stack.enter_context(launched)
        stack.enter_context(reads)
        mark()
        output = model(**inputs, use_cache=True, logits_to_keep=1)
        mark()
        step(model, inputs, output)
        mark()
    start, into, behind, prefill, end = marks if len(marks) == 5 else (marks[0], marks[0], marks[0], *marks[1:])
    vision = behind - into
    return {"vision": vision, "prefill": prefill - start - vision, "decode": end - prefill}


def step(model: Any, inputs: Mapping[str, Any], output: Any) -> Any:
    """One step of decoding behind the prefill that gave ``output``."""
    token = output.logits[:, -1:].argmax(-1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(token)], dim=1)
    at = mask.cumsum(1)[:, -1:] - 1
    return model(input_ids=token, attention_mask=mask, position_ids=at, past_key_values=output.past_key_values)
