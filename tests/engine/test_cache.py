"""What is done to the KV cache is done to what it knows: rows, crops, copies, caches of every kind."""

import copy

import pytest
import torch
import visibench
from cases import METHODS
from support import IMAGE
from transformers import DynamicCache
from turns import LAYERS, TURNS, batch_of, close, every_method, feed, masked_dense, only_drops, pad, turn
from visibench.errors import InputError, VisibenchError
from visibench.evals.settings.method_spec import parse, spell
from visibench.methods import Forward


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
