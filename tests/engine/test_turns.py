"""Prefill on top of a KV cache, for every method: turn by turn against all at once, and against the dense model."""

import copy
import dataclasses

import pytest
import torch
import visibench
from cases import METHODS, REGISTERED
from support import IMAGE
from transformers import DynamicCache
from turns import feed, masked_dense, pad, turn
from visibench.errors import InputError, VisibenchError
from visibench.evals.settings.method_spec import parse, spell
from visibench.methods import Forward

LAYERS = 10
PLAINEST = [parse(spell(cls, cls.examples[0])) for cls in METHODS.values()]
# The others of each method come in the slow run.
REST = [pytest.param(method, marks=pytest.mark.slow) for method in REGISTERED if method not in PLAINEST]
every_method = pytest.mark.parametrize("method", [*PLAINEST, *REST], ids=str)

VISION = {"image", "tower", "vision", "projector"}
# Their choice depends on a hash of what is fed together with the image.
DRAWN = {"random"}


def in_front_of_the_decoder(method):
    return set(method.hook_points) <= VISION


def only_drops(method, traces):
    """Whether all that the method does is to drop tokens, so that the dense model with a mask is the same."""
    merged = any((layout.visual_id == -2).any() for trace in traces for layout in trace.layouts)
    replaced = any(trace.batch_attention_pairs() != _full(trace) for trace in traces)
    elsewhere = method.name in ("visipruner", "forced", "tome", "downsample", "pooling", "vscan")
    return not (merged or replaced or elsewhere or method.reorders)


def _full(trace):
    return [
        layout.rows * layout.width * (layout.width + places)
        for layout, places in zip(trace.layouts, trace._cached_places, strict=True)
    ]


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


# ---- one row ------------------------------------------------------------------------------------------------------


@every_method
def test_an_image_behind_a_cached_text_is_pruned_as_in_one_prompt(llava, method):
    """The same tokens stay, at the same cost to each layer's cache, and the same logits follow."""
    ids, pixels = turn(7, images=1, behind=6)
    if hasattr(method, "noise"):  # drawn from a hash of what is fed
        method = dataclasses.replace(method, noise=0.0)
    with visibench.prune(llava, method) as session:
        whole = feed(llava, ids, pixels=pixels)
        trace = session.trace
        cache = feed(llava, ids[:, :5]).past_key_values
        assert session.trace.visual_counts().sum() == 0
        parts = feed(llava, ids[:, 5:], cache, pixels)
        later = session.trace
    assert parts.past_key_values is cache
    assert cache.get_seq_length() == ids.shape[1]
    lengths = [layer.keys.shape[2] for layer in cache.layers]
    assert lengths == later.kv_lengths()[0].tolist()
    if method.name in DRAWN:
        return
    assert lengths == [layer.keys.shape[2] for layer in whole.past_key_values.layers]
    for layer in range(LAYERS):
        assert torch.equal(trace.kept(layer), later.kept(layer))
    close(parts.logits[:, -1], whole.logits[:, -1])


@every_method
def test_text_of_a_later_turn_equals_its_tokens_one_by_one(llava, method):
    """Which the invariants hold against a model without a cache; what both see is behind the same prefill."""
    ids, pixels = turn(5, images=1)
    more, _ = turn(6, seed=1)
    with visibench.prune(llava, method):
        cache = feed(llava, ids, pixels=pixels).past_key_values
        single = copy.deepcopy(cache)
        together = feed(llava, more, cache).logits
        alone = [feed(llava, token, single).logits for token in more.split(1, dim=1)]
    close(together, torch.cat(alone, dim=1))


@every_method
def test_a_new_image_in_a_later_turn_is_pruned_like_the_first(llava, method):
    (first, picture), (second, another) = turn(5, images=1), turn(3, images=1, behind=5, seed=1)
    told, _ = turn(2, seed=2)
    with visibench.prune(llava, method) as session:
        cache = feed(llava, first, pixels=picture).past_key_values
        traces = [session.trace]
        cache = feed(llava, told, cache).past_key_values
        logits = feed(llava, second, cache, another).logits[:, -1]
        traces.append(session.trace)
        after = feed(llava, told, cache).logits
        both = feed(llava, torch.cat([first, told, second], 1), pixels=torch.cat([picture, another])).logits[:, -1]
    assert traces[0] is not traces[1]
    assert traces[1].prompt.visual_counts == (16,)
    ids = torch.cat([first, told, second, told], 1)
    kept = [torch.cat([trace.kept(layer)[0] for trace in traces]) for layer in range(LAYERS)]
    if in_front_of_the_decoder(method):
        close(logits, both)
    if only_drops(method, traces):
        present = (ids[0] != IMAGE).repeat(LAYERS, 1)
        present[:, ids[0] == IMAGE] = torch.stack(kept)
        dense = masked_dense(llava, ids, torch.cat([picture, another]), present, method.positions)
        close(logits[0], dense[-3])
        close(after[0], dense[-2:])
    promised = method.visual_counts(traces[1].prompt, session.geometry)
    if promised is not None:
        assert torch.equal(traces[1].visual_counts(), promised)


@every_method
def test_generate_goes_on_with_its_cache_and_feeds_new_tokens_alone(llava, method):
    ids, pixels = turn(5, images=1)
    more, _ = turn(6, seed=1)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "suppress_tokens": [IMAGE, 0]}
    fed = []
    with visibench.prune(llava, method):
        one = llava.generate(input_ids=ids, pixel_values=pixels, return_dict_in_generate=True, **options)
        hook = llava.model.language_model.register_forward_pre_hook(
            lambda m, a, k: fed.append(k["inputs_embeds"].shape[1]), with_kwargs=True
        )
        asked = torch.cat([one.sequences, more], 1)
        copied = copy.deepcopy(one.past_key_values)
        two = llava.generate(input_ids=asked, past_key_values=one.past_key_values, **options)
        hook.remove()
        cache, by_hand = feed(llava, asked[:, -7:], copied), []
        for _ in range(3):
            by_hand.append(
                cache.logits[:, -1]
                .masked_fill(torch.isin(torch.arange(64), torch.tensor([IMAGE, 0])), -torch.inf)
                .argmax(-1)
            )
            cache = feed(llava, by_hand[-1][:, None], copied)
    assert fed == [7, 1, 1]
    assert two[0, -3:].tolist() == [int(token) for token in by_hand]


# ---- batches ------------------------------------------------------------------------------------------------------

# Text, images: of the first and of the second turn of each row. Rows are padded in the middle.
TURNS = [((5, 1), (6, 0)), ((3, 2), (2, 1)), ((4, 0), (3, 2)), ((9, 0), (7, 0))]


def batch_of(turns, which):
    rows = [turn(*row[which], seed=10 * which + number) for number, row in enumerate(turns)]
    pixels = [pixels for _, pixels in rows if pixels is not None]
    return [ids for ids, _ in rows], torch.cat(pixels) if pixels else None, rows


@every_method
def test_rows_of_a_conversation_equal_each_alone(llava, method):
    with visibench.prune(llava, method) as session:
        alone, traces = [], []
        for number in range(len(TURNS)):
            cache = None
            for which in (0, 1):
                ids, pixels = batch_of(TURNS, which)[2][number]
                output = feed(llava, ids, cache, pixels)
                cache = output.past_key_values
                if which and pixels is not None:
                    traces.append((number, session.trace))
            alone.append((output.logits[0, -1], feed(llava, torch.tensor([[9]]), cache).logits[0, -1]))
        cache, mask = None, torch.zeros(len(TURNS), 0, dtype=torch.long)
        for which in (0, 1):
            rows, pixels, _ = batch_of(TURNS, which)
            ids, new = pad(rows)
            mask = torch.cat([mask, new], 1)
            output = feed(llava, ids, cache, pixels, mask)
            cache = output.past_key_values
        trace = session.trace
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        following = feed(llava, torch.full((len(TURNS), 1), 9), cache, mask=mask).logits[:, -1]
    for row, (last, next_one) in enumerate(alone):
        close(output.logits[row, -1], last)
        close(following[row], next_one)
    for row, single in traces:
        for of in ("kv_lengths", "visual_counts", "attention_pairs", "scoring_macs"):
            assert torch.equal(getattr(trace, of)()[row], getattr(single, of)()[0]), of


# ---- the cache ----------------------------------------------------------------------------------------------------


@every_method
def test_what_is_done_to_the_cache_is_done_to_what_it_knows(llava, method):
    """Rows chosen, repeated, swapped and copied go on as each alone; cropped ones as if nothing had been said."""
    rows, pixels, _ = batch_of(TURNS, 0)
    ids, mask = pad(rows)
    more = torch.tensor([[5, 6], [7, 8], [9, 10], [11, 12]])

    def ask(cache, mask, rows):
        mask = torch.cat([mask[rows], torch.ones(len(rows), 2, dtype=torch.long)], 1)
        return feed(llava, more[rows], cache, mask=mask).logits[:, -1]

    with visibench.prune(llava, method):
        cache = feed(llava, ids, None, pixels, mask).past_key_values
        for length in (None, -2):
            if length:
                cache.crop(length)
            assert cache.get_seq_length() == ids.shape[1]
            expected = ask(cache, mask, [0, 1, 2, 3]) if not length else expected  # noqa: F821
        chosen = copy.deepcopy(cache)
        chosen.batch_select_indices(torch.tensor([2, 0]))
        close(ask(chosen, mask, [2, 0]), expected[[2, 0]])
        swapped = copy.deepcopy(cache)
        swapped.reorder_cache(torch.tensor([3, 2, 1, 1]))
        close(ask(swapped, mask, [3, 2, 1, 1]), expected[[3, 2, 1, 1]])
        repeated = copy.deepcopy(chosen)
        repeated.crop(-2)
        repeated.batch_repeat_interleave(2)
        close(ask(repeated, mask, [2, 2, 0, 0]), expected[[2, 2, 0, 0]])
        close(ask(cache, mask, [0, 1, 2, 3]), expected)
        cache.reset()
        assert cache.get_seq_length() == 0
        again = feed(llava, ids, cache, pixels, mask)
        assert again.past_key_values is cache
        close(ask(cache, mask, [0, 1, 2, 3]), expected)


@every_method
def test_another_question_about_the_image_after_a_crop_into_the_prompt(llava, method):
    """The image stays as it was pruned; rows of a batch may have lost different numbers of tokens."""
    rows = [turn(5, images=1, behind=9, seed=1), turn(3, images=2, behind=9, seed=2)]
    ids, mask = pad([row for row, _ in rows])
    pixels, other = torch.cat([p for _, p in rows]), torch.tensor([[5, 6, 7], [8, 9, 10]])
    with visibench.prune(llava, method) as session:
        cache = feed(llava, ids, None, pixels, mask).past_key_values
        trace = session.trace
        feed(llava, other, cache, mask=torch.cat([mask, torch.ones(2, 3, dtype=torch.long)], 1))
        cache.crop(-8)
        now = torch.cat([mask[:, :-5], torch.ones(2, 3, dtype=torch.long)], 1)
        logits = feed(llava, other, cache, mask=now).logits
        assert [layer.keys.shape[2] for layer in cache.layers] == (trace.kv_lengths() - 2).amax(0).tolist()
    if not only_drops(method, [trace]):
        assert logits.isfinite().all()
        return
    for row, (prompt, picture) in enumerate(rows):
        whole = torch.cat([prompt[:, :-5], other[row : row + 1]], 1)
        present = (whole[0] != IMAGE).repeat(LAYERS, 1)
        count = int((whole[0] == IMAGE).sum())
        present[:, whole[0] == IMAGE] = torch.stack([trace.kept(layer)[row, :count] for layer in range(LAYERS)])
        close(logits[row], masked_dense(llava, whole, picture, present, method.positions)[-3:])


KINDS = {
    "none": lambda model: None,
    "plain": lambda model: DynamicCache(),
    "of the configuration": lambda model: DynamicCache(config=model.config.text_config),
}


@every_method
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_cache_is_filled_in_place_and_works_inside_alone(llava, method, kind):
    """In ``generate`` and in calls of the model: tokens and lengths of each are those of the first."""
    ids, pixels = turn(5, images=1)
    given, another = KINDS[kind](llava), KINDS[kind](llava)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "suppress_tokens": [IMAGE]}
    with visibench.prune(llava, method) as session:
        bare = llava.generate(input_ids=ids, pixel_values=pixels, use_cache=True, **options)
        extra = {} if another is None else {"past_key_values": another}
        tokens = llava.generate(input_ids=ids, pixel_values=pixels, **options, **extra)
        cache = feed(llava, ids, given, pixels).past_key_values
        assert given is None or cache is given
        assert isinstance(cache, DynamicCache)
        assert cache.get_seq_length() == ids.shape[1]
        assert [layer.keys.shape[2] for layer in cache.layers] == session.trace.kv_lengths()[0].tolist()
        assert torch.equal(tokens, bare)
        if another is not None:
            assert another.get_seq_length() == ids.shape[1] + 2
    for _ in range(2):  # it stays as unusable as it was
        with pytest.raises(VisibenchError, match="only inside that `with` block"):
            feed(llava, torch.tensor([[5]]), cache)
    with visibench.prune(llava, method), pytest.raises(InputError, match="filled outside"):
        feed(llava, torch.tensor([[5]]), cache)


def test_a_prompt_of_another_turn_does_not_disturb_a_cache(llava):
    """State lies in each cache: two conversations take turns."""
    method = visibench.load_method("pyramiddrop", layers="scaled")
    (ids, pixels), (others, picture) = turn(5, images=1), turn(8, images=2, seed=3)
    more = torch.tensor([[5, 6]])
    with visibench.prune(llava, method):
        cache = feed(llava, ids, pixels=pixels).past_key_values
        alone = feed(llava, more, cache).logits
        cache = feed(llava, ids, pixels=pixels).past_key_values
        other = feed(llava, others, pixels=picture).past_key_values
        feed(llava, more, other)
        assert torch.equal(feed(llava, more, cache).logits, alone)


def test_a_call_that_failed_half_way_leaves_a_cache_that_is_refused(llava):
    ids, pixels = turn(5, images=1)
    with visibench.prune(llava, visibench.load_method("fastv", keep=0.5)):
        begun = DynamicCache()
        hook = llava.model.language_model.layers[5].mlp.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            feed(llava, ids, begun, pixels)
        hook.remove()
        with pytest.raises(InputError, match="failed half-way"):
            feed(llava, ids, begun, pixels)
        begun.reset()
        assert feed(llava, ids, begun, pixels).logits.isfinite().all()
        cache = feed(llava, ids, pixels=pixels).past_key_values
        hook = llava.model.language_model.layers[5].mlp.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            feed(llava, torch.tensor([[5]]), cache)
        hook.remove()
        with pytest.raises(InputError, match="failed half-way"):
            feed(llava, torch.tensor([[5]]), cache)
        with pytest.raises(InputError, match="cannot crop 99"):
            cache.crop(-99)
        mine = DynamicCache()
        hook = llava.model.language_model.layers[5].mlp.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            feed(llava, ids, mine, pixels)
        hook.remove()
        with pytest.raises(InputError, match="failed half-way"):
            feed(llava, ids, mine, pixels)
        mine.reset()
        assert torch.equal(feed(llava, ids, mine, pixels).logits, feed(llava, ids, None, pixels).logits)


def test_masks_that_contradict_the_cache_are_refused(llava):
    ids, mask = pad([turn(4)[0], turn(6)[0]])
    with visibench.prune(llava, visibench.load_method("none")):
        cache = feed(llava, ids, mask=mask).past_key_values
        new, ones = torch.full((2, 3), 5), torch.ones(2, 3, dtype=torch.long)
        with pytest.raises(InputError, match="give attention_mask"):
            feed(llava, new, cache)
        with pytest.raises(InputError, match="3 columns, and the KV cache was fed 6"):
            llava(input_ids=new, past_key_values=cache, attention_mask=ones)
        with pytest.raises(InputError, match="were padding when they were fed"):
            feed(llava, new, cache, mask=torch.cat([torch.ones_like(mask), ones], 1))


@every_method
def test_what_a_later_mask_hides_is_as_if_it_had_never_been_said(llava, method):
    """Rows of a batch that ended early were fed padding."""
    rows, pixels, _ = batch_of(TURNS, 0)
    ids, mask = pad(rows)
    more, answer = torch.tensor([[5, 6]]).expand(len(rows), -1), torch.tensor([[9, 9], [9, 0], [0, 0], [9, 9]])
    with visibench.prune(llava, method):
        alone = []
        for number, said in enumerate(answer):
            row, picture = turn(*TURNS[number][0], seed=number)
            cache = feed(llava, row, None, picture).past_key_values
            alone.append(feed(llava, torch.cat([said[said > 0][None], more[:1]], 1), cache).logits[0, -1])
        cache = feed(llava, ids, None, pixels, mask).past_key_values
        ones = torch.ones_like(answer)
        feed(llava, answer, cache, mask=torch.cat([mask, ones], 1))
        hides = torch.cat([mask, (answer > 0).long(), ones], 1)
        single = copy.deepcopy(cache)
        close(feed(llava, more, cache, mask=hides).logits[:, -1], torch.stack(alone))
        for token in (0, 1):  # the mask of a turn of one token counts as well
            logits = feed(llava, more[:, token : token + 1], single, mask=hides[:, : hides.shape[1] - 1 + token]).logits
        close(logits[:, -1], torch.stack(alone))
        fed = feed(llava, ids, None, pixels, mask).past_key_values
        for token in (0, 1):  # and that of a token that is fed as padding
            feed(llava, answer[:, token : token + 1], fed, mask=hides[:, : hides.shape[1] - 3 + token])
        close(feed(llava, more, fed, mask=hides).logits[:, -1], torch.stack(alone))


@pytest.mark.parametrize("name", ["fastv", "visionzip"])
def test_rows_of_a_chat_by_generate_whose_later_turn_has_images(llava, name):
    """Where rows differ in length, the answer's last token would stand in front of padding: it goes in first."""
    method = parse(spell(METHODS[name], METHODS[name].examples[0]))
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "suppress_tokens": [IMAGE, 0]}
    options["return_dict_in_generate"] = True

    def chat(rows, feeds_last):
        said = mask = cache = None
        for which in (0, 1):
            parts = [turn(*TURNS[row][which], seed=10 * which + row) for row in rows]
            ids, new = pad([part for part, _ in parts])
            pixels = [pixels for _, pixels in parts if pixels is not None]
            extra = {"pixel_values": torch.cat(pixels)} if pixels else {}
            if which and feeds_last:
                feed(llava, said[:, -1:], cache, mask=mask)
            ids = ids if said is None else torch.cat([said, ids], 1)
            mask = new if mask is None else torch.cat([mask, new], 1)
            output = llava.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **extra, **options)
            said, cache = output.sequences, output.past_key_values
            mask = torch.cat([mask, torch.ones(len(rows), 3, dtype=torch.long)], 1)
        return said[:, -3:]

    with visibench.prune(llava, method):
        with pytest.raises(InputError, match=r"images in a later turn.*in a call of its own"):
            chat([0, 1, 2, 3], feeds_last=False)
        together = chat([0, 1, 2, 3], feeds_last=True)
        for row in range(4):
            assert torch.equal(together[row], chat([row], feeds_last=False)[0])


def test_a_method_is_told_what_stands_before_as_text_that_is_read(llava):
    """Its weights on the new tokens leave the share of the cached ones out, and add up to less than one."""

    class Look(Forward):
        def attention(self, layer, view):
            sums.append(view.weights().sum(-1))
            assert view.keys.shape[2] == view.layout.width == 22

    sums, ids = [], turn(9, images=1, behind=6)
    method = visibench.load_method("fastv", keep=1.0, layer=1)
    with visibench.prune(llava, method) as session, pytest.MonkeyPatch.context() as patch:
        cache = feed(llava, ids[0][:, :9]).past_key_values
        patch.setattr(type(method), "begin", lambda *_: Look())
        feed(llava, ids[0][:, 9:], cache, ids[1])
        pairs = session.trace.attention_pairs()[0].tolist()
    assert len(sums) == LAYERS
    assert all((total < 1).all() and (total > 0).all() for total in sums)
    assert pairs == [22 * 31] * LAYERS
