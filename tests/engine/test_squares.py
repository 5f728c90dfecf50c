"""Inside towers behind which squares of patches make tokens, and in towers without CLS: written out, image by image."""

import math
from itertools import product

import pytest
import torch
import visibench
from towers import SIDES, behind, blocks_of, deep_model, entered, squares
from units import sample_of
from visibench.errors import VisibenchError
from visibench.evals.compute import flops
from visibench.evals.compute.prefill_plan import planned_prefill
from visibench.evals.settings.method_spec import parse
from visibench.methods import BlockCut, Method
from visibench.models import LoadedModel
from visibench.models.adapters import Adapter
from visibench.models.geometry import synthetic_inputs

SQUARE = ["internvl", "smolvlm", "idefics3"]


def prompt(kind, model, images=3):
    """A row with so many images."""
    vision = Adapter(model).geometry.vision
    tokens = vision.tokens * images
    if kind == "llava_onevision":
        return sample_of(kind, 9, [(24, 24)] * images)
    return synthetic_inputs(Adapter(model), 1, 8, tokens)


def patches_in_order(kind, model, first):
    """Places of the patches in the tower, in the order in which those that follow one another make tokens."""
    side = SIDES[kind] // 6
    merged = Adapter(model).geometry.vision.merged
    own = [place for square in squares(side) for place in square] if merged == 4 else range(side**2)
    return [place + first for place in own]


def hidden(real):
    """What hides keys that are not ``real``."""
    return torch.zeros(len(real)).masked_fill(~real, -torch.inf)


def padded_prompt(kind, model):
    """Three tiles of a row: a whole one, one with columns and one with rows of padding, and their real patches."""
    inputs, side = prompt(kind, model), SIDES[kind]
    real = torch.ones(3, side // 6, side // 6, dtype=torch.bool)
    real[1, :, 5:], real[2, 2:] = False, False  # squares that are half of padding, and squares of nothing else
    counts = real.repeat_interleave(6, 1).repeat_interleave(6, 2)[None]
    pixels = inputs["pixel_values"].masked_fill(~counts[:, :, None], 0)
    order = patches_in_order(kind, model, 0)
    return inputs | {"pixel_values": pixels, "pixel_attention_mask": counts}, real.flatten(1)[:, order]


# ---- FlowCut ------------------------------------------------------------------------------------------------------


def flow(model, tokens, order, budget, real=None, *, by_mean):
    """The patches (T · merged, D) that are left of one image's ``tokens`` (t, D), and their numbers by block.

    ``real``: bool (P,), patches that are no padding, in ``order``; only where there is no CLS.
    """
    vision = Adapter(model).geometry.vision
    first, last, score, numbers = int(vision.has_cls), vision.feature_block - (not by_mean), None, []
    tokens = torch.cat([tokens[:first], tokens[order]])
    real = torch.ones(len(order), dtype=torch.bool) if real is None else real
    for number, block in enumerate(blocks_of(model)[: vision.feature_block + 1]):
        tokens, q, k, v = block.attend(tokens, hidden(real) if not real.all() else 0.0)
        tokens, there = block.mlp(tokens), len(tokens) - first
        numbers.append(there)
        if number > last or there <= budget:
            continue
        strength = v[:, first:].mean(0).abs().sum(1)
        if by_mean:
            mean = q[:, first:][:, real].sum(1) / real.sum()
            pays = torch.einsum("hd,htd->ht", mean, k[:, first:][:, real]) / math.sqrt(k.shape[2])
            got = strength.new_zeros(there)
            got[real] = torch.stack([row.exp() / row.exp().sum() for row in pays]).mean(0)
            new, entropy = got * strength, -sum(a * math.log(a + 1e-7) for a in got.tolist())
        else:
            pays = [
                (query @ key.T)[first:].exp() for query, key in zip(q[:, 0] / math.sqrt(q.shape[2]), k, strict=True)
            ]
            alike = [(value[0] @ value.T)[first:].exp() for value in v]
            whole = [(q[h, 0] @ k[h].T / math.sqrt(q.shape[2])).exp().sum() for h in range(len(q))]
            alikes = [(value[0] @ value.T).exp().sum() for value in v]
            share = lambda rows, sums: sum(row / one for row, one in zip(rows, sums, strict=True))  # noqa: E731
            got, same = (part / part.sum() for part in (share(pays, whole), share(alike, alikes)))
            new, entropy = (got + same) * strength, -sum(a * math.log(a) for a in got.tolist())
        score = new if score is None else (score + new) / 2
        if (last - number) % 2:
            continue
        stay = budget
        if number < last:
            leave = (there - budget) / math.sqrt(last - number) * (1 - (entropy / math.log(there)) ** 2)
            stay = max(budget, there - round(leave))
        best = sorted(sorted(range(there), key=lambda place: -score[place].item())[:stay])
        tokens, score, real = torch.cat([tokens[:first], tokens[first:][best]]), score[best], real[best]
    return tokens[first:], numbers


SCORED = [
    *product([*SQUARE, "deepseek_vl", "llava_onevision", "llava", "llava+siglip"], ["mean"]),
    ("internvl", "cls"),
    ("llava", "cls"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "query"), SCORED)
def test_flowcut_is_its_rule_on_each_image(kind, query):
    """Two images of three keep different numbers on the way; T tokens of each enter the projector in the end."""
    model = deep_model(kind)
    vision = Adapter(model).geometry.vision
    method, inputs = parse(f"flowcut:tokens=5,query={query}"), prompt(kind, model)
    order = patches_in_order(kind, model, int(vision.has_cls))
    with visibench.prune(model, method) as session:
        given, projected = entered(model, lambda: model(**inputs))
    with torch.no_grad():
        left, numbers = zip(
            *(flow(model, own, order, 5 * vision.merged, by_mean=query == "mean") for own in given), strict=True
        )
        features = behind(model)(torch.stack(left))
    torch.testing.assert_close(projected, features.reshape(3, 5, -1), atol=1e-5, rtol=1e-5)
    counted = session.trace.tower[0, :, : vision.feature_block + 1, 0] - int(vision.has_cls)
    assert counted.tolist() == [list(own) for own in numbers]
    assert any(5 * vision.merged < count < vision.patches for own in numbers for count in own), "some left on the way"
    assert session.trace.projected.tolist() == [15]


# ---- ToMe ---------------------------------------------------------------------------------------------------------


def averages(parts, sizes, weights):
    """Of squares (4, D) place by place, by the size of each patch; those of padding, of size 0, among themselves."""
    rows = []
    for place in range(4):
        own = [size[place].item() for size in sizes]
        own = own if any(own) else weights
        rows.append(sum(w * part[place] for w, part in zip(own, parts, strict=True)) / sum(own))
    return torch.stack(rows), sum(sizes)


def merge_squares(model, tokens, order, target, real=None, *, proportional):
    """Tokens (target, 4 · D) that enter the projector of one image's ``tokens`` (t, D); ``real`` as above."""
    vision, blocks = Adapter(model).geometry.vision, blocks_of(model)
    cls, here = [tokens[:1]] if vision.has_cls else [], [*tokens[order].split(4)]
    sizes = [*(torch.ones(len(order)) if real is None else real.double()).split(4)]
    numbers = [1] * len(here)  # of squares in each
    for left, block in zip(range(len(blocks), 0, -1), blocks, strict=True):
        size = torch.cat([torch.ones(len(cls)), *sizes])
        out, _, k, _ = block.attend(torch.cat([*cls, *here]), size.log() if proportional else hidden(size > 0))
        key, first = k.mean(0), len(cls)
        parts = out[first:].split(4)
        means = [*key[:first]]
        for own, weight in zip(key[first:].split(4), sizes, strict=True):
            means.append((weight[:, None] * own).sum(0) / weight.sum() if weight.any() else own.mean(0))
        even, odd = range(0, len(means), 2), range(1, len(means), 2)
        like = {(a, b): torch.cosine_similarity(means[a], means[b], dim=0).item() for a in even for b in odd}
        edges = {a: max(odd, key=lambda b, a=a: like[a, b]) for a in even if a >= first}
        ranked = sorted(edges, key=lambda a: -like[a, edges[a]])
        share = -(-(len(here) - target) // left)
        stays = sorted(ranked[share:]) if cls else ranked[share:]
        new = []
        for place in [*stays, *odd]:
            own = [place - first, *(a - first for a in ranked[:share] if edges[a] == place)]
            weights = [numbers[p] for p in own]
            new.append((*averages([parts[p] for p in own], [sizes[p] for p in own], weights), sum(weights)))
        here, sizes, numbers = [block.mlp(part) for part, *_ in new], [size for _, size, _ in new], [n for *_, n in new]
        cls = [block.mlp(out[:1])] if cls else []
    assert sum(numbers) == vision.tokens
    return behind(model)(torch.stack(here)).flatten(1)


@pytest.mark.slow
@pytest.mark.parametrize("proportional", ["true", "false"])
@pytest.mark.parametrize("kind", SQUARE)
def test_tome_merges_squares_place_by_place(kind, proportional):
    model = deep_model(kind)
    inputs, vision = prompt(kind, model), Adapter(model).geometry.vision
    with visibench.prune(model, parse(f"tome:tokens=4,proportional={proportional}")) as session:
        given, projected = entered(model, lambda: model(**inputs))
    order = patches_in_order(kind, model, int(vision.has_cls))
    with torch.no_grad():
        own = [merge_squares(model, one, order, 4, proportional=proportional == "true") for one in given]
    torch.testing.assert_close(projected, torch.stack(own), atol=1e-5, rtol=1e-5)
    assert session.trace.visual_counts()[0].unique().tolist() == [12]
    counted = (session.trace.tower[0, 0, :, 1] - int(vision.has_cls)) // 4
    assert counted.tolist() == [14, 12, 10, 8, 6, 5, 4]


# ---- padding within a tile ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("text", ["flowcut:tokens=5,query=mean", "tome:tokens=4", "tome:tokens=5,proportional=false"])
@pytest.mark.parametrize("kind", ["smolvlm", "idefics3"])
def test_patches_of_padding_ask_and_weigh_nothing_and_hide_from_all(kind, text):
    model, method = deep_model(kind), parse(text)
    inputs, real = padded_prompt(kind, model)
    with visibench.prune(model, method):
        given, projected = entered(model, lambda: model(**inputs))
    order, own = patches_in_order(kind, model, 0), []
    with torch.no_grad():
        for one, there in zip(given, real, strict=True):
            if method.name == "flowcut":
                left, _ = flow(model, one, order, 20, there, by_mean=True)
                own.append(behind(model)(left).reshape(5, -1))
            else:
                own.append(merge_squares(model, one, order, method.tokens, there, proportional=method.proportional))
    torch.testing.assert_close(projected, torch.stack(own), atol=1e-5, rtol=1e-5)


# ---- what the engine promises of any method there -------------------------------------------------------------------


class Uneven(Method):
    """Behind the MLP of a block the patches of some images go down to 3 squares, of others to 1 or 2."""

    name, hook_points, vision_blocks, block_part = "uneven", ("tower",), (), "mlp"
    numbers = (12, 4, 8)

    def block(self, view):
        if view.block != 1:
            return None
        assert prod(view.grid) * view.vision.merged == view.counts[0]
        first, images = int(view.vision.has_cls), len(view.counts)
        return BlockCut(view.tokens[:, first:].sum(2), (self.numbers * images)[:images])


def prod(grid):
    return grid[0] * grid[1] * grid[2]


def cut_once(model, tokens, order, number):
    """One image through its own blocks, cut behind the second."""
    first = int(Adapter(model).geometry.vision.has_cls)
    for at, block in enumerate(blocks_of(model)):
        tokens = block.mlp(block.attend(tokens)[0])
        if at == 1:
            patches = tokens[order]
            best = sorted(patches.sum(1).topk(number).indices.tolist())
            tokens = torch.cat([tokens[:first], patches[best]])
    return behind(model)(tokens[first:]).reshape(number // 4, -1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SQUARE)
def test_images_that_keep_different_numbers_are_as_if_alone(kind):
    """The projector is given the squares that are left, and no more."""
    model = deep_model(kind)
    inputs, vision = prompt(kind, model), Adapter(model).geometry.vision
    method = Uneven(positions="renumber")
    with visibench.prune(model, method) as session:
        given, projected = entered(model, lambda: model(**inputs))
    order = patches_in_order(kind, model, int(vision.has_cls))
    with torch.no_grad():
        own = [cut_once(model, one, order, number) for one, number in zip(given, method.numbers, strict=True)]
    torch.testing.assert_close(projected, torch.cat(own), atol=1e-5, rtol=1e-5)
    assert session.trace.visual_counts()[0].unique().tolist() == [6]
    assert session.trace.batch_projected == 6


@pytest.mark.parametrize("kind", SQUARE)
def test_patches_that_make_no_whole_tokens_are_named(kind, monkeypatch):
    monkeypatch.setattr(Uneven, "numbers", (6, 4, 8))
    model = deep_model(kind)
    with (
        torch.no_grad(),
        visibench.prune(model, Uneven(positions="renumber")),
        pytest.raises(VisibenchError, match=r"uneven leaves \[6, 4, 8\] patches.*of which 4 make a token"),
    ):
        model(**prompt(kind, model))


@pytest.mark.parametrize("kind", [*SQUARE, "deepseek_vl"])
def test_a_plan_of_merges_is_what_runs_but_for_the_scoring(kind):
    model, method = deep_model(kind), parse("tome:tokens=5")
    loaded, visual = LoadedModel(kind, model, None, "random"), 2 * Adapter(model).geometry.vision.tokens
    plan = planned_prefill(loaded, method, 8, visual)
    with torch.no_grad(), visibench.prune(model, method) as session:
        model(**synthetic_inputs(loaded.adapter, 1, 8, visual))
    promised, ran = (flops.executed(one, loaded.geometry).components() for one in (plan, session.trace))
    assert promised | {"scoring": None} == ran | {"scoring": None}
    assert promised["vision_tower"][0] < 2 * flops.vision_tower_macs(loaded.geometry.vision)
