"""Vision-side methods against vectors recorded from their authors' code: same patches, same merged features."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import visibench
from golden_llava import CLIP, IMAGE, make_golden_llava, vectors
from golden_support import MANIFEST
from visibench.engine.decisions import merged
from visibench.methods import Forward, Keep, Method, cdpruner, divprune, pieces, tome, vispruner


def configurations(name):
    return [pytest.param(config, entry, id=f"{name}-{config}") for config, entry in MANIFEST[name]["configs"].items()]


@pytest.fixture(scope="module")
def golden_llava():
    return make_golden_llava()


@pytest.fixture(scope="module")
def golden_llava_fp64():
    return make_golden_llava(torch.float64)


def run(model, method, pixels):
    """Features that reach the projector, and the trace, of one prompt an image."""
    ids = torch.tensor([[1, 2, 3, *[IMAGE] * 576, 4, 5]]).expand(len(pixels), -1)
    features = []
    with visibench.prune(model, method) as session:
        hook = model.model.multi_modal_projector.register_forward_pre_hook(
            lambda module, args: features.append(args[0])
        )
        model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels.to(model.dtype))
        hook.remove()
    return features[0], session.trace


def test_the_recorded_tower_is_reproduced(golden_llava):
    features, _ = run(golden_llava, visibench.load_method("none"), CLIP["pixels"])
    torch.testing.assert_close(features, CLIP["hidden_m2"][:, 1:], atol=1e-5, rtol=1e-5)


# ---- DivPrune -----------------------------------------------------------------------------------------------------


class Projected(Forward):
    """DivPrune on embeddings that are given: what a projector would have put out."""

    def __init__(self, count):
        self.count = count

    def layer_input(self, layer, view):
        if layer > 0:
            return None
        picked = divprune.farthest(1 - pieces.cosine(view.hidden), self.count)
        return Keep(pieces.marked(picked, view.present.shape[1]))


class AtTheDecoder(Method):
    name, hook_points = "divprune at the decoder", ("decoder",)

    def __init__(self, count):
        super().__init__(positions="renumber")
        object.__setattr__(self, "count", count)

    def begin(self, layout, geometry):
        return Projected(self.count)


@pytest.mark.parametrize(("config", "entry"), configurations("divprune"))
def test_divprune(golden_llama, golden_inputs, config, entry):
    recorded, case = vectors("divprune"), config.split(".")[0]
    sequence = golden_inputs.get(f"inputs_embeds_{case}")
    features = recorded[f"{case}.features"][None] if sequence is None else sequence.reshape(1, -1, 32)[:, 35:611]
    method = visibench.load_method("divprune", tokens=entry["n_keep"])
    for dtype, suffix in ((torch.float32, ""), (torch.float64, "_fp64")):
        picked = divprune.farthest(1 - pieces.cosine(features.to(dtype)), pieces.per_image(method, 576))
        assert torch.equal(picked[0], recorded[f"{config}.order{suffix}"])
    mask = pieces.marked(picked, 576)
    assert torch.equal(mask[0].nonzero().flatten(), recorded[f"{config}.kept"])
    if sequence is None:
        return
    layout = visibench.TokenLayout.from_spans(35 + 576 + int(case[1:]), visual=[(35, 611)])
    with visibench.prune(golden_llama, AtTheDecoder(entry["n_keep"]), layout=layout) as session:
        out = golden_llama(inputs_embeds=sequence.reshape(1, -1, 32), use_cache=True)
        assert torch.equal(session.trace.kept(0), mask)
        if f"{config}.text_logits" not in recorded:
            return
        text = recorded[f"{config}.text_logits"]
        torch.testing.assert_close(out.logits[0, -len(text) :], text, atol=1e-4, rtol=0)
        for token, logits in zip(
            golden_inputs["forced_ids"].flatten(), recorded[f"{config}.decode_logits"], strict=True
        ):
            step = golden_llama(input_ids=token.view(1, 1), past_key_values=out.past_key_values, use_cache=True)
            torch.testing.assert_close(step.logits[0, -1], logits, atol=1e-4, rtol=0)


# ---- FasterVLM ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "entry"), configurations("fastervlm"))
def test_fastervlm(golden_llava, config, entry):
    recorded = vectors("fastervlm")
    features, trace = run(
        golden_llava, visibench.load_method("fastervlm", tokens=entry["visual_token_num"]), CLIP["pixels"]
    )
    kept = recorded[f"{config}.kept"]
    assert torch.equal(trace.kept(0), kept)
    assert torch.equal(recorded[f"{config}.kept_fp64"], kept)
    torch.testing.assert_close(
        features, pieces.pick(CLIP["hidden_m2"][:, 1:], pieces.columns(kept, entry["visual_token_num"]))
    )
    assert trace.visual_counts().tolist() == [[entry["visual_token_num"]] * 2] * 2


# ---- HiRED --------------------------------------------------------------------------------------------------------


def tiles_of_two():
    """Seven images, from those recorded."""
    a, b = CLIP["pixels"]
    return torch.stack([a, b, a.flip(2), b.flip(1), a.flip(1), b.flip(2), b.transpose(1, 2)])


class Tiles:
    """Whole images and their tiles, one image behind the other, by the attention maps of the recorded tower."""

    def __init__(self, tower, counts):
        before = tower.config._attn_implementation
        tower.set_attn_implementation("eager")
        maps = tower(tiles_of_two()[: sum(counts)], output_attentions=True).attentions
        tower.set_attn_implementation(before)
        self.cls_weights = lambda block=-1: maps[23 + block][:, :, 0, 1:]
        self.present = torch.ones(sum(counts), 576, dtype=torch.bool)
        self.parts = [(image, part) for image, count in enumerate(counts) for part in range(count)]
        self.vision = SimpleNamespace(feature_block=22)


@pytest.mark.parametrize(("config", "entry"), configurations("hired"))
def test_hired(golden_llava, config, entry):
    kept = vectors("hired")[f"{config}.kept"]
    method = visibench.load_method("hired", keep=entry["token_budget_rate"], alpha=entry.get("alpha", 0.5))
    if "num_patches" in entry:
        assert torch.equal(method.vision(Tiles(golden_llava.model.vision_tower, entry["num_patches"])).mask, kept)
    else:
        _, trace = run(golden_llava, method, CLIP["pixels"][:1])
        assert torch.equal(trace.kept(0)[0], kept)


# ---- VisionZip ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "entry"), configurations("visionzip"))
def test_visionzip(golden_llava, config, entry):
    recorded, tokens = vectors("visionzip"), entry["dominant"] + entry["contextual"]
    method = visibench.load_method("visionzip", tokens=tokens)
    if tokens == 221:  # the only one that is not of the authors' splits
        method = visibench.load_method("visionzip", tokens=tokens, contextual=30)
    assert method.split(576) == (entry["dominant"], entry["contextual"])
    features, trace = run(golden_llava, method, CLIP["pixels"])
    patches = entry["dominant"] - 1
    # The engine places CLS and contextual tokens at the cut: before it they stand behind the patches.
    order = torch.cat([torch.tensor([patches]), torch.arange(patches), torch.arange(patches + 1, tokens)])
    torch.testing.assert_close(features[:, order], recorded[f"{config}.features"], atol=1e-5, rtol=1e-5)
    assert torch.equal(pieces.columns(trace.kept(0), patches), recorded[f"{config}.dominant_patches"])
    ids = trace.layouts[0].visual_id[:, 3:-2]
    assert torch.equal(ids[:, 1 : 1 + patches], recorded[f"{config}.dominant_patches"])
    assert (ids[:, 0] == -2).all()
    assert (ids[:, 1 + patches :] == -2).all()


# ---- VisPruner ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "entry"), configurations("vispruner"))
def test_vispruner(golden_llava, config, entry):
    recorded, tokens = vectors("vispruner"), entry["visual_token_num"]
    method = visibench.load_method("vispruner", tokens=tokens, important=entry["important_ratio"])
    features, attention = CLIP["hidden_m2"][:, 1:].double(), CLIP["cls_attention_m2"].double().mean(1)
    important = entry["n_important"]
    kept = vispruner.select(attention, pieces.cosine(features), important, tokens - important, method.drop)
    assert torch.equal(kept, recorded[f"{config}.kept_fp64"])
    features, trace = run(golden_llava, method, CLIP["pixels"])
    assert trace.visual_counts().tolist() == [[tokens] * 2] * 2
    gap = entry["margins"]["similarity_order_abs_gap_fp64"]
    if gap is None or gap > 5e-7:  # else another version's rounding in the tower reorders the list
        assert torch.equal(trace.kept(0), recorded[f"{config}.kept"])


# ---- PruMerge -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "entry"), configurations("prumerge"))
def test_prumerge(golden_llava, golden_llava_fp64, config, entry):
    recorded, exact = vectors("prumerge"), config.startswith("fp64.")
    kind, image = config.removeprefix("fp64.").split(".")
    name = "prumerge_plus" if kind.startswith("plus") else "prumerge"
    budget = {} if "adaptive" in kind else {"tokens": entry["n_out"]}
    model = golden_llava_fp64 if exact else golden_llava
    number = int(image[-1])
    features, trace = run(model, visibench.load_method(name, **budget), CLIP["pixels"][number : number + 1])
    assert trace.visual_counts().tolist() == [[entry["n_out"]] * 2]
    assert torch.equal(trace.kept(0)[0].nonzero().flatten(), recorded[f"{config}.index_order"].sort().values)
    if exact:
        torch.testing.assert_close(features.float(), recorded[f"{config}.features"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("number", [0, 1])
def test_prumerge_attention(golden_llava, number):
    seen = []

    class Look(type(visibench.load_method("prumerge"))):
        def vision(self, view):
            seen.append(view.cls_weights(0, single_head=True).squeeze(1))

    run(golden_llava, Look(), CLIP["pixels"][number : number + 1])
    torch.testing.assert_close(seen[0], vectors("prumerge")[f"cls_attention.img{number}"], atol=1e-6, rtol=1e-4)


# ---- CDPruner -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "entry"), configurations("cdpruner"))
def test_cdpruner(config, entry):
    recorded, images = vectors("cdpruner"), entry["batch"]
    first = recorded["features0"].float()
    features = torch.stack([first, first.flip(0) * 1.5])[:images]
    raw = cdpruner.relevance(recorded["image_embeds"][:images], recorded["text_embeds"][: entry["n_texts"]])
    # The authors scale over the whole batch: one row of all images.
    weight = cdpruner.scaled(raw.reshape(1, -1)).view_as(raw)
    kernel = cdpruner.conditioned(pieces.cosine(features), weight)
    picked = cdpruner.most_likely(kernel, entry["visual_token_num"])
    assert torch.equal(pieces.marked(picked, 576), recorded[f"{config}.kept"])
    if images == 1:
        assert torch.equal(cdpruner.scaled(raw), weight)


# ---- ToMe ---------------------------------------------------------------------------------------------------------

MERGES = [p for p in configurations("tome") if p.values[0].startswith("merge")]
TRANSFORMERS = [p for p in configurations("tome") if p.values[0].startswith("vit")]


@pytest.mark.parametrize(("config", "entry"), MERGES)
def test_tome_on_given_tensors(config, entry):
    recorded, (case, _) = vectors("tome"), config.rsplit(".", 1)
    group = tome.matched(recorded[f"{case}.metric"], entry["r"], first_stays=entry["class_token"])
    assert torch.equal(group, recorded[f"{config}.group_of"].long())
    tokens, size = recorded[f"{case}.x"], recorded[f"{case}.size"][..., 0]
    for suffix, sizes in (("out", size), ("out_unit", torch.ones_like(size))):
        out, total = merged(tokens, sizes, group, entry["n_out"])
        torch.testing.assert_close(out, recorded[f"{config}.{suffix}"], atol=1e-5, rtol=1e-5)
        expected = recorded[f"{config}.{suffix.replace('out', 'size') if 'unit' in suffix else 'size_out'}"]
        torch.testing.assert_close(total, expected[..., 0])


@pytest.mark.parametrize(("config", "entry"), TRANSFORMERS)
def test_tome_in_a_vision_transformer(config, entry):
    """timm's block order, written out: attention, merge, MLP."""
    recorded = vectors("tome")
    weight = {k.removeprefix("vit.weight."): v for k, v in recorded.items() if k.startswith("vit.weight.")}
    linear = lambda x, name: F.linear(x, weight[f"{name}.weight"], weight[f"{name}.bias"])  # noqa: E731
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], weight[f"{name}.weight"], weight[f"{name}.bias"], 1e-6)  # noqa: E731
    patches = F.conv2d(recorded["vit.pixels"], weight["patch_embed.proj.weight"], weight["patch_embed.proj.bias"], 4)
    x = torch.cat([weight["cls_token"].expand(2, -1, -1), patches.flatten(2).mT], dim=1) + weight["pos_embed"]
    size, group = torch.ones(x.shape[:2]), torch.arange(x.shape[1]).expand(2, -1)
    for block, merges in enumerate(entry["r_list"]):
        qkv = linear(norm(x, f"blocks.{block}.norm1"), f"blocks.{block}.attn.qkv")
        q, k, v = qkv.unflatten(2, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        logits = q @ k.mT / 8**0.5 + (size.log()[:, None, None] if entry["prop_attn"] else 0)
        attended = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + linear(attended, f"blocks.{block}.attn.proj")
        if merges:
            into = tome.matched(k.mean(1), merges, first_stays=True)
            x, size = merged(x, size, into, x.shape[1] - merges)
            group = into.gather(1, group)
        x = x + linear(
            F.gelu(linear(norm(x, f"blocks.{block}.norm2"), f"blocks.{block}.mlp.fc1")), f"blocks.{block}.mlp.fc2"
        )
        assert x.shape[1] == entry["tokens_per_block"][block]
    assert torch.equal(group, recorded[f"{config}.group_of"].long())
    torch.testing.assert_close(size, recorded[f"{config}.size"][..., 0])
    torch.testing.assert_close(x, recorded[f"{config}.last_block"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        linear(norm(x, "norm")[:, 0], "head"), recorded[f"{config}.logits"], atol=1e-4, rtol=1e-4
    )
