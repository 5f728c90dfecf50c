"""Threads inside and behind the block, and that nothing of a past batch stays alive."""

import gc
import threading
import time
import weakref

import pytest
import torch
import visibench
from cases import FASTV, every_method
from support import IMAGE, make_batch
from transformers import TextIteratorStreamer
from turns import feed, turn
from visibench.errors import InputError, VisibenchError

GREEDY = {"do_sample": False, "suppress_tokens": [IMAGE]}


# ---- threads ------------------------------------------------------------------------------------------------------


class _Words:
    """Decodes tokens into words, as far as a streamer needs it."""

    def decode(self, ids, **_):
        return "".join(f"{int(token)} " for token in ids)


def test_a_streamer_thread_inside_the_block_works_and_one_that_outlives_it_raises_once(own):
    (sample,) = make_batch([(4, 8, 1)])
    options, said = {"max_new_tokens": 40, "min_new_tokens": 40, **GREEDY}, []

    def work(streamer):
        try:
            said.append(own.generate(**sample, **options, streamer=streamer))
        except VisibenchError as error:
            said.append(str(error))

    def pause(*_):
        started.set()
        go.wait(0.1)

    for outlives in (False, True):
        streamer = TextIteratorStreamer(_Words(), skip_prompt=True, timeout=30)
        started, go = threading.Event(), threading.Event()
        thread = threading.Thread(target=work, args=(streamer,))
        with torch.no_grad(), visibench.prune(own, visibench.load_method("visionzip", tokens=5)):
            greedy = own.generate(**sample, **options)
            hook = own.lm_head.register_forward_hook(pause)
            thread.start()
            started.wait(10)
            if not outlives:
                go.set()
                thread.join()
        list(streamer)  # ends, also where generate did not
        thread.join()
        hook.remove()
    assert torch.equal(said[0], greedy)
    assert "only inside that `with` block" in said[1]


def test_leaving_the_block_waits_until_a_thread_has_begun_on_pruned_tokens(own):
    """Between the images and the prefill, and without a cache, nothing but the hooks prunes."""
    (sample,) = make_batch([(4, 8, 1)])
    for extra in ({}, {"use_cache": False}):
        encoding, said = threading.Event(), []

        def work(extra=extra, said=said):
            try:
                said.append(own.generate(**sample, max_new_tokens=3, **GREEDY, **extra))
            except VisibenchError as error:
                said.append(str(error))

        thread = threading.Thread(target=work)
        with torch.no_grad(), visibench.prune(own, FASTV):
            right = own.generate(**sample, max_new_tokens=3, **GREEDY, **extra)
            hook = own.model.vision_tower.register_forward_hook(lambda *_, at=encoding: at.set() or time.sleep(0.2))
            thread.start()
            encoding.wait(10)
        thread.join()
        hook.remove()
        if isinstance(said[0], str):
            assert not extra
            assert "only inside that `with` block" in said[0]
        else:
            assert torch.equal(said[0], right)


def test_a_second_thread_is_refused_while_the_first_generates(own):
    (sample,) = make_batch([(4, 8, 1)])
    inside, go, said = threading.Event(), threading.Event(), []

    def wait(*_):
        inside.set()
        go.wait(10)

    with visibench.prune(own, visibench.load_method("visionzip", tokens=5)):
        right = own.generate(**sample, max_new_tokens=3, **GREEDY)
        hook = own.lm_head.register_forward_hook(wait)
        first = threading.Thread(target=lambda: said.append(own.generate(**sample, max_new_tokens=3, **GREEDY)))
        first.start()
        inside.wait(10)
        for call in (own, own.generate):
            with pytest.raises(VisibenchError, match="another thread"):
                call(**sample)
        go.set()
        first.join()
        hook.remove()
        assert torch.equal(said[0], right)
        assert torch.equal(own.generate(**sample, max_new_tokens=3, **GREEDY), right)


# ---- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@every_method
def test_nothing_of_a_past_batch_stays_alive(llava, method):
    """With the cyclic collector off: neither its cache nor its images, nor the record of its call."""
    gc.collect()
    gc.disable()
    try:
        with visibench.prune(llava, method) as session:
            for how in ("call", "generate", "no cache"):
                ids, pixels = turn(5, images=1)
                if how == "call":
                    output = feed(llava, ids, pixels=pixels)
                    cache = weakref.ref(output.past_key_values)
                    del output
                else:
                    options = {"use_cache": how == "generate", "return_dict_in_generate": True, **GREEDY}
                    output = llava.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=3, **options)
                    cache = weakref.ref(output.past_key_values) if how == "generate" else lambda: None
                    del output
                images, words = weakref.ref(pixels), weakref.ref(ids)
                del pixels, ids
                assert (cache(), images(), words()) == (None, None, None), how
            trace, session = weakref.ref(session.trace), weakref.ref(session)
        assert trace() is None
        assert session() is None
    finally:
        gc.enable()


def test_features_that_a_caller_hands_over_are_not_taken_for_the_latest_seen(llava):
    """A vision method that asked about one picture must not decide about another."""
    one, other = make_batch([(4, 8, 1)])[0], make_batch([(4, 8, 1)], seed=9)[0]
    text = {key: value for key, value in one.items() if key != "pixel_values"}
    with visibench.prune(llava, visibench.load_method("visionzip", tokens=5)) as session:
        right, kept = llava(**one).logits[:, -1], session.trace.kept(0)
        features = llava.get_image_features(pixel_values=one["pixel_values"])
        for call in (llava, llava.generate):
            llava.get_image_features(pixel_values=other["pixel_values"])
            with pytest.raises(InputError, match="pass pixel_values"):
                call(**text, mm_encoder_outputs={"image": features})
        assert torch.equal(llava(**one).logits[:, -1], right)
        assert torch.equal(session.trace.kept(0), kept)
