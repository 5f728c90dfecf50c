"""What must hold for every method: each example of each registered one, against the dense model and against itself.

Whoever registers a method, here or in a package of their own, puts it into this table without another edit: how it is
built, what keeps everything and which counts to expect, it says itself (``examples``, ``everything``, ``left``).
"""

import dataclasses
from typing import NamedTuple

import pytest
import torch
import visibench
from cases import CASES, EVERYTHING, METHODS, REGISTERED
from support import IMAGE, collate, make_batch, make_llava, state
from visibench.engine.trace import Trace
from visibench.errors import InputError, OptionError
from visibench.evals.compute import flops
from visibench.evals.settings import method_spec
from visibench.methods import Forward
from visibench.models import load_model
from visibench.models.adapters import Adapter

# (prefix, text, images): different lengths, no image, one and several images.
ROWS = [(5, 9, 1), (3, 12, 2), (4, 6, 0), (2, 20, 1), (1, 10, 3)]
NEW = 6
LAYERS = 10


@pytest.fixture(scope="module", params=CASES, ids=str)
def method(request):
    return request.param


registered = pytest.mark.parametrize("method", REGISTERED, indirect=True, ids=str)


class Run(NamedTuple):
    """One prefill: logits (B, L', vocabulary), trace, cache, and for each decoder layer the positions it was given."""

    logits: torch.Tensor
    trace: Trace
    cache: list[int]
    positions: list[list[torch.Tensor]]

    @property
    def last(self):
        return self.logits[:, -1]


def prefill(model, method, batch) -> Run:
    """Positions are counted without padding, as in ``generate``: the norms of rotated keys depend on them."""
    place = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    given = [[] for _ in range(LAYERS)]
    with torch.no_grad(), visibench.prune(model, method) as session:
        # Registered behind the session's own hooks, they see what the layers get.
        hooks = [
            layer.register_forward_pre_hook(lambda m, a, k, i=i: given[i].append(k["position_ids"]), with_kwargs=True)
            for i, layer in enumerate(session.adapter.layers)
        ]
        output = model(**batch, position_ids=place, use_cache=True)
        for hook in hooks:
            hook.remove()
    return Run(output.logits, session.trace, [layer.keys.shape[2] for layer in output.past_key_values.layers], given)


@pytest.fixture(scope="module")
def run(llava, method) -> Run:
    """One batch of all kinds of rows under the method."""
    return prefill(llava, method, collate(make_batch(ROWS)))


def generate(model, batch, **options):
    options |= {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "suppress_tokens": [IMAGE]}
    output = model.generate(**batch, **options, output_logits=True, return_dict_in_generate=True)
    return output.sequences[:, -NEW:], torch.stack(output.logits)


# ---- a batch, its rows, and its inputs ----------------------------------------------------------------------------


def test_row_of_a_batch_equals_the_row_alone(llava, method, run):
    scale, geometry = run.last.abs().max(), Adapter(llava).geometry
    compute = flops.executed(run.trace, geometry).total()
    for row, sample in enumerate(make_batch(ROWS)):
        alone = prefill(llava, method, sample)
        assert (run.last[row] - alone.last[0]).abs().max() < 1e-5 * scale
        for of in ("kv_lengths", "visual_counts", "attention_pairs", "scoring_macs"):
            assert torch.equal(getattr(run.trace, of)()[row], getattr(alone.trace, of)()[0])
        assert flops.executed(alone.trace, geometry).total() == [compute[row]]
        for layer in range(LAYERS):
            kept, width = run.trace.kept(layer)[row], alone.trace.kept(layer).shape[1]
            assert torch.equal(kept[:width], alone.trace.kept(layer)[0])
            assert not kept[width:].any()


def test_rows_without_image_are_dense_bit_for_bit(llava, method):
    batch = collate(make_batch([(4, 6, 0), (7, 9, 0)]))
    place = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    run = prefill(llava, method, batch)
    assert torch.equal(run.logits, llava(**batch, position_ids=place).logits)
    assert not run.trace.visual_counts().any()
    assert not run.trace.scoring_macs().any()


def test_result_depends_on_nothing_but_the_inputs(llava, method, run):
    """Neither on what ran before nor on the state of torch's generator, which it leaves alone."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    again = prefill(llava, method, collate(make_batch(ROWS)))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(again.logits, run.logits)
    assert all(torch.equal(again.trace.kept(layer), run.trace.kept(layer)) for layer in range(LAYERS))


def test_eager_and_sdpa_agree(eager_llava, method, run):
    eager = prefill(eager_llava, method, collate(make_batch(ROWS)))
    torch.testing.assert_close(eager.last, run.last, atol=2e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def eager_llava():
    return make_llava(attention="eager")


# ---- which tokens there are ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half_llava():
    return make_llava().to(torch.bfloat16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@registered
def test_counts_are_those_that_the_options_promise(llava, half_llava, method, dtype):
    """Where they promise none, they must really depend on the inputs."""
    model = {"float32": llava, "bfloat16": half_llava}[dtype]
    counts = []
    for seed in range(3):
        batch = collate(make_batch(ROWS, seed=seed))
        batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
        run = prefill(model, method, batch)
        assert run.logits.dtype == model.dtype
        assert run.logits.isfinite().all()
        counts.append(run.trace.visual_counts())
    promised = method.visual_counts(run.trace.prompt, Adapter(llava).geometry)
    if promised is None:
        assert any(not torch.equal(counts[0], other) for other in counts[1:])
        assert (counts[0].diff(dim=1) <= 0).all()
    else:
        assert all(torch.equal(count, promised) for count in counts)


def test_caches_hold_what_the_trace_says(method, run):
    assert run.cache == run.trace.kv_lengths().amax(0).tolist()
    text = torch.tensor([prefix + text + max(images - 1, 0) for prefix, text, images in ROWS])
    assert torch.equal(run.trace.kv_lengths() - run.trace.visual_counts(), text[:, None].expand(-1, LAYERS))


def test_each_layer_runs_once_and_reads_at_most_one_number_back(method, run):
    assert [len(given) for given in run.positions] == [1] * LAYERS
    assert run.trace.host_syncs <= LAYERS + 1


def test_tokens_keep_their_order_and_get_the_positions_of_the_policy(method, run):
    prompt = run.trace.prompt
    place = (prompt.valid.cumsum(1) - 1).clamp(min=0)
    for layer, layout in enumerate(run.trace.layouts):
        for row in range(len(ROWS)):
            valid, at_first = layout.valid[row], prompt.valid[row]
            visual, number = layout.visual.mask[row][valid], layout.visual_id[row][valid]
            stays = number >= 0
            assert (number[stays].diff() > 0).all()
            given = run.positions[layer][0].expand(len(ROWS), -1)[row][valid]
            if method.positions == "renumber":
                assert given.tolist() == list(range(len(given)))
                continue
            was_visual, was = prompt.visual.mask[row][at_first], place[row][at_first]
            assert torch.equal(given[stays], was[was_visual][number[stays]])
            assert torch.equal(given[~visual], was[~was_visual])
            assert (given.diff() > 0).all()


# ---- keeping everything, and doing something ----------------------------------------------------------------------


@pytest.mark.parametrize("method", EVERYTHING.values(), ids=str)
def test_keeping_everything_is_dense_bit_for_bit(llava, method):
    batch = collate(make_batch(ROWS))
    dense = llava(**batch).logits
    dense_tokens, dense_logits = generate(llava, batch)
    with visibench.prune(llava, method) as session:
        assert torch.equal(llava(**batch).logits, dense)
        assert session.trace.visual_counts().T.tolist() == [list(session.trace.prompt.visual_counts)] * LAYERS
        tokens, logits = generate(llava, batch)
    assert torch.equal(logits, dense_logits)
    assert torch.equal(tokens, dense_tokens)


@registered
def test_method_acts_unless_it_says_that_it_keeps_everything(llava, method, run):
    place = (collate(make_batch(ROWS))["attention_mask"].cumsum(1) - 1).clamp(min=0)
    dense = llava(**collate(make_batch(ROWS)), position_ids=place).logits[:, -1]
    changed = (run.last - dense).abs().amax(1) > 1e-3
    acts = EVERYTHING.get(method.name) != method
    assert changed.tolist() == [acts and images > 0 for _, _, images in ROWS]
    assert acts or torch.equal(run.last, dense)


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


@pytest.mark.parametrize("cls", METHODS.values(), ids=METHODS)
def test_examples_run_on_published_sizes_too(cls, published_geometry):
    for options in cls.examples:
        method_spec.parse(method_spec.spell(cls, options)).check(published_geometry)


# ---- new tokens ---------------------------------------------------------------------------------------------------


class Replay(Forward):
    """Decides in every longer prompt what ``inner`` decided in the first; new tokens attend to whatever is there."""

    def __init__(self, inner):
        self.inner, self.log = inner, {}

    def ask(self, key, hook, *arguments):
        if key not in self.log:
            self.log[key] = hook(*arguments)
        return self.log[key]

    def projected(self, view):
        return self.ask("projected", self.inner.projected, view)

    def layer_input(self, layer, view):
        return self.ask(("input", layer), self.inner.layer_input, layer, view)

    def attention(self, layer, view):
        first = self.ask(("attention", layer), self.inner.attention, layer, view)
        return first if first is None else torch.cat([first, view.output[:, first.shape[1] :]], dim=1)


def test_generation_with_a_cache_equals_generation_without(llava, method, monkeypatch):
    batch, replays, begin = collate(make_batch(ROWS[:4], seed=1)), [], type(method).begin

    def once(self, layout, geometry):
        if not replays:
            replays.append(Replay(begin(self, layout, geometry)))
        return replays[0]

    with visibench.prune(llava, method):
        tokens, logits = generate(llava, batch, use_cache=True)
    monkeypatch.setattr(type(method), "begin", once)
    with visibench.prune(llava, method) as session:
        longer, uncached = generate(llava, batch, use_cache=False)
        assert session.trace.prompt.width == batch["input_ids"].shape[1] + NEW - 1
    torch.testing.assert_close(logits, uncached, atol=1e-4, rtol=1e-4)
    assert torch.equal(tokens, longer)


def test_generation_of_a_batch_equals_each_row_alone(llava, method):
    samples = make_batch(ROWS, seed=1)
    with visibench.prune(llava, method):
        together, _ = generate(llava, collate(samples))
        for row, sample in enumerate(samples):
            assert torch.equal(together[row], generate(llava, sample)[0][0])


def test_chunk_of_new_tokens_equals_one_at_a_time(llava, method):
    batch = collate(make_batch(ROWS))
    new = torch.tensor([[5, 6, 7]]).expand(len(ROWS), -1)
    with visibench.prune(llava, method):
        cache = llava(**batch, use_cache=True).past_key_values
        mask = batch["attention_mask"]
        for k in range(3):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            places = mask.cumsum(1)[:, -1:] - 1
            single = llava(input_ids=new[:, k : k + 1], attention_mask=mask, position_ids=places, past_key_values=cache)
        cache = llava(**batch, use_cache=True).past_key_values
        places = mask.cumsum(1)[:, -3:] - 1
        chunk = llava(input_ids=new, attention_mask=mask, position_ids=places, past_key_values=cache)
    torch.testing.assert_close(chunk.logits[:, -1], single.logits[:, -1], atol=1e-4, rtol=1e-4)


# ---- leaving things as they were, and saying no -------------------------------------------------------------------


def test_model_is_as_before_after_the_block_and_after_exceptions(llava, method):
    batch = collate(make_batch(ROWS))
    before, dense = state(llava), llava(**batch).logits
    with visibench.prune(llava, method):
        generate(llava, batch)
    assert state(llava) == before
    with pytest.raises(InputError), visibench.prune(llava, method):
        llava(**batch, labels=batch["input_ids"])
    assert state(llava) == before
    for broken in (llava.model.multi_modal_projector, llava.model.language_model.layers[5].mlp):
        hook = broken.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError), visibench.prune(llava, method):
            llava(**batch)
        hook.remove()
        assert state(llava) == before
    assert torch.equal(llava(**batch).logits, dense)


@pytest.mark.parametrize("cls", METHODS.values(), ids=METHODS)
def test_unknown_option_raises_and_names_the_nearest(cls):
    for option in (field.name for field in dataclasses.fields(cls)):
        with pytest.raises(OptionError, match=f"^{cls.name}: unknown option '{option}_'; did you mean '{option}'"):
            method_spec.parse(f"{cls.name}:{option}_=1")
