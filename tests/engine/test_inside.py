"""What the tower is given or goes on with: outputs of several blocks that are used side by side, smaller images."""

import pytest
import torch
import visibench
from decoders import CLIP, CONFIGS, decoder_model, miniature, row_samples
from torch.nn.functional import interpolate
from visibench.engine.decisions import BlockMerge
from visibench.evals.settings.method_spec import parse
from visibench.models.adapters import Adapter

DEEP = CLIP | {"num_hidden_layers": 7}
LAYERS = {"vipllava": "vision_feature_layers", "llava": "vision_feature_layer"}
USED = [-2, 4, 2, 1]
"""Hidden states that the model uses, in its order: outputs of blocks 5, 3, 1 and 0."""


def deep(kind):
    return miniature(kind, CONFIGS[kind] | {LAYERS[kind]: USED, "vision_config": DEEP}, "sdpa")


class Members:
    """Which patches of each image every token stands for behind each block, CLS as 0; told by the decisions alone."""

    def __init__(self, method, monkeypatch):
        self.sets, self.behind = None, {}
        kind, block = type(method), type(method).block

        def noting(method, view):
            decision = block(method, view)
            self.note(view, decision)
            return decision

        monkeypatch.setattr(kind, "block", noting)

    def note(self, view, decision):
        if self.sets is None:
            self.sets = [[{place} for place in range(view.tokens.shape[1])] for _ in view.tokens]
        if isinstance(decision, BlockMerge):
            self.sets = [self.joined(*pair) for pair in zip(self.sets, decision.group.tolist(), strict=True)]
        elif decision is not None:
            each = zip(self.sets, decision.scores.tolist(), decision.counts, strict=True)
            self.sets = [self.left(*one) for one in each]
        self.behind[view.block] = self.sets

    def joined(self, sets, group):
        new = [set() for _ in range(max(group) + 1)]
        for own, place in zip(sets, group, strict=True):
            new[place] |= own
        return new

    def left(self, sets, scores, count):
        best = sorted(range(len(sets) - 1), key=lambda place: -scores[place])[:count]
        return [sets[0], *(sets[1 + place] for place in sorted(best))]


def followed(output, before, after):
    """Means of ``output`` (t, D), one row for each of the sets ``before``, over those in each of the sets ``after``."""
    rows = []
    for whole in after:
        parts = [place for place, own in enumerate(before) if own <= whole]
        rows.append(sum(len(before[place]) * output[place] for place in parts) / sum(len(before[p]) for p in parts))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("text", ["tome:tokens=5", "tome:tokens=4,proportional=false", "flowcut:tokens=5"])
def test_outputs_of_earlier_blocks_follow_the_tokens(kind, text, monkeypatch):
    model, method, outputs, entered = deep(kind), parse(text), {}, []
    members, adapter = Members(method, monkeypatch), Adapter(model)
    hooks = [
        block.register_forward_hook(lambda m, a, output, number=number: outputs.__setitem__(number, output))
        for number, block in enumerate(adapter.vision_blocks)
    ]
    hooks.append(adapter.projector.register_forward_pre_hook(lambda m, args: entered.append(args[0])))
    with torch.no_grad(), visibench.prune(model, method):
        model(**row_samples(kind)[1])  # two images
    for hook in hooks:
        hook.remove()
    last = max(members.behind)
    numbers = [layer - 1 if layer > 0 else len(adapter.vision_blocks) + layer for layer in USED]
    counts = {len(own) for number in numbers for own in members.behind[number]}
    assert len(counts) > 2, "the outputs are of different numbers of tokens"
    for image, after in enumerate(members.behind[last]):
        parts = [followed(outputs[b][image], members.behind[b][image], after)[1:] for b in numbers]
        own = entered[0][image, : len(after) - 1]
        torch.testing.assert_close(own, torch.cat(parts, dim=-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["deepseek_vl", "llava"])
def test_prumerge_reads_the_features_own_block_by_the_attention_that_patches_receive(kind):
    """Five patches and the extra token of each of two images, by the weights that the tower itself puts out."""
    model, sample = decoder_model(kind), row_samples(kind)[1]
    vision, tower = Adapter(model).geometry.vision, Adapter(model).vision_tower
    with torch.no_grad():
        maps = tower(sample["pixel_values"], output_attentions=True).attentions[vision.feature_block]
        method = parse("prumerge:tokens=6,order=spatial,attention=received,read_block=features")
        with visibench.prune(model, method) as session:
            model(**sample)
    got = maps.mean((1, 2))[:, int(vision.has_cls) :]
    kept = torch.zeros_like(got, dtype=torch.bool).scatter(1, got.topk(5).indices, value=True)
    assert session.trace.kept(0)[0].tolist() == kept.flatten().tolist()
    assert session.trace.visual_counts()[0, 0] == 12


# ---- smaller images -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "side"), [("internvl", 24), ("smolvlm", 12), ("idefics3", 12), ("vipllava", 12)])
def test_a_smaller_image_is_what_the_model_itself_makes_of_one(kind, side):
    """Of an image a fourth of its tokens; of SmolVLM and Idefics3 with padding on the right of a tile."""
    model, (_, sample, *_) = decoder_model(kind), row_samples(kind)
    pixels, nested = sample["pixel_values"], sample["pixel_values"].ndim == 5
    if nested:
        counts = torch.ones(*pixels.shape[:2], *pixels.shape[-2:], dtype=torch.bool)
        counts[0, 1, :, 12:] = False
        sample["pixel_attention_mask"] = counts
        pixels.masked_fill_(~counts[:, :, None], 0)
    small = interpolate(pixels.flatten(0, -4), (side, side), mode="bicubic", align_corners=False, antialias=True)
    given = {"pixel_values": small.unflatten(0, pixels.shape[:-3])}
    if nested:
        given["pixel_attention_mask"] = counts[..., ::2, ::2]
    entered = []
    note = lambda m, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"])  # noqa: E731
    with torch.no_grad(), visibench.prune(model, parse("downsample:keep=0.3")) as session:
        hook = Adapter(model).layers[0].register_forward_pre_hook(note, with_kwargs=True)  # behind the cut
        model(**sample)
        hook.remove()
    options = {"interpolate_pos_encoding": True} if kind == "vipllava" else {}
    with torch.no_grad():
        own = torch.cat([*model.model.get_image_features(**given, **options).pooler_output]).flatten(0, -2)
    trace = session.trace
    assert trace.visual_counts().unique().tolist() == [len(own)]
    assert len(own) < (sample["input_ids"] == 63).sum() / 3
    visual = entered[0][0][trace.layouts[0].visual.mask[0]]
    torch.testing.assert_close(visual, own, atol=1e-5, rtol=1e-5)
