"""A cut in the decoder by hand: the model's own layers on gathered inputs, and what a pruned run has instead."""

import inspect

import torch
import visibench
from probes import Probe
from visibench.models.adapters import Adapter


def last_state(model, method, batch):
    """The last token's state in front of the language-model head, and the trace."""
    states = []
    hook = model.lm_head.register_forward_pre_hook(lambda m, args: states.append(args[0][:, -1]))
    with visibench.prune(model, method) as session:
        model(**batch)
    hook.remove()
    return states[0], session.trace


def given_densely(model, inputs):
    """Arguments of the decoder, of its rotary table's first call and of each of its layers, in a dense run."""
    decoder, seen, hooks = Adapter(model).decoder, {}, []
    for name, module in {"decoder": decoder, "rotary": decoder.rotary_emb, **dict(enumerate(decoder.layers))}.items():

        def note(m, args, kwargs, name=name):
            seen.setdefault(name, (args, dict(kwargs)))

        hooks.append(module.register_forward_pre_hook(note, with_kwargs=True))
    model(**inputs)
    for hook in hooks:
        hook.remove()
    return seen


def rotary_table(adapter, given, layer, keep, positions):
    _, arguments = given[layer]
    if positions == "keep":
        return tuple(table[..., keep, :] for table in arguments["position_embeddings"])
    args, kwargs = given["rotary"]
    places = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
    count = (places.flatten()[0] + torch.arange(int(keep.sum()))).expand(*places.shape[:-1], -1)
    rotary, config = adapter.decoder.rotary_emb, adapter.decoder.config
    by_type = "layer_type" in inspect.signature(rotary.forward).parameters
    return rotary(args[0], count, **({"layer_type": config.layer_types[layer]} if by_type else {}))


def by_hand(model, given, cut, keep, visual, positions):
    """The last state when the model's own layers go on, from ``cut``, with the tokens in ``keep`` alone."""
    adapter = Adapter(model)
    decoder, extra = adapter.decoder, given["decoder"][1]
    args, kwargs = given[cut]
    hidden = (args[0] if args else kwargs["hidden_states"])[:, keep]
    features = extra.get("deepstack_visual_embeds") or []
    for layer in range(cut, len(decoder.layers)):
        mask = given[layer][1]["attention_mask"][:, :, keep][:, :, :, keep]
        table = rotary_table(adapter, given, layer, keep, positions)
        hidden = decoder.layers[layer](hidden, attention_mask=mask, position_embeddings=table)
        if layer < len(features):
            hidden = decoder._deepstack_process(hidden, visual[keep][None], features[layer][keep[visual]])
    return decoder.norm(hidden)[:, -1]


def with_some_aside(model, given, span, keep, visual):
    """The last state when tokens that are not in ``keep`` pass by the layers of a ``span``, and are there behind it."""
    adapter = Adapter(model)
    decoder, features = adapter.decoder, given["decoder"][1].get("deepstack_visual_embeds") or []
    args, kwargs = given[span[0]]
    hidden = (args[0] if args else kwargs["hidden_states"]).clone()
    for layer in range(span[0], len(decoder.layers)):
        here = keep if layer < span[1] else torch.ones_like(keep)
        mask = given[layer][1]["attention_mask"][:, :, here][:, :, :, here]
        table = rotary_table(adapter, given, layer, here, "keep")
        hidden[:, here] = decoder.layers[layer](hidden[:, here], attention_mask=mask, position_embeddings=table)
        if layer < len(features):  # all of them get what the model adds, wherever they are
            hidden = decoder._deepstack_process(hidden, visual[None], features[layer])
    return decoder.norm(hidden)[:, -1]


def with_one_added(model, given, cut, keep, visual):
    """The last state when from ``cut`` on the mean of the visual tokens not in ``keep`` stands by the last of all."""
    adapter = Adapter(model)
    decoder, features = adapter.decoder, given["decoder"][1].get("deepstack_visual_embeds") or []
    args, kwargs = given[cut]
    hidden, last = args[0] if args else kwargs["hidden_states"], int(visual.nonzero()[-1])
    order = sorted([*keep.nonzero().flatten().tolist(), last])
    own, new = order.index(last), order.index(last) + order.count(last) - 1
    mean = hidden[:, visual & ~keep].mean(1)
    hidden = hidden[:, order]
    hidden[:, new] = mean
    for layer in range(cut, len(decoder.layers)):
        mask = given[layer][1]["attention_mask"][:, :, order][..., order].clone()
        if own < new and not adapter.family.bidirectional:  # of two in one place the first does not see the second
            mask[..., own, new] = torch.finfo(mask.dtype).min
        table = rotary_table(adapter, given, layer, torch.ones(len(order)), "renumber")
        hidden = decoder.layers[layer](hidden, attention_mask=mask, position_embeddings=table)
        if layer < len(features):
            places = (visual.cumsum(0) - 1)[order][visual[order]]
            hidden = decoder._deepstack_process(hidden, visual[order][None], features[layer][places])
    return decoder.norm(hidden)[:, -1]


def check_cuts(model, inputs, visual, positions):
    """Cuts in front of an early, a middle and a late layer, in a row with ``visual`` tokens, bool (L,)."""
    given = given_densely(model, inputs)
    dense, _ = last_state(model, visibench.load_method("none"), inputs)
    for cut in (0, 2, 4):
        state, trace = last_state(model, Probe(layer=cut, positions=positions), inputs)
        keep = torch.ones_like(visual)
        keep[visual] = trace.kept(cut)[0]
        assert 0 < trace.kept(cut).sum() < visual.sum()
        own = by_hand(model, given, cut, keep, visual, positions)
        torch.testing.assert_close(state, own, atol=2e-5, rtol=1e-4)
        assert (state - dense).abs().max() > 1e-3
