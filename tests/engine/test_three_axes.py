"""Later turns on models that count positions on three axes: kept, and renumbered behind what the cache counted."""

import pytest
import torch
import visibench
from decoders import IMAGE, decoder_model, row_samples
from probes import Probe

BY_TOKEN = {"input_ids", "attention_mask", "mm_token_type_ids"}


def last_states(model, method, turns):
    """The state of the last token behind each turn, one call of the model for each."""
    states, cache = [], None
    hook = model.lm_head.register_forward_pre_hook(lambda m, args: states.append(args[0][:, -1]))
    with torch.no_grad(), visibench.prune(model, method):
        for turn in turns:
            cache = model(**turn, past_key_values=cache, use_cache=True).past_key_values
    hook.remove()
    return states


def joined(model, turns):
    """The turns as one prompt, with the model's own positions, and the same positions for each turn."""
    whole = {key: torch.cat([turn[key] for turn in turns if key in turn], dim=int(key in BY_TOKEN)) for key in turns[0]}
    grids = whole.get("image_grid_thw")
    places, _ = model.model.get_rope_index(
        whole["input_ids"], whole["mm_token_type_ids"], image_grid_thw=grids, attention_mask=whole["attention_mask"]
    )
    parts, fed = [], 0
    for turn in turns:
        end = fed + turn["input_ids"].shape[1]
        mask = torch.ones(1, end, dtype=torch.long)
        parts.append(turn | {"attention_mask": mask, "position_ids": places[..., fed:end]})
        fed = end
    return whole | {"position_ids": places}, parts


OTHERS = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("qwen2_vl", "qwen3_vl", "glm4v")]


@pytest.mark.parametrize("kind", ["qwen2_5_vl", *OTHERS])
@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("later", ["text", "image"])
def test_a_later_turn_counts_on_behind_what_was_left_of_the_first(kind, positions, later):
    """Two turns, in each of which every second visual token stays, against both as one prompt."""
    model = decoder_model(kind)
    first, second, text = (row_samples(kind)[row] for row in (0, 1, 2))
    turns = [first, text if later == "text" else second]
    if later == "image":
        assert (second["input_ids"] == IMAGE).sum() % 2 == 0
    whole, parts = joined(model, turns)
    for layer in (0, 2):
        method = Probe(layer=layer, positions=positions)
        (together,) = last_states(model, method, [whole])
        torch.testing.assert_close(last_states(model, method, parts)[-1], together, atol=2e-5, rtol=1e-4)
