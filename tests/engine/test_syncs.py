"""How often a prefill reads a value back from the device: for the counts of a cut, and for nothing else.

On a CPU reading costs nothing, so what would wait for a GPU is counted: every conversion of a tensor to Python values
while the method and what carries it out are at work.
"""

from contextlib import contextmanager

import pytest
import torch
import visibench
from cases import CASES
from support import collate, make_batch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

# Prefix, text and images of each row; one without an image.
ROWS = [(4, 8, 1), (9, 5, 2), (0, 6, 1), (3, 7, 0)]
READS = {
    getattr(torch.Tensor, name)
    for name in ("tolist", "item", "nonzero", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__")
} | {torch.nonzero, torch.equal, torch.allclose, torch.masked_select}


class Reads(TorchFunctionMode):
    """Counts reads inside spans called ``method``. Numbers made on the host, and what follows from them, are free.

    Indexing with a boolean mask reads as well: it asks how many there are.
    """

    def __init__(self):
        super().__init__()
        self.spans, self.found = [], []
        self.host = WeakTensorKeyDictionary()

    @contextmanager
    def __call__(self, part):
        self.spans.append(part)
        yield
        self.spans.pop()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        free = all(tensor in self.host for tensor in tensors) and (tensors or func is torch.tensor)
        masked = func is torch.Tensor.__getitem__ and _has_mask(args[1])
        if "method" in self.spans and not free and (func in READS or masked):
            self.found.append(func.__name__)
        result = func(*args, **kwargs)
        if free and "device" not in kwargs and isinstance(result, torch.Tensor):
            self.host[result] = True
        return result


def _has_mask(index):
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, torch.Tensor) and part.dtype == torch.bool for part in parts)


@pytest.mark.parametrize("method", CASES, ids=str)
def test_one_read_for_a_cut_and_none_besides(llava, method):
    batch = collate(make_batch(ROWS))
    reads = Reads()
    with torch.no_grad(), reads, visibench.prune(llava, method, watch=reads) as session:
        llava(**batch, use_cache=True)
    behind_the_tower = 1 if {"vision", "image", "tower"} & set(method.hook_points) else 0
    assert len(reads.found) <= session.trace.host_syncs + behind_the_tower
    layers = session.geometry.layers
    assert session.trace.host_syncs <= layers + 1, "at most one a decoder layer, and one in front of them"


def test_reads_are_seen():
    reads = Reads()
    with reads, reads("method"):
        mask = torch.zeros(2) > 0
        mask.tolist(), bool(mask[0]), mask[mask], mask.nonzero(), int(mask.sum())
        int(torch.tensor(3) * 2), torch.tensor([4]).tolist()
    assert reads.found == ["tolist", "__bool__", "__getitem__", "nonzero", "__int__"]
