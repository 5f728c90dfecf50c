"""Probes on every family against the model's own layers and maps; and on decoders that were built to be found out."""

import pytest
import torch
import visibench
from families import collate, every_family, model_of, samples_of
from transformers import LlamaConfig, LlamaForCausalLM
from visibench.analysis.probes import Blind
from visibench.analysis.recorder import THRESHOLDS, Recorder
from visibench.engine import prune
from visibench.models.adapters import Adapter

VISUAL = (4, 16)
"""Where visual tokens stand in the prompts of the built decoders."""


def recorded(model, inputs, layout=None, layers=None):
    """One prefill: its quantities by layer, and the rows of the last prefill."""
    recorder = Recorder(at_layers=tuple(range(Adapter(model).geometry.layers)) if layers is None else layers)
    with prune(model, recorder, layout=layout):
        final = model(**inputs, use_cache=False).logits[:, -1]
    (recording,) = recorder.seen
    return recording.finish(final)


def masks(model, inputs):
    """Bool (L,): visual tokens, and text behind the first of them."""
    visual = inputs["input_ids"][0] == Adapter(model).image_token
    return visual, ~visual & (visual.cumsum(0) > 0)


@every_family
def test_attention_is_that_of_the_maps(kind):
    model, eager = model_of(kind), model_of(kind, "eager")
    (sample, *_) = samples_of(kind)
    visual, text = masks(model, sample)
    maps = eager(**sample, output_attentions=True, use_cache=False).attentions
    ((row,), _) = recorded(model, sample)
    for layer, weights in enumerate(weights[0].mean(0) for weights in maps):
        for name, queries in (("last", weights[-1:]), ("text", weights[text])):
            mean = queries.mean(0)[visual]
            spread = mean / mean.sum()
            assert row[f"{name}_share"][layer] == pytest.approx(float(mean.sum()), abs=1e-5)
            assert row[f"{name}_strongest"][layer] == pytest.approx(float(mean.max()), abs=1e-5)
            assert row[f"{name}_token"][layer] == int(mean.argmax())
            even = torch.tensor(float(len(mean))).log()
            entropy = torch.distributions.Categorical(probs=spread).entropy() / even
            assert row[f"{name}_entropy"][layer] == pytest.approx(float(entropy), abs=1e-4)


@every_family
def test_lens_is_norm_and_head_of_hidden_states(kind):
    model = model_of(kind)
    (sample, *_) = samples_of(kind)
    output = model(**sample, output_hidden_states=True, use_cache=False)
    answer = output.logits[0, -1].argmax()
    ((row,), (tops,)) = recorded(model, sample)
    *inner, _ = output.hidden_states[1:]  # the last one is behind the norm already
    logits = [model.lm_head(Adapter(model).decoder.norm(hidden[0, -1])) for hidden in inner] + [output.logits[0, -1]]
    assert row["lens_hidden_rank"] == [float((one > one[answer]).sum()) + 1 for one in logits]
    assert [top[0] for top in tops["hidden"]] == [int(one.argmax()) for one in logits]
    assert row["lens_hidden_rank"][-1] == 1


@every_family
def test_rows_of_a_batch_are_recorded_as_alone(kind):
    samples = samples_of(kind)
    together, _ = recorded(model_of(kind), collate(samples))
    for row, sample in zip(together, samples, strict=True):
        if not masks(model_of(kind), sample)[0].any():
            continue
        ((alone,), _) = recorded(model_of(kind), sample)
        for quantity in alone:
            assert row[quantity] == pytest.approx(alone[quantity], rel=1e-3, abs=1e-4), quantity


@every_family
def test_masked_is_a_mask_in_that_layer(kind):
    """The model's own layer under a mask that hides visual tokens from text."""
    model, eager = model_of(kind), model_of(kind, "eager")
    (sample, *_) = samples_of(kind)
    visual, text = masks(model, sample)
    hidden = torch.zeros(len(text), len(text)).masked_fill(text[:, None] & visual, torch.finfo(torch.float32).min)

    def hide(module, args, kwargs):
        return args, kwargs | {"attention_mask": kwargs["attention_mask"] + hidden}

    hook = Adapter(eager).layers[2].register_forward_pre_hook(hide, with_kwargs=True)
    try:
        expected = eager(**sample, use_cache=False).logits
    finally:
        hook.remove()
    with prune(model, Blind(blind_layers=(2,))):
        found = model(**sample, use_cache=False).logits
    assert not torch.allclose(expected, model(**sample, use_cache=False).logits, atol=1e-2)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@every_family
@pytest.mark.parametrize("how", ["masked", "moved"])
def test_blind_in_no_layer_is_dense(kind, how):
    (sample, *_) = samples_of(kind)
    model = model_of(kind)
    dense = model(**sample, use_cache=False).logits
    with prune(model, Blind(how=how)):
        assert torch.equal(model(**sample, use_cache=False).logits, dense)


# ---- built decoders -------------------------------------------------------------------------------------------------


def decoder(**sizes):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.25,
        **sizes,
    )
    return LlamaForCausalLM(config).eval()


def eager(model):
    """The same model with maps of attention."""
    copy = LlamaForCausalLM._from_config(model.config, attn_implementation="eager")
    copy.load_state_dict(model.state_dict())
    return copy.eval()


def prompt(visual=None):
    ids = torch.arange(3, 27)[None]
    if visual is not None:
        ids[0, slice(*VISUAL)] = torch.tensor(visual)
    return {"input_ids": ids}, visibench.TokenLayout.from_spans(24, visual=[VISUAL])


def test_moved_reads_the_first_visual_token():
    """Where all visual tokens have one value, as in layer 0 of equal tokens, nothing changes."""
    model = decoder()
    equal, layout = prompt([30] * 12)
    unequal, _ = prompt()
    for inputs, same in ((equal, True), (unequal, False)):
        dense = model(**inputs, use_cache=False).logits
        with prune(model, Blind(blind_layers=(0,), how="moved"), layout=layout):
            found = model(**inputs, use_cache=False).logits
        assert torch.allclose(found, dense, atol=1e-4) == same


@pytest.mark.parametrize("token", [7, 0, 11])
def test_a_sink_is_found(token):
    """All queries meet one key: that of the only visual token with a content in one direction."""
    model = decoder()
    ids = [30] * 12
    ids[token] = 40
    inputs, layout = prompt(ids)
    size = model.config.hidden_size // model.config.num_attention_heads
    layer = model.model.layers[0].self_attn
    with torch.no_grad():
        embeddings = model.model.embed_tokens.weight
        embeddings[:, :2] = torch.tensor([1.0, 0.0])
        embeddings[40, :2] = torch.tensor([1.0, 30.0])
        layer.q_proj.weight.zero_()
        layer.k_proj.weight.zero_()
        # The slowest rotation: keys and queries of one direction stay so over a prompt.
        layer.q_proj.weight[size - 1 :: size, 0] = 20.0
        layer.k_proj.weight[size - 1 :: size, 1] = 20.0
    ((row,), _) = recorded(model, inputs, layout, layers=(0,))
    assert row["text_token"] == row["last_token"] == [token]
    assert row["text_strongest"][0] > 0.99
    assert row["last_entropy"][0] < 0.01
    values = layer.v_proj(model.model.layers[0].input_layernorm(model.model.embed_tokens.weight))
    norms = values.view(64, 2, size).abs().sum(-1).mean(1)
    assert row["value_sink"] == pytest.approx([float(norms[40])], rel=1e-4)
    assert row["value_others"] == pytest.approx([float(norms[30])], rel=1e-4)


def test_contributions_are_counted():
    model, (inputs, layout) = decoder(), prompt()
    ((row,), _) = recorded(model, inputs, layout)
    heads, size = model.config.num_attention_heads, model.config.hidden_size // model.config.num_attention_heads
    output = eager(model)(**inputs, output_attentions=True, output_hidden_states=True, use_cache=False)
    for layer, weights in enumerate(output.attentions):
        part = model.model.layers[layer]
        values = part.self_attn.v_proj(part.input_layernorm(output.hidden_states[layer]))[0].view(-1, 2, size)
        values = values.repeat_interleave(heads // 2, dim=1).transpose(0, 1)
        parts = weights[0, :, -1, :, None] * values
        norms = parts[:, slice(*VISUAL)].transpose(0, 1).flatten(1).norm(dim=1)
        ordered = sorted(norms.tolist(), reverse=True)
        carrying = next(n for n in range(1, 13) if sum(ordered[:n]) >= 0.9 * sum(ordered) - 1e-6)
        assert row["contribution_carrying"][layer] == carrying
        assert row["contribution_largest"][layer] == pytest.approx(ordered[0], rel=1e-5)
        for threshold in THRESHOLDS:
            assert row[f"contribution_above_{threshold:g}"][layer] == sum(n > threshold for n in ordered)
