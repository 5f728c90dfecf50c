"""Staged decoders: against the dense model, against the model's own layers with a mask each, and against training."""

from dataclasses import dataclass

import pytest
import torch
import visibench
from support import IMAGE, collate, make_batch
from turns import feed, masked_dense, turn
from visibench.errors import OptionError, VisibenchError
from visibench.methods import Forward, Join, Keep, Method
from visibench.training.staged import Staging, staged_forward

LAYERS, PATCHES = 10, 16
STAGES = [(3, 7), (0, 6), (4, LAYERS), (2, 3), (1, 9)]
stages = pytest.mark.parametrize(("enter", "leave"), STAGES)
sinks = pytest.mark.parametrize("sink", ["visual", "bos"])


def staged(**options):
    return visibench.load_method("staged", **options)


def close(one, other):
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def there(ids, enter, leave, sink):
    """Bool (layers, n): which tokens of one row each layer has; an image is a run of image tokens."""
    kinds, present = ids[0].tolist(), torch.ones(LAYERS, ids.shape[1], dtype=torch.bool)
    for place, kind in enumerate(kinds):
        if kind == IMAGE:
            leads = sink == "visual" and (place == 0 or kinds[place - 1] != IMAGE)
            present[:enter, place] = leads
            present[leave:, place] = False
    return present


@sinks
def test_all_layers_are_the_dense_model_bit_for_bit(llava, sink):
    batch = collate(make_batch([(5, 9, 1), (3, 12, 2), (4, 6, 0)]))
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "suppress_tokens": [IMAGE]}
    dense, tokens = llava(**batch).logits, llava.generate(**batch, **options)
    with visibench.prune(llava, staged(enter=0, exit=LAYERS, sink=sink)):
        assert torch.equal(llava(**batch).logits, dense)
        assert torch.equal(llava.generate(**batch, **options), tokens)


@stages
@sinks
@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_each_layer_has_the_tokens_that_are_due_and_no_others(llava, enter, leave, sink, positions):
    (sample,) = make_batch([(3, 12, 2)])
    ids = sample["input_ids"]
    present = there(ids, enter, leave, sink)
    with visibench.prune(llava, staged(enter=enter, exit=leave, sink=sink, positions=positions)) as session:
        output = llava(**sample)
    assert [layer.keys.shape[2] for layer in output.past_key_values.layers] == present.sum(1).tolist()
    for layer in range(LAYERS):
        assert torch.equal(session.trace.kept(layer)[0], present[layer, ids[0] == IMAGE])
    dense = masked_dense(llava, ids, sample["pixel_values"], present, positions)
    close(output.logits[0], dense[present[-1]])


@stages
@sinks
def test_training_computes_the_same(llava, enter, leave, sink):
    before, text = 5, 9
    (sample,) = make_batch([(before, text, 1)])
    ids, decoder = sample["input_ids"], llava.model.language_model
    features = torch.cat(list(llava.get_image_features(pixel_values=sample["pixel_values"]).pooler_output))
    tokens = llava.get_input_embeddings()(ids).masked_scatter((ids == IMAGE)[..., None], features)
    places = torch.arange(ids.shape[1])[None]
    trained = llava.lm_head(staged_forward(decoder, tokens, places, before, PATCHES, Staging(enter, leave, sink)))
    with visibench.prune(llava, staged(enter=enter, exit=leave, sink=sink)):
        logits = llava(**sample).logits
    assert logits.shape[1] == before + text + (PATCHES if leave == LAYERS else 0)
    assert torch.equal(logits, trained)


@sinks
def test_images_with_no_text_between_them_count_as_one(llava, sink):
    ids, pixels = turn(4, images=2, behind=3)
    ids = torch.cat([ids[:, :20], ids[:, 23:]], dim=1)
    present = there(ids, 3, 7, sink)
    assert present[0].sum() == 4 + 3 + (sink == "visual")
    with visibench.prune(llava, staged(enter=3, exit=7, sink=sink)):
        logits = llava(input_ids=ids, pixel_values=pixels).logits[0]
    close(logits, masked_dense(llava, ids, pixels, present)[present[-1]])


@sinks
def test_turn_by_turn_equals_all_at_once(llava, sink):
    """Neither what was said before nor what follows decides who is there."""
    (first, picture), (second, another) = turn(5, images=1), turn(3, images=2, behind=5, seed=1)
    with visibench.prune(llava, staged(enter=3, exit=7, sink=sink)) as session:
        cache = feed(llava, first, pixels=picture).past_key_values
        parts = feed(llava, second, cache, another).logits[:, -1]
        whole = feed(llava, torch.cat([first, second], 1), pixels=torch.cat([picture, another]))
        assert session.trace.kv_lengths()[0].tolist() == [layer.keys.shape[2] for layer in cache.layers]
    close(parts, whole.logits[:, -1])


@sinks
def test_proposals_checked_with_the_prompt_run_along(llava, sink):
    """Prompt look-up feeds its first proposals behind the prompt."""
    (sample,) = make_batch([(3, 12, 1)])
    sample["input_ids"][0, -6:] = sample["input_ids"][0, -7:-6]  # repeats itself, so that there is something to look up
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "suppress_tokens": [IMAGE]}
    widths: list[int] = []
    with visibench.prune(llava, staged(enter=3, exit=7, sink=sink)):
        greedy = llava.generate(**sample, **options)
        hook = llava.model.language_model.layers[5].register_forward_pre_hook(
            lambda _, args: widths.append(args[0].shape[1])
        )
        looked_up = llava.generate(**sample, **options, prompt_lookup_num_tokens=3)
        hook.remove()
    assert torch.equal(looked_up, greedy)
    assert widths[0] > sample["input_ids"].shape[1]


# ---- the mechanism ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HoldTwice(Method):
    """Every second visual token is held aside at layer 1, of the others every second at layer 3; they join at 6."""

    name, title, hook_points = "hold_twice", "Hold twice", ("decoder",)

    def begin(self, layout, geometry):
        return HoldTwiceForward()


class HoldTwiceForward(Forward):
    def layer_input(self, layer, view):
        if layer in (1, 3):
            return Keep(torch.arange(view.present.shape[1]).expand_as(view.present) % 2 == 0, aside=True)
        return Join() if layer == 6 else None


@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_tokens_held_aside_at_several_layers_join_as_they_left(llava, positions):
    (sample,) = make_batch([(3, 12, 2)])
    ids = sample["input_ids"]
    number = torch.arange(2 * PATCHES)
    present = torch.ones(LAYERS, ids.shape[1], dtype=torch.bool)
    present[1:6, ids[0] == IMAGE] = number % 2 == 0
    present[3:6, ids[0] == IMAGE] = number % 4 == 0
    with visibench.prune(llava, HoldTwice(positions=positions)) as session:
        logits = llava(**sample).logits[0]
    assert session.trace.host_syncs == 2
    assert [session.trace.kept(layer).sum() for layer in range(LAYERS)] == [32, 16, 16, 8, 8, 8, 32, 32, 32, 32]
    close(logits, masked_dense(llava, ids, sample["pixel_values"], present, positions))


@dataclass(frozen=True)
class HoldImages(Method):
    """Asks for what is not to be had: tokens held aside in front of the decoder."""

    name, title, hook_points, vision_blocks = "hold_images", "Hold images", ("projector",), ()

    def begin(self, layout, geometry):
        return HoldImagesForward()


class HoldImagesForward(Forward):
    def projected(self, view):
        return Keep(torch.zeros_like(view.present), aside=True)


@dataclass(frozen=True)
class HoldReordered(HoldTwice):
    """Holds tokens aside, and may have changed their order."""

    reorders = True


@pytest.mark.parametrize(
    ("method", "message"), [(HoldImages(), "decoder layers alone"), (HoldReordered(), "none can be held aside")]
)
def test_tokens_that_would_not_find_back_are_refused(llava, method, message):
    (sample,) = make_batch([(3, 12, 2)])
    with visibench.prune(llava, method), pytest.raises(VisibenchError, match=message):
        llava(**sample)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give enter=LAYER, exit=LAYER or both"),
        ({"enter": 4, "exit": 4}, "exit=4 must be greater than enter=4"),
        ({"exit": 0}, "exit=0 must be greater than enter=0"),
        ({"enter": -1}, "enter must be >= 0"),
        ({"enter": 2, "sink": "first"}, "'visual' or 'bos'"),
    ],
)
def test_stages_that_cannot_be_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        staged(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enter": LAYERS}, "enter=10, but the model has 10 layers"),
        ({"exit": LAYERS + 1}, "exit=11, but the model has 10 layers"),
    ],
)
def test_stages_that_the_model_does_not_have_are_refused(llava, options, message):
    with pytest.raises(OptionError, match=message), visibench.prune(llava, staged(**options)):
        pass
