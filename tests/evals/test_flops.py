"""Closed-form compute against two independent counters of the forward that really ran."""

import pytest
import visibench
from cases import CASES, REGISTERED
from probes import VisionProbe
from support import collate, make_batch
from visibench.evals.compute import flops
from visibench.evals.invariants import counters
from visibench.evals.invariants.counters import UNEVEN
from visibench.evals.invariants.prefills import Bench


@pytest.fixture(scope="module")
def bench(llava) -> Bench:
    return Bench(llava)


@pytest.mark.slow
@pytest.mark.parametrize("method", REGISTERED, ids=str)
def test_fvcore_agrees_within_one_per_cent(bench, method):
    """And knows all operators that multiply matrices."""
    assert not counters.fvcore_agrees(bench, method)


@pytest.mark.parametrize("method", CASES, ids=str)
def test_torch_flop_counter_agrees_on_prompt_and_generation(bench, method):
    """With one head of keys for all queries, and with one for each."""
    counters.torch_agrees(bench, method)


def test_decoding_steps_add_up_and_see_each_layers_own_cache(llava):
    """Two rows, 2 layers of 30 and 15 keys and 8 of 18 and 15; d 48, 4 heads of 12."""
    batch = collate(make_batch([(5, 9, 1), (6, 9, 0)]))
    with visibench.prune(llava, visibench.load_method("fastv", tokens=4)) as session:
        llava(**batch)
    each = [flops.decode(session.trace, session.geometry, n) for n in range(4)]
    assert each[1].attention.tolist() == [(2 * 31 + 8 * 19) * 2 * 48, 10 * 16 * 2 * 48]
    assert (each[3].attention - each[2].attention).tolist() == [(2 * 33 + 8 * 21) * 2 * 48, 10 * 18 * 2 * 48]
    assert each[0].total() == [0, 0]
    ragged = flops.decode(session.trace, session.geometry, [3, 1])
    assert ragged.total() == [each[3].total()[0], each[1].total()[1]]


def test_components_by_hand(llava):
    """One image of 16 patches, 14 text tokens, d 48, m 64, 4 heads of 12, 2 kv heads, 10 layers; 4 kept from 2 on."""
    (sample,) = make_batch([(5, 9, 1)])
    with visibench.prune(llava, visibench.load_method("fastv", tokens=4)) as session:
        llava(**sample)
    parts = flops.executed(session.trace, session.geometry).components()
    tokens, pairs = 2 * 30 + 8 * 18, 2 * 30**2 + 8 * 18**2
    assert parts["projections"] == [tokens * (2 * 48 * 48 + 2 * 48 * 24)]
    assert parts["ffn"] == [tokens * 3 * 48 * 64]
    assert parts["attention"] == [pairs * 2 * 48]
    assert parts["scoring"] == [30 * 48]
    assert parts["lm_head"] == [48 * 64]
    assert parts["projector"] == [16 * (32 * 48 + 48 * 48)]
    block = 4 * 17 * 32 * 32 + 2 * 17 * 17 * 32 + 2 * 17 * 32 * 48
    assert parts["vision_tower"] == [16 * 3 * 36 * 32 + 3 * block]


def test_dropping_features_saves_projector_work(llava):
    (sample,) = make_batch([(5, 9, 2)])
    with visibench.prune(llava, VisionProbe(merge=True, positions="renumber")) as session:
        llava(**sample)
    assert flops.executed(session.trace, session.geometry).projector.tolist() == [2 * 9 * (32 * 48 + 48 * 48)]


@pytest.mark.parametrize("method", CASES, ids=str)
def test_torch_flop_counter_agrees_on_a_batch_of_uneven_rows(bench, method):
    """What the batch executed, padding included; that of the rows alone is no more, and the same for one row."""
    # The probe fails on rows without an image.
    counters.torch_agrees_on_batches(bench, method, UNEVEN[:3] if method.name == "probe" else UNEVEN)
