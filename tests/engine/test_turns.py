"""Prefill on top of a KV cache, for every method: turn by turn against all at once, and against the dense model."""

import copy
import dataclasses

import torch
import visibench
from support import IMAGE
from turns import (
    LAYERS,
    TOGETHER,
    TURNS,
    batch_of,
    close,
    every_method,
    feed,
    in_front_of_the_decoder,
    masked_dense,
    only_drops,
    pad,
    turn,
)

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
    if method.name in TOGETHER:
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
