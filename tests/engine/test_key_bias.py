"""A lasting bias on keys: log(2) is a key that stands there twice, wherever the cache goes."""

import copy

import pytest
import torch
import visibench
from support import IMAGE, collate, make_batch, make_llava
from visibench.errors import UnsupportedModelError, VisibenchError
from visibench.methods import Forward, Keep, Merge, Method

LAST = 9
ROWS = [(5, 9, 1), (3, 14, 2), (7, 4, 1), (6, 9, 0)]


class Doubled(Method):
    """At the last layer every third visual token counts twice, and every fifth leaves; or stands there twice."""

    name, hook_points, positions = "doubled", ("decoder",), "keep"
    biased: bool = True
    biases_keys = True

    def begin(self, layout, geometry):
        return DoubledForward(self.biased)


class DoubledForward(Forward):
    def __init__(self, biased):
        self.biased = biased

    def layer_input(self, layer, view):
        if layer != LAST:
            return None
        number = torch.arange(view.present.shape[1]).expand(view.present.shape)
        twice, stays = (number % 3 == 0) & (number % 5 > 0) & view.present, (number % 5 > 0) & view.present
        if self.biased:
            return Merge(stays, bias=twice * torch.tensor(2.0).log())
        return Merge(stays, added=view.hidden, added_present=twice, added_positions=view.positions, anchors=number)


def doubled(biased):
    method = Doubled()
    object.__setattr__(method, "biased", biased)
    return method


def prefilled(model, biased, batch):
    """Logits of the last token, and of three more that are fed together and one by one."""
    new = torch.tensor([[5, 6, 7]]).expand(len(batch["input_ids"]), -1)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(new)], 1)
    place = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), visibench.prune(model, doubled(biased)):
        out = model(**batch, position_ids=place[:, :-3], use_cache=True)
        cache = out.past_key_values
        single = copy.deepcopy(cache)

        def feed(ids, end, cache):
            here = place[:, :end][:, -ids.shape[1] :]
            return model(input_ids=ids, attention_mask=mask[:, :end], position_ids=here, past_key_values=cache).logits

        together = feed(new, mask.shape[1], cache)
        steps = [feed(new[:, [k]], mask.shape[1] - 2 + k, single) for k in range(3)]
    return out.logits[:, -1], together, torch.cat(steps, dim=1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_log_2_is_a_key_twice(attention):
    """In the prompt, behind it, and in a batch of uneven rows as in each row alone."""
    model = make_llava(attention=attention)
    samples = make_batch(ROWS)
    biased, added = (prefilled(model, way, collate(samples)) for way in (True, False))
    for one, other in zip(biased, added, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(biased[1], biased[2], atol=1e-5, rtol=1e-4)
    for row, sample in enumerate(samples):
        alone = prefilled(model, True, sample)
        for one, other in zip(biased, alone, strict=True):
            torch.testing.assert_close(one[row], other[0], atol=1e-5, rtol=1e-4)


def test_the_cache_carries_it_through_crops_choices_and_copies(llava):
    batch, new = collate(make_batch(ROWS[:2])), torch.tensor([[5, 6], [7, 8]])

    def feed(cache, ids):
        mask = torch.cat([cache.padding.long(), torch.ones_like(ids)], 1)
        return llava(input_ids=ids, attention_mask=mask, past_key_values=cache).logits

    with torch.no_grad(), visibench.prune(llava, doubled(True)):
        cache = llava(**batch, use_cache=True).past_key_values
        bias = cache.held[LAST].bias
        assert cache.held[LAST - 1].bias is None
        assert bias.shape == cache.layers[LAST].keys.shape[:1] + cache.layers[LAST].keys.shape[2:3]
        expected = feed(copy.deepcopy(cache), new)
        feed(cache, torch.tensor([[1, 2, 3], [4, 5, 6]]))
        cache.crop(-3)
        torch.testing.assert_close(feed(copy.deepcopy(cache), new), expected)
        swapped = copy.deepcopy(cache)
        swapped.reorder_cache(torch.tensor([1, 0]))
        torch.testing.assert_close(feed(swapped, new.flip(0)), expected.flip(0))
        cache.batch_repeat_interleave(2)
        torch.testing.assert_close(feed(cache, new.repeat_interleave(2, 0)), expected.repeat_interleave(2, 0))
        assert torch.equal(cache.held[LAST].bias[:, : bias.shape[1]], bias.repeat_interleave(2, 0))
        cache.crop(-2 - 9)  # into the prompt: rows lost different numbers of tokens
        assert cache.held[LAST].bias.shape == cache.layers[LAST].keys.shape[:1] + cache.layers[LAST].keys.shape[2:3]
        assert (cache.held[LAST].bias > 0).sum() == 2 * (bias > 0).sum()


def test_a_bias_that_keeps_everything_still_counts(llava):
    class All(DoubledForward):
        def layer_input(self, layer, view):
            return Merge(view.present, bias=torch.ones(view.present.shape)) if layer == 3 else None

    (sample,) = make_batch([(5, 9, 1)])
    method = doubled(True)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        dense = llava(**sample).logits
        patch.setattr(Doubled, "begin", lambda *_: All(True))
        with visibench.prune(llava, method):
            assert not torch.allclose(llava(**sample).logits, dense, atol=1e-3)


def test_attention_is_read_with_the_bias_in_it(llava):
    """Rows that a method reads behind the cut are those of the kernel."""

    class Reads(DoubledForward):
        def attention(self, layer, view):
            if layer == LAST:
                read = view.attend((view.layout.everything, view.layout.everything))
                torch.testing.assert_close(read, view.output, atol=1e-5, rtol=1e-4)
                weights = view.weights(view.layout.everything)
                torch.testing.assert_close((weights @ view.values).transpose(1, 2), read, atol=1e-5, rtol=1e-4)
                seen.append(layer)

    class Reading(Doubled):
        hook_points = ("decoder", "attention")

        def begin(self, layout, geometry):
            return Reads(True)

    seen, (sample,) = [], make_batch([(5, 9, 1)])
    with torch.no_grad(), visibench.prune(llava, Reading()):
        llava(**sample)
    assert seen == [LAST]


def test_what_cannot_carry_it_is_refused_by_name(monkeypatch):
    model = make_llava()
    (sample,) = make_batch([(5, 9, 1)])
    assert (sample["input_ids"] == IMAGE).any()
    monkeypatch.setattr(Doubled, "biases_keys", False)
    undeclared = pytest.raises(VisibenchError, match="doubled puts a bias on keys and does not say so")
    with undeclared, visibench.prune(model, doubled(True)):
        model(**sample)

    class Aside(DoubledForward):
        def layer_input(self, layer, view):
            if layer == 2:
                return Merge(view.present, bias=torch.ones(view.present.shape))
            return Keep(torch.zeros_like(view.present), aside=True) if layer == 3 else None

    monkeypatch.setattr(Doubled, "biases_keys", True)
    monkeypatch.setattr(Doubled, "begin", lambda *_: Aside(True))
    aside = pytest.raises(VisibenchError, match="held aside where others have a lasting bias")
    with aside, visibench.prune(model, doubled(True)):
        model(**sample)
    model.config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedModelError, match=r"pact adds .* flash_attention_2 cannot: .*='sdpa'"):
        visibench.prune(model, visibench.load_method("pact"))
    visibench.prune(model, visibench.load_method("pact", proportional=False))
