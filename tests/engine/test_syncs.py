"""How often a prefill reads a value back from the device: for the counts of a cut, and for nothing else.

On a CPU reading costs nothing, so what would wait for a GPU is counted: every conversion of a tensor to Python values
while the method and what carries it out are at work.
"""

import pytest
import torch
import visibench
from cases import CASES
from support import collate, make_batch
from visibench.evals.compute.launches import Reads

# Prefix, text and images of each row; one without an image.
ROWS = [(4, 8, 1), (9, 5, 2), (0, 6, 1), (3, 7, 0)]


@pytest.mark.parametrize("method", CASES, ids=str)
def test_one_read_for_a_cut_and_none_besides(llava, method):
    batch = collate(make_batch(ROWS))
    reads = Reads().watching()
    with torch.no_grad(), reads, visibench.prune(llava, method, watch=reads) as session:
        llava(**batch, use_cache=True)
    behind_the_tower = 1 if {"vision", "image", "tower"} & set(method.hook_points) else 0
    assert len(reads.found) <= session.trace.host_syncs + behind_the_tower
    layers = session.geometry.layers
    assert session.trace.host_syncs <= layers + 1, "at most one a decoder layer, and one in front of them"


def test_reads_are_seen():
    reads = Reads().watching()
    with reads, reads("method"):
        mask = torch.zeros(2) > 0
        mask.tolist(), bool(mask[0]), mask[mask], mask.nonzero(), int(mask.sum())
        int(torch.tensor(3) * 2), torch.tensor([4]).tolist()
    assert reads.found == ["tolist", "__bool__", "__getitem__", "nonzero", "__int__"]
