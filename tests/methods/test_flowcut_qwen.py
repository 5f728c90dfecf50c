"""FlowCut as its authors run it on Qwen2-VL: 2 T tokens of an image leave the tower, T of them decoder layer 2 on.

Written out from their description: the tower image by image, positions on three axes counted anew, scores from queries,
keys and values that the model's own layer hands its kernel, and the model's own layers on what is left.
"""

from functools import cache

import pytest
import sequences
import torch
import visibench
from decoders import CONFIGS, miniature
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from units import VISUAL, sample_of
from visibench.evals.compute import flops
from visibench.evals.settings.method_spec import parse

T, CUT = 3, 2
AUTHORS = f"flowcut:tokens={T},query=mean,cut={CUT},positions=keep"


@cache
def model_of(attention="sdpa"):
    vision = CONFIGS["qwen2_vl"]["vision_config"] | {"depth": 6}
    return miniature("qwen2_vl", CONFIGS["qwen2_vl"] | {"vision_config": vision}, attention)


def counted(sample):
    """Of a row its runs: the ids of a text, or the grid of an image; with their positions (n, 3) in the prompt."""
    ids, grids, runs, now, place = sample["input_ids"][0].tolist(), sample["image_grid_thw"].tolist(), [], 0, 0
    while place < len(ids):
        if ids[place] != VISUAL:
            runs.append((ids[place], torch.full((1, 3), now)))
            now, place = now + 1, place + 1
            continue
        _, rows, columns = (side // part for side, part in zip(grids.pop(0), (1, 2, 2), strict=True))
        here = [(now, now + row, now + column) for row in range(rows) for column in range(columns)]
        runs.append((None, torch.tensor(here)))
        now, place = now + max(rows, columns), place + rows * columns
    return runs


def prompt(model, sample, factor):
    """What enters the decoder (1, L, D), its positions (L, 3), and which tokens are visual."""
    pictures, states, positions = iter(sequences.pictures(model, sample)), [], []
    for token, places in counted(sample):
        if token is not None:
            states.append(model.get_input_embeddings()(torch.tensor([token])))
        else:
            picture = next(pictures)
            sequences.flowcut(model, picture, min(factor * T, len(places)))
            states.append(sequences.projected(model, picture)[0])
        positions.append(places[: len(states[-1])])
    visual = [part for part, (token, _) in zip(states, counted(sample), strict=True) if token is None]
    is_visual = torch.cat([torch.full((len(part),), any(part is own for own in visual)) for part in states])
    return torch.cat(states)[None], torch.cat(positions), is_visual


def watched(model, states, positions, monkeypatch):
    """The decoder on all of it: the input of layer CUT, and query, key and value (heads, L, d) of the layer before."""
    decoder, seen, kernel = model.model.language_model, {}, ALL_ATTENTION_FUNCTIONS["sdpa"]

    def spied(module, q, k, v, *args, **kwargs):
        seen[getattr(module, "layer_idx", None)] = [part[0] for part in (q, k, v)]
        return kernel(module, q, k, v, *args, **kwargs)

    hook = decoder.layers[CUT].register_forward_pre_hook(
        lambda m, args, kwargs: seen.update(hidden=args[0]), with_kwargs=True
    )
    with monkeypatch.context() as patched:
        patched.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", spied)
        decoder(inputs_embeds=states, position_ids=positions.T[:, None])
    hook.remove()
    return seen["hidden"], *seen[CUT - 1]


def best(q, k, v, is_visual, budget):
    """Places of the visual tokens that stay, ascending."""
    groups, where = len(q) // len(k), is_visual.nonzero()[:, 0].tolist()
    size, scores = q.shape[2] ** 0.5, []
    alone = lambda products: [p / sum(products) for p in products]  # noqa: E731
    relation, semantic = ([0.0] * len(where) for _ in range(2))
    for head in range(len(q)):
        key, value = k[head // groups], v[head // groups]
        reads = alone([float((q[head, -1] @ key[j] / size).exp()) for j in where])
        alike = alone([float((value[-1] @ value[j] / size).exp()) for j in where])
        relation = [a + b / len(q) for a, b in zip(relation, reads, strict=True)]
        semantic = [a + b / len(q) for a, b in zip(semantic, alike, strict=True)]
    for j, r, s in zip(where, relation, semantic, strict=True):
        mean = sum(v[head // groups, j] for head in range(len(q))) / len(q)
        scores.append((-(r + s) * float(mean.abs().sum()), j))
    return sorted(j for _, j in sorted(scores)[:budget])


def by_hand(model, sample, monkeypatch, factor=2):
    """Logits of the last token, and how many visual tokens there are in front of the cut."""
    decoder, images = model.model.language_model, len(sample["image_grid_thw"])
    states, positions, is_visual = prompt(model, sample, factor)
    hidden, *heads = watched(model, states, positions, monkeypatch)
    stay = ~is_visual
    stay[best(*heads, is_visual, T * images)] = True
    hidden, places = hidden[:, stay], positions[stay].T[:, None]
    table = decoder.rotary_emb(hidden, places)
    for layer in decoder.layers[CUT:]:
        hidden = layer(hidden, attention_mask=None, position_embeddings=table)
    return model.lm_head(decoder.norm(hidden))[:, -1], int(is_visual.sum())


@pytest.mark.parametrize(
    ("images", "factor"),
    [
        pytest.param([(4, 5)], 2),
        pytest.param([(1, 7)], 2),
        pytest.param([(4, 5)], 4, marks=pytest.mark.slow),
        pytest.param([(3, 6), (2, 2), (5, 3)], 2, marks=pytest.mark.slow),  # one has fewer than 2 T
    ],
)
@torch.no_grad()
def test_the_authors_program_by_hand(images, factor, monkeypatch):
    model, sample = model_of(), sample_of("qwen2_vl", 9, images)
    wanted, entered = by_hand(model, sample, monkeypatch, factor)
    with visibench.prune(model, parse(f"{AUTHORS},tower_factor={factor}")) as session:
        logits = model(**sample).logits[:, -1]
    left = len(images) * T
    layers = len(model.model.language_model.layers)
    assert session.trace.visual_counts().tolist() == [[entered] * CUT + [left] * (layers - CUT)]
    torch.testing.assert_close(logits, wanted, atol=2e-5, rtol=1e-4)
    for other in (f"{AUTHORS},tower_factor={factor + 1}", AUTHORS.replace("keep", "renumber")):
        with visibench.prune(model, parse(other)):
            assert (model(**sample).logits[:, -1] - logits).abs().max() > 1e-3


@torch.no_grad()
def test_positions_are_the_models_own_count():
    """Of this file, so that what is compared above is not ours twice."""
    model, sample = model_of(), sample_of("qwen2_vl", 9, [(3, 6), (2, 2), (5, 3)])
    kinds = (sample["input_ids"] == VISUAL).long()
    own, _ = model.model.get_rope_index(sample["input_ids"], kinds, image_grid_thw=sample["image_grid_thw"])
    assert torch.equal(torch.cat([places for _, places in counted(sample)]), own[:, 0].T)


@pytest.mark.slow
@torch.no_grad()
def test_its_compute_is_torchs():
    model, sample = model_of("eager"), sample_of("qwen2_vl", 9, [(3, 6), (2, 2), (5, 3)])
    with visibench.prune(model, parse(AUTHORS)) as session, FlopCounterMode(display=False) as counter:
        model(**sample)
    closed = flops.executed_by_batch(session.trace, session.geometry, logits=None)
    rotary = [sum(ops.values()) for name, ops in counter.get_flop_counts().items() if name.endswith("rotary_emb")]
    assert closed.total()[0] == (counter.get_total_flops() - sum(rotary)) / 2
    heads = model.config.text_config.hidden_size
    assert session.trace.scoring_macs()[0, CUT - 1] == 2 * heads * session.trace.visual_counts()[0, CUT - 1]
