"""How often a prefill reads a value back from the device: for the counts of a cut, and for nothing else.

On a CPU reading costs nothing, so what would wait for a GPU is counted: every conversion of a tensor to Python values
while the method and what carries it out are at work.
"""

import pytest
import torch
import visibench
from cases import CASES
from support import collate, make_batch
from visibench.engine import passes
from visibench.engine.decisions import cut, on_images
from visibench.engine.vision import images, tap
from visibench.evals.compute.launches import Reads

KNOWING = {"divprune", "fastervlm", "hiprune", "pooling", "scope", "visionzip", "vispruner"}
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


@pytest.mark.parametrize("method", CASES, ids=str)
def test_counts_that_methods_know_are_those_of_their_masks(llava, method, monkeypatch):
    """One image a row as well, where what is known of images holds for rows."""
    known = []

    def checked_cut(layout, keep, added=None, anchor=None, order=None, counts=None, new=None):
        if counts is not None:
            known.append((tuple((keep & layout.visual.present).sum(1).tolist()), counts))
        return cut(layout, keep, added, anchor, order, counts, new)

    def checked_images(decision):
        merge = on_images(decision)
        if merge.counts is not None:
            known.append((tuple(merge.mask.sum(1).tolist()), merge.counts))
        return merge

    monkeypatch.setattr(passes, "cut", checked_cut)
    monkeypatch.setattr(tap, "on_images", checked_images)
    monkeypatch.setattr(images, "on_images", checked_images)
    for rows in (ROWS, [(4, 8, 1), (9, 5, 1)]):
        with torch.no_grad(), visibench.prune(llava, method):
            llava(**collate(make_batch(rows)), use_cache=True)
    assert [found for found, _ in known] == [said for _, said in known]
    assert known or method.name not in KNOWING


def test_reads_are_seen():
    reads = Reads().watching()
    with reads, reads("method"):
        mask = torch.zeros(2) > 0
        mask.tolist(), bool(mask[0]), mask[mask], mask.nonzero(), int(mask.sum())
        int(torch.tensor(3) * 2), torch.tensor([4]).tolist()
    assert reads.found == ["tolist", "__bool__", "__getitem__", "nonzero", "__int__"]
