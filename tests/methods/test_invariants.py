"""What must hold for every method: each example of each registered one, against the dense model and against itself.

Whoever registers a method, here or in a package of their own, puts it into this table without another edit: how it is
built, what keeps everything and which counts to expect, it says itself (``examples``, ``everything``, ``left``).
``visibench check-method`` asserts the same.
"""

import pytest
import torch
import visibench
from cases import CASES, EVERYTHING, METHODS, REGISTERED
from visibench.evals.invariants import generation, prefills
from visibench.evals.invariants.prefills import Bench
from visibench.evals.invariants.table import fits_published_sizes, names_the_nearest_option
from visibench.evals.settings import method_spec
from visibench.models import load_model
from visibench.models.adapters import Adapter


@pytest.fixture(scope="module")
def bench(llava) -> Bench:
    return Bench(llava)


@pytest.fixture(scope="module", params=CASES, ids=str)
def method(request):
    return request.param


registered = pytest.mark.parametrize("method", REGISTERED, indirect=True, ids=str)


def test_row_of_a_batch_equals_the_row_alone(bench, method):
    prefills.row_alone(bench, method)


def test_rows_without_image_are_dense_bit_for_bit(bench, method):
    prefills.without_images(bench, method)


def test_result_depends_on_nothing_but_the_inputs(bench, method):
    """Neither on what ran before nor on the state of torch's generator, which it leaves alone."""
    prefills.inputs_decide(bench, method)


def test_eager_and_sdpa_agree(bench, method):
    prefills.eager_agrees(bench, method)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@registered
def test_counts_are_those_that_the_options_promise(bench, method, dtype):
    """Where they promise none, they must really depend on the inputs."""
    prefills.counts_promised(bench, method, dtype)


def test_caches_hold_what_the_trace_says(bench, method):
    prefills.caches_fit(bench, method)


def test_each_layer_runs_once_and_reads_at_most_one_number_back(bench, method):
    prefills.layers_run_once(bench, method)


def test_tokens_keep_their_order_and_get_the_positions_of_the_policy(bench, method):
    prefills.order_and_positions(bench, method)


@pytest.mark.parametrize("method", EVERYTHING.values(), ids=str)
def test_keeping_everything_is_dense_bit_for_bit(bench, method):
    generation.everything_is_dense(bench, method)


@registered
def test_method_acts_unless_it_says_that_it_keeps_everything(bench, method):
    prefills.acts(bench, method, EVERYTHING.get(method.name))


@pytest.fixture(scope="module")
def published_geometry():
    return Adapter(load_model("llava-1.5-7b", weights="meta").model).geometry


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("fastv:keep=0.25", {2: 144}),
        ("dart:tokens=128", {2: 132}),
        ("vtw", {15: 0}),
        ("pyramiddrop", {8: 288, 16: 144, 24: 72}),
        ("vscan:tokens=96", {0: 96, 16: 32}),
        ("vscan:tokens=100", {0: 98, 16: 33}),
        ("v2drop", {3: 288, 17: 144, 22: 1}),
        ("transprune", {7: 504, 9: 360, 12: 72}),
        ("flowcut:tokens=64", {0: 64}),
        ("flowcut:tokens=64,cut=2", {0: 128, 2: 64}),
        ("flowcut:tokens=400,cut=3", {0: 576, 3: 400}),
        ("sparsevlm:tokens=192", {3: 309, 7: 204, 16: 113}),
        ("sparsevlm:tokens=128", {3: 312, 7: 117, 16: 39}),
        ("sparsevlm:tokens=64", {3: 82, 7: 32, 16: 18}),
        ("visionzip:tokens=192", {0: 192}),
        ("pooling:tokens=144", {0: 144}),
    ],
)
def test_promised_counts_are_those_of_the_published_settings(text, left, published_geometry):
    """One image behind the 35 tokens of LLaVA's system prompt; merged tokens included."""
    layout = visibench.TokenLayout.from_spans(640, visual=[(35, 611)])
    expected, now = [], 576
    for layer in range(32):
        now = left.get(layer, now)
        expected.append(now)
    method = method_spec.parse(text)
    assert method.visual_counts(layout, published_geometry).tolist() == [expected]


@pytest.mark.slow
@pytest.mark.parametrize("method", REGISTERED, ids=str)
def test_examples_run_on_published_sizes_too(bench, method):
    fits_published_sizes(bench, method)


def test_generation_with_a_cache_equals_generation_without(bench, method):
    generation.cache_changes_nothing(bench, method)


def test_generation_of_a_batch_equals_each_row_alone(bench, method):
    generation.batch_generates_alike(bench, method)


def test_chunk_of_new_tokens_equals_one_at_a_time(bench, method):
    generation.chunks_are_alike(bench, method)


def test_model_is_as_before_after_the_block_and_after_exceptions(bench, method):
    generation.model_is_as_before(bench, method)


@pytest.mark.parametrize("cls", METHODS.values(), ids=METHODS)
def test_unknown_option_raises_and_names_the_nearest(bench, cls):
    names_the_nearest_option(bench, method_spec.of_class(cls, cls.examples[0]))
