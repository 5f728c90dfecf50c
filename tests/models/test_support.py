"""The table of tested text decoders, every entry of it: miniatures with random weights against their own layers."""

from pathlib import Path

import pytest
import torch
import visibench
from by_hand import last_state
from families import TEXT, VISION, collate
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText
from units import CONFIGS
from visibench.evals.compute import flops
from visibench.methods import Forward, Method
from visibench.models.adapters import Adapter
from visibench.models.geometry import synthetic_inputs
from visibench.models.support import DECODERS

# What makes an entry differ from Llama and is not there by default.
WINDOW = {"sliding_window": 28}
SOME_WINDOWS = {"use_sliding_window": True, "max_window_layers": 3} | WINDOW
OWN = {
    "mistral": {"sliding_window": None},
    "cohere2": WINDOW,
    "gemma2": WINDOW,
    "gemma3_text": WINDOW,
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0, 0, 1]},
    "cohere": {"use_qk_norm": True},
    "phi3": {"head_dim": 12},
    "mistral, window": WINDOW,
    "phi3, window": {"head_dim": 12} | WINDOW,
    "qwen2, window": SOME_WINDOWS,
    "qwen3, window": SOME_WINDOWS,
}
FAST = {"gemma3_text", "qwen3, window"}
CASES = [
    pytest.param(name, marks=[] if name in FAST or not OWN.get(name, {}).get("sliding_window") else pytest.mark.slow)
    for name in sorted({*DECODERS, *OWN} - {"glm4v_text", "qwen3_vl_text"})  # tests/engine/test_decoder_families.py
]
PROMPT, VISUAL, CUT = 9, 32, 2


@pytest.fixture(scope="module", params=CASES)
def model(request):
    """Eager attention, whose weights the model itself hands out. Norms and biases are random too."""
    torch.manual_seed(0)
    if request.param in ("qwen2_vl_text", "qwen2_5_vl_text"):
        kind = request.param.removesuffix("_text")
        config = AutoConfig.for_model(kind, **CONFIGS[kind])
    else:
        text = TEXT | OWN.get(request.param, {}) | {"model_type": request.param.partition(",")[0]}
        vision = VISION | {"model_type": "clip_vision_model", "image_size": 24, "num_hidden_layers": 3}
        vision |= {"num_attention_heads": 4}
        config = AutoConfig.for_model("llava", text_config=text, vision_config=vision, image_token_id=63)
    assert config.get_text_config().model_type == request.param.partition(",")[0]
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    for name, weights in model.model.language_model.named_parameters():
        if weights.ndim == 1:
            torch.nn.init.normal_(weights, mean=float("norm" in name), std=0.3)
    return model


@pytest.fixture(scope="module")
def inputs(model):
    return synthetic_inputs(Adapter(model), 1, PROMPT, VISUAL)


@pytest.fixture(scope="module")
def dense(model, inputs):
    """Attention maps of the layers, and what each of them was given."""
    given, hooks = {}, []
    for number, layer in enumerate(Adapter(model).layers):
        note = lambda m, args, kwargs, n=number: given.__setitem__(n, (*args, dict(kwargs)))  # noqa: E731
        hooks.append(layer.register_forward_pre_hook(note, with_kwargs=True))
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions
    for hook in hooks:
        hook.remove()
    return maps, given


def most_attended(maps, inputs, layer, count):
    """Bool (V,): the ``count`` visual tokens to which the last token attends most, mean over heads."""
    weights = maps[layer][0].mean(0)[-1, inputs["input_ids"][0] == 63]
    return torch.zeros(len(weights), dtype=torch.bool).scatter(0, weights.topk(count).indices, True)


def shortened(adapter, layer, given, keep, positions):
    """A layer's arguments for the tokens that stay, with their positions or those of a shorter sequence."""
    mask, rotary = given["attention_mask"], tuple(table[..., keep, :] for table in given["position_embeddings"])
    if positions == "renumber":
        count = torch.arange(int(keep.sum()))
        count = count.expand(3, 1, -1) if adapter.kind == "qwen2_5_vl" else count[None]
        config = adapter.decoder.config
        by_type = {"layer_type": config.layer_types[layer]} if config.model_type == "gemma3_text" else {}
        rotary = adapter.decoder.rotary_emb(rotary[0], position_ids=count, **by_type)
    return {"attention_mask": mask[:, :, keep][:, :, :, keep], "position_embeddings": rotary}


def test_keeping_everything_is_dense_bit_for_bit(model, inputs):
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    logits, generated = model(**inputs).logits, model.generate(**inputs, **options)
    with visibench.prune(model, visibench.load_method("fastv", keep=1.0)):
        assert torch.equal(model(**inputs).logits, logits)
        assert torch.equal(model.generate(**inputs, **options), generated)


class Reader(Forward):
    def __init__(self):
        self.seen = []

    def sublayer(self, layer, view):
        self.seen.append((layer, view.name, view.inputs, view.outputs))


class Reading(Method):
    name, hook_points = "reading", ("sublayers",)

    def begin(self, layout, geometry):
        object.__setattr__(self, "reader", Reader())
        return self.reader


def test_inputs_and_outputs_of_attention_and_mlp(model, inputs, dense):
    """Each once in every layer; attention takes the layer's input behind its norm, and nothing changes."""
    _, given = dense
    logits, method = model(**inputs).logits, Reading()
    with visibench.prune(model, method):
        assert torch.equal(model(**inputs).logits, logits)
        prompt = method.reader.seen
        model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    layers = Adapter(model).layers
    assert [one[:2] for one in prompt] == [(n, name) for n in range(len(layers)) for name in ("attention", "mlp")]
    for number, name, taken, came in prompt:
        assert taken.shape == came.shape == given[number][0].shape
        if name == "attention":
            torch.testing.assert_close(taken, layers[number].input_layernorm(given[number][0]))
        else:
            torch.testing.assert_close(came, layers[number].mlp(taken))


@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_cut_equals_the_models_own_layers_on_the_tokens_left(model, inputs, dense, positions):
    """FastV reads the attention of layer 1, the one in front of its cut."""
    maps, given = dense
    state, trace = last_state(model, visibench.load_method("fastv", keep=0.5, positions=positions), inputs)
    assert torch.equal(trace.kept(CUT)[0], most_attended(maps, inputs, CUT - 1, VISUAL // 2))
    keep = torch.ones(PROMPT + VISUAL, dtype=torch.bool)
    keep[inputs["input_ids"][0] == 63] = trace.kept(CUT)[0]
    adapter, hidden = Adapter(model), given[CUT][0][:, keep]
    for number in range(CUT, len(adapter.layers)):
        hidden = adapter.layers[number](hidden, **shortened(adapter, number, given[number][-1], keep, positions))
    torch.testing.assert_close(state, adapter.decoder.norm(hidden)[:, -1], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_generation_of_a_batch_equals_each_row_alone(model, inputs, positions):
    method = visibench.load_method("pyramiddrop", cuts=(CUT, 3, 5), positions=positions)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "suppress_tokens": [63]}
    adapter = Adapter(model)
    rows = [inputs, *(synthetic_inputs(adapter, 1, *sizes, seed=1) for sizes in ((PROMPT - 2, VISUAL // 2), (5, 0)))]
    with visibench.prune(model, method):
        together = model.generate(**collate(rows), **options)
        for row, alone in zip(together, rows, strict=True):
            assert row[-5:].tolist() == model.generate(**alone, **options)[0, -5:].tolist()
        without = model.generate(**inputs, **options, use_cache=False)
        assert without[0, -5:].tolist() == together[0, -5:].tolist()


def test_preview_chooses_what_the_layer_to_come_attends_to(model, inputs, dense):
    _, trace = last_state(model, visibench.load_method("pyramiddrop", cuts=(CUT, 3, 5)), inputs)
    assert torch.equal(trace.kept(CUT)[0], most_attended(dense[0], inputs, CUT, VISUAL // 2))


@pytest.mark.parametrize("method", ["none", "pyramiddrop:cuts"])
def test_compute_equals_that_of_torchs_counter(model, inputs, method):
    options = {"cuts": (CUT, 3, 5)} if ":" in method else {}
    method = visibench.load_method(method.partition(":")[0], **options)
    with visibench.prune(model, method) as session, FlopCounterMode(display=False) as counter:
        model(**inputs)
    rotary = [sum(ops.values()) for name, ops in counter.get_flop_counts().items() if name.endswith("rotary_emb")]
    closed = flops.executed(session.trace, session.geometry, logits=None)
    assert closed.total()[0] == (counter.get_total_flops() - sum(rotary)) / 2


def test_docs_and_the_command_name_the_tested_decoders(cli):
    names = f"Tested text decoders: {', '.join(sorted(DECODERS))}"
    readme = (Path(visibench.__file__).parent / "docs" / "python.md").read_text()
    assert names in " ".join(readme.split())
    assert names in " ".join(cli("models")[1].split())
