"""Methods of the vision side against vectors recorded through tower, projector and decoder: choices and logits.

The authors' budgets of some methods shrink with the number of images in the batch; here each image has all of it, so
that a batch of two is compared under half of it.
"""

import pytest
import torch
import visibench
from golden_llava import CLIP, check_whole, make_golden_llava, prompt, vectors, whole_prompts
from golden_support import MANIFEST
from torch.utils._python_dispatch import TorchDispatchMode
from visibench.engine import attention
from visibench.methods import BlockCut, Keep, base, hiprune, holov, pieces, scope, vscan
from visibench.models.adapters import Adapter


@pytest.fixture(scope="module")
def whole():
    return make_golden_llava(whole=True)


def wholes(name):
    return [pytest.param(*case, id=f"{name}-{case[0]}-{case[2]}") for case in whole_prompts(name)]


def configurations(name):
    """Every configuration with the groups of images that it was recorded on."""
    images = {"img0": [0], "img1": [1], "batch2": [0, 1]}
    for config, entry in MANIFEST[name]["configs"].items():
        for case in filter(images.get, entry["margins"]):
            yield pytest.param(config, entry, case, images[case], id=f"{name}-{config}-{case}")


def project(features):
    """What the recorded projector makes of features."""
    part = vectors("llava_parts")
    inner = torch.nn.functional.linear(features, part["projector.0.weight"], part["projector.0.bias"])
    return torch.nn.functional.linear(
        torch.nn.functional.gelu(inner), part["projector.2.weight"], part["projector.2.bias"]
    )


# ---- SCOPE --------------------------------------------------------------------------------------------------------


def scope_options(entry, images):
    combine = {"multi": "multiply", "add": "add"}[entry["COMBINED"]]
    return {"tokens": entry["token_num"] // len(images), "alpha": entry["ALPHA"], "combine": combine}


@pytest.mark.parametrize(("config", "entry", "case", "images"), configurations("scope"))
def test_scope_picks(config, entry, case, images):
    recorded, prefix = vectors("scope"), f"{config}.{case}"
    method = visibench.load_method("scope", **scope_options(entry, images))
    attention = torch.cat([recorded[f"cls_attention_sum.img{number}"] for number in images])
    for dtype, suffix in ((torch.float32, ""), (torch.float64, "_fp64")):
        similarity = pieces.cosine(CLIP["hidden_m2"][images, 1:].to(dtype))
        weight = attention.to(dtype) ** method.alpha
        picked = scope.covering(similarity, weight, method.tokens, add=method.combine == "add")
        assert torch.equal(picked, recorded[f"{prefix}.order{suffix}"].long())
    assert torch.equal(pieces.marked(picked, 576), recorded[f"{prefix}.kept"])


@pytest.mark.parametrize(("config", "entry", "case", "images"), wholes("scope"))
def test_scope(whole, config, entry, case, images):
    recorded, group = vectors("scope"), "batch2" if len(images) > 1 else "img0"
    method = visibench.load_method("scope", **scope_options(entry, images))
    session = check_whole(whole, method, recorded, f"{config}.{case}", images)
    assert torch.equal(session.trace.kept(0)[0], recorded[f"{config}.{group}.kept"].flatten())


# ---- HoloV --------------------------------------------------------------------------------------------------------


def entered(keep, order):
    """Int (N, n): the tokens that stay, in their order, -1 behind them where rows keep fewer."""
    number = order.masked_fill(~keep, torch.iinfo(order.dtype).max).argsort(1)[:, : keep.sum(1).max()]
    return number.masked_fill(~keep.gather(1, number), -1)


@pytest.mark.parametrize(("config", "entry", "case", "images"), configurations("holov"))
def test_holov_runs_budgets_and_order(config, entry, case, images):
    recorded, prefix, budget = vectors("holov"), f"{config}.{case}", entry["new_image_token_num"]
    index = holov.runs_of(576, entry["num_patches"])
    attention = torch.cat([recorded[f"cls_attention_mean.img{number}"] for number in images])
    tokens = project(CLIP["hidden_m2"][images, 1:])
    scores = holov.run_scores(tokens, attention, index)
    asked = holov.allocated(scores, budget)
    if len(images) == 1:
        torch.testing.assert_close(scores[0], recorded[f"{prefix}.run_score"], atol=1e-5, rtol=1e-4)
        assert torch.equal(asked[0], recorded[f"{prefix}.allocated"].long())
    keep, order = holov.taken(attention, asked, index, None)
    assert torch.equal(keep, recorded[f"{prefix}.kept"])
    assert torch.equal(padded(entered(keep, order), budget), recorded[f"{prefix}.order"].long())
    filled, order = holov.taken(attention, asked, index, budget)
    assert filled.sum(1).tolist() == [budget] * len(images)
    assert not (keep & ~filled).any()


@pytest.mark.parametrize("config", ["skewed_n64", "skewed_n128", "skewed_n192"])
def test_holov_where_a_run_gets_more_than_it_has(config):
    recorded, entry = vectors("holov"), MANIFEST["holov"]["configs"][config]
    budget, attention = entry["new_image_token_num"], recorded["skewed.attention"]
    index = holov.runs_of(576, entry["num_patches"])
    asked = holov.allocated(holov.run_scores(project(CLIP["hidden_m2"][:1, 1:]), attention, index), budget)
    assert torch.equal(asked[0], recorded[f"{config}.allocated"].long())
    got = padded(entered(*holov.taken(attention, asked, index, None)), budget)
    assert torch.equal(got, recorded[f"{config}.order"].long())
    assert (got == -1).sum() == entry["margins"]["zero_tokens"]


def padded(tokens, width):
    return torch.nn.functional.pad(tokens, (0, width - tokens.shape[1]), value=-1)


@pytest.mark.parametrize(("config", "entry", "case", "images"), wholes("holov"))
def test_holov(whole, config, entry, case, images):
    recorded, group = vectors("holov"), "batch2" if len(images) > 1 else "img0"
    options = {"tokens": entry["new_image_token_num"], "runs": entry["num_patches"], "shortfall": "zeros"}
    session = check_whole(whole, visibench.load_method("holov", **options), recorded, f"{config}.{case}", images)
    layout = session.trace.layouts[0]
    number = layout.visual_id[layout.visual.mask]  # through the whole model, with zero vectors as new tokens
    expected = recorded[f"{config}.{group}.order"].long()
    first = torch.arange(len(images))[:, None] * 576
    assert torch.equal(number, torch.where(expected < 0, -2, expected + first).flatten())


# ---- HiPrune ------------------------------------------------------------------------------------------------------


def hiprune_method(entry, images):
    """Their variable counts blocks from 1."""
    options = {"alpha": entry["HIPRUNE_ALPHA"], "middle": entry["HIPRUNE_OBJECT_LAYER"] - 1}
    return visibench.load_method("hiprune", tokens=entry["HIPRUNE_RETENTION"] // len(images), **options)


@pytest.mark.parametrize(("config", "entry", "case", "images"), configurations("hiprune"))
def test_hiprune_anchors_and_registers(config, entry, case, images):
    recorded, prefix, method = vectors("hiprune"), f"{config}.{case}", hiprune_method(entry, images)
    of = lambda block: torch.cat([recorded[f"received_{block}.img{number}"] for number in images])  # noqa: E731
    middle, deep = of(f"block{method.middle}"), of("m2")
    for row in range(len(images)):
        number = str(row) if len(images) > 1 else ""
        anchors = recorded[f"{prefix}.anchors{number}"].tolist()
        assert method.anchors(576) == len(anchors)
        assert middle[row].argsort(descending=True, stable=True)[: len(anchors)].tolist() == anchors
        near = hiprune.around(middle[row : row + 1], len(anchors), 24)[0]
        registers = recorded[f"{prefix}.registers{number}"].tolist()
        order = deep[row].masked_fill(near, -1).argsort(descending=True, stable=True)
        assert order[: method.tokens - near.sum()].tolist() == registers
        kept = near.index_fill(0, torch.tensor(registers), True)
        assert torch.equal(kept, recorded[f"{prefix}.kept"][row])


@pytest.mark.parametrize("rows", [7, 128])
def test_attention_received_in_vision_blocks(whole, rows, monkeypatch):
    """Recorded with the whole map at hand; here a few rows of queries at a time."""
    monkeypatch.setattr(attention.weights, "BLOCK", rows)
    seen = {}

    class Look(type(visibench.load_method("hiprune", tokens=64))):
        def blocks_received(self, vision):
            return -15, -8, -1

        def vision(self, view):
            seen.update({block: view.received(block) for block in (-15, -8, -1)})
            return Keep(view.present)

    with visibench.prune(whole, Look(tokens=64)) as session:
        whole(**prompt(0, 1))
    recorded = vectors("hiprune")
    for block, name in {-15: "block8", -8: "block15", -1: "m2"}.items():
        expected = torch.cat([recorded[f"received_{name}.img{number}"] for number in (0, 1)])
        torch.testing.assert_close(seen[block], expected, atol=1e-7, rtol=1e-4)
    # Scores and nothing else: 4 heads of 8, 577 queries and keys, three blocks, two images.
    assert session.trace.scoring_macs()[0, 0] == 2 * 3 * 32 * 577**2


@pytest.mark.parametrize(("config", "entry", "case", "images"), wholes("hiprune"))
def test_hiprune(whole, config, entry, case, images):
    recorded, group = vectors("hiprune"), "batch2" if len(images) > 1 else "img0"
    session = check_whole(whole, hiprune_method(entry, images), recorded, f"{config}.{case}", images)
    assert torch.equal(session.trace.kept(0)[0], recorded[f"{config}.{group}.kept"].flatten())


# ---- VScan --------------------------------------------------------------------------------------------------------


STAGE_1 = [case for case in configurations("vscan") if "visual_token_num" in case.values[1] and "_L" not in case.id]


@pytest.mark.parametrize(("config", "entry", "case", "images"), STAGE_1)
def test_vscan_chooses_and_merges(whole, config, entry, case, images):
    """On given attention, and in the whole model."""
    recorded, prefix = vectors("vscan"), f"{config}.{case}"
    method = visibench.load_method("vscan", tokens=entry["visual_token_num"], cuts=())
    expected = recorded[f"{prefix}.kept"]
    of = lambda block: torch.cat([recorded[f"cls_attention_{block}.img{number}"] for number in images])  # noqa: E731
    early, late, vision = of("block5"), of("m2"), Adapter(whole).geometry.vision
    quota, _, spread = method.split(vision.shape)
    if config != "n576":
        windows = vscan.in_windows(early, vision.shape, 6, quota)
        picked = recorded[f"{prefix}.local"].long()
        assert torch.equal(pieces.marked(picked, 576), windows)
        chosen = windows | base.top(late, torch.full((len(images),), spread), ~windows)
        assert torch.equal(chosen, expected)
    entered = []
    ids = prompt(0)["input_ids"].expand(len(images), -1)
    with visibench.prune(whole, method) as session:
        hook = whole.model.language_model.layers[0].register_forward_pre_hook(
            lambda m, args: entered.append(args[0])  # what the session makes of the layer's input
        )
        whole(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=CLIP["pixels"][images])
        hook.remove()
    trace = session.trace
    assert torch.equal(trace.kept(0), expected)
    assert trace.visual_counts()[:, 0].tolist() == entry["margins"][case]["n_kept"]
    got = trace.layouts[0].visual.pick(entered[0], 1)
    for number, features in zip(images, got, strict=True):
        if f"{config}.img{number}.features" in recorded:
            torch.testing.assert_close(features, recorded[f"{config}.img{number}.features"], atol=1e-5, rtol=1e-4)
        elif config == "n576":
            torch.testing.assert_close(features, project(CLIP["hidden_m2"][number, 1:]), atol=1e-5, rtol=1e-4)


SINGLE = [case for case in wholes("vscan") if len(case.values[3]) == 1]


@pytest.mark.parametrize(("config", "entry", "case", "images"), SINGLE)
def test_vscan(whole, config, entry, case, images):
    """Both stages. Of two images the authors never cut the second, and score the first by a row of the second."""
    recorded, prefix = vectors("vscan"), f"{config}.{case}"
    options = {"tokens": entry["visual_token_num"], "cuts": entry["layer_list"], "counts": entry["image_token_list"]}
    method = visibench.load_method("vscan", **options)
    session = check_whole(whole, method, recorded, prefix, images)
    kept = torch.cat([session.trace.kept(layer) for layer in range(32)])
    assert torch.equal(kept, recorded[f"{prefix}.kept"])
    if config in ("n96_L16_32", "n192_L16_64", "n288_L16_96"):  # the published settings, by their mean over layers
        assert session.trace.visual_counts().double().mean() == {96: 64, 192: 128, 288: 192}[method.tokens]
        short = visibench.load_method("vscan", tokens=method.tokens)
        counts = short.visual_counts(session.trace.prompt, session.geometry)
        assert torch.equal(counts, session.trace.visual_counts())


# ---- FlowCut ------------------------------------------------------------------------------------------------------


class Recorded(type(visibench.load_method("flowcut", tokens=64))):
    """Also takes the authors' pace for a batch: from each image as many leave as from the one that loses most."""

    def block(self, view):
        before, cut = view.memory, super().block(view)
        self.seen.append((before, view.memory))
        return cut and BlockCut(cut.scores, (min(cut.counts),) * len(cut.counts))


def recorded_flowcut(tokens):
    method = Recorded(tokens=tokens)
    object.__setattr__(method, "seen", [])
    return method


@pytest.mark.parametrize(("config", "entry", "case", "images"), configurations("flowcut"))
def test_flowcut_inside_the_tower(whole, config, entry, case, images):
    recorded, prefix = vectors("flowcut"), f"{config}.{case}"
    method, features = recorded_flowcut(entry["target_num"]), []
    ids = prompt(0)["input_ids"].expand(len(images), -1)
    with visibench.prune(whole, method) as session:
        projector = whole.model.multi_modal_projector
        hook = projector.register_forward_pre_hook(lambda m, args: features.append(args[0]))
        whole(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=CLIP["pixels"][images])
        hook.remove()
    trace = session.trace
    assert torch.equal(trace.kept(0), recorded[f"{prefix}.kept"])
    assert trace.visual_counts().eq(entry["target_num"]).all()
    assert trace.tower[0, 0, :, 0].tolist() == [n + 1 for n in recorded[f"{prefix}.patches_at_block_input"].tolist()]
    torch.testing.assert_close(method.seen[0][1], recorded[f"{prefix}.first_block_score"], rtol=1e-3, atol=1e-7)
    kept = recorded[f"{prefix}.kept"]
    if f"{prefix}.features" in recorded:
        torch.testing.assert_close(features[0], recorded[f"{prefix}.features"], atol=1e-4, rtol=1e-3)
    assert features[0].shape == (len(images), entry["target_num"], 32)
    assert (kept.sum(1) == entry["target_num"]).all()
    assert method.seen[22][0].shape == (len(images), entry["target_num"])


@pytest.mark.parametrize(("config", "entry", "case", "images"), wholes("flowcut"))
def test_flowcut(whole, config, entry, case, images):
    check_whole(whole, recorded_flowcut(entry["target_num"]), vectors("flowcut"), f"{config}.{case}", images)


@pytest.mark.parametrize("tokens", [192, 29])
def test_flowcut_of_a_batch_is_that_of_each_image_alone(whole, tokens):
    """Not in the authors' code, where the image that loses most sets the pace of all."""
    traces = {}
    for images in ((0,), (1,), (0, 1)):
        with visibench.prune(whole, visibench.load_method("flowcut", tokens=tokens)) as session:
            ids = prompt(0)["input_ids"].expand(len(images), -1)
            whole(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=CLIP["pixels"][[*images]])
        traces[images] = session.trace
    both = traces[0, 1]
    for image in (0, 1):
        alone = traces[image,]
        assert torch.equal(both.kept(0)[image], alone.kept(0)[0])
        assert torch.equal(both.tower[image], alone.tower[0])
        assert both.scoring_macs()[image, 0] == alone.scoring_macs()[0, 0]
    assert torch.equal(both.tower.amax(0), both.batch_tower[0])
    assert not torch.equal(both.tower[0], both.tower[1])


# ---- operations ---------------------------------------------------------------------------------------------------

VIEWS = {"_unsafe_view", "alias", "expand", "permute", "select", "slice", "split", "squeeze", "t", "transpose", "view"}


class Operations(TorchDispatchMode):
    """Counts the operations that run: on a device, about as many launches."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.__name__.split(".")[0] not in VIEWS | {"unsqueeze", "detach", "unbind"}
        return function(*args, **kwargs or {})


def operations(model, name, **options):
    with visibench.prune(model, visibench.load_method(name, **options)), Operations() as counted:
        model(**prompt(0), logits_to_keep=1)
    return counted.count


@pytest.mark.parametrize("name", ["holov", "hiprune", "v2drop", "vscan", "flowcut", "transprune"])
def test_a_prefill_takes_few_more_operations_than_the_dense_one(whole, name):
    options = {} if name in ("v2drop", "transprune") else {"tokens": 64}
    assert operations(whole, name, **options) < 1.3 * operations(whole, "none")


def test_operations_of_a_greedy_loop_are_those_of_its_picks(whole):
    one, many = (operations(whole, "scope", tokens=tokens) for tokens in (64, 128))
    assert many - one == 9 * 64
