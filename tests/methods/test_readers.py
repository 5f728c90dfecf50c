"""What text takes up, against the definition on the model's own maps."""

import pytest
import visibench
from families import every_family, model_of, samples_of
from visibench.errors import OptionError
from visibench.models.adapters import Adapter


@every_family
def test_what_no_text_token_takes_up_leaves(kind):
    eager, (sample, *_) = model_of(kind, "eager"), samples_of(kind)
    adapter = Adapter(eager)
    visual = sample["input_ids"][0] == adapter.image_token
    text = ~visual & (visual.cumsum(0) > 0)
    output = eager(**sample, output_attentions=True, output_hidden_states=True, use_cache=False)
    layer, weights = adapter.layers[2], output.attentions[2][0]
    values = layer.self_attn.v_proj(layer.input_layernorm(output.hidden_states[2]))[0]
    values = values.view(len(visual), 2, -1).repeat_interleave(2, dim=1).transpose(0, 1)  # (heads, tokens, size)
    parts = weights[:, text][..., visual, None] * values[:, None, visual]  # what each text token takes of each
    taken = parts.permute(1, 2, 0, 3).flatten(2).norm(dim=2).amax(0)
    threshold = float(taken.sort().values[len(taken) // 2 - 1 :][:2].mean())
    method = visibench.load_method("readers", layer=3, threshold=threshold, exit=5)
    with visibench.prune(model_of(kind), method) as session:
        model_of(kind)(**sample, use_cache=False)
    assert session.trace.kept(2)[0].all()
    assert session.trace.kept(3)[0].tolist() == session.trace.kept(4)[0].tolist() == (taken > threshold).tolist()
    assert session.trace.visual_counts()[0, 3] == len(taken) - len(taken) // 2
    assert not session.trace.kept(5).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 0}, "the attention of the layer before it is read"),
        ({"threshold": -1}, "is a norm"),
        ({"layer": 4, "exit": 4}, "exit must lie behind layer: here they are layers 4 and 4"),
        ({"layer": 4, "exit": 10}, "exit=10, but the model has 10 layers"),
    ],
)
def test_what_cannot_act_is_refused(llava, options, message):
    with pytest.raises(OptionError, match=message):
        visibench.prune(llava, visibench.load_method("readers", **options))
