"""What goes wrong in a method of one's own is named: the hook, what it wants, and what it got."""

import re
from pathlib import Path

import pytest
import torch
import visibench
from decoders import decoder_model, row_samples
from support import make_batch
from visibench.engine import prune
from visibench.errors import VisibenchError
from visibench.evals.settings.method_spec import describe_methods, parse
from visibench.models.adapters import Adapter

HEAD = "from visibench.methods import Forward, Keep, Method, Scored, register\n"
ANSWER = """
@register("mine", "Mine")
class Mine(Method):
    hook_points = ("{point}",)
    def begin(self, layout, geometry):
        return Answers()
class Answers(Forward):
    def {hook}:
        return {answer}
"""
SCORE = """
@register("mine", "Mine")
class Mine(Scored):
    hook_points = ("{point}",)
    def score(self, view):
        return {answer}
"""
PROJECTED = {"point": "projector", "hook": "projected(self, view)"}
LAYER = {"point": "decoder", "hook": "layer_input(self, layer, view)"}


@pytest.mark.parametrize(
    ("template", "facts", "answer", "message"),
    [
        (ANSWER, PROJECTED, "Keep(view.projected.norm(dim=2))", r"projected: Keep wants bool \(N, P\).* got float32"),
        (ANSWER, PROJECTED, "view.present", r"mine\.projected: answer with Keep\(mask\).* not a tensor bool"),
        (ANSWER, PROJECTED, "[1]", r"not a list"),
        (ANSWER, LAYER, "Keep(view.present[:, :3])", r"mine\.layer_input: Keep wants bool \(B, V\) = .*got bool"),
        (SCORE, PROJECTED, "view.projected", r"mine\.score: wants one score a token, \(N, P\) = \(\d, 16\), got"),
        (SCORE, LAYER, "view.present[:, :2].float()", r"mine\.score: wants one score a token, \(B, V\)"),
    ],
)  # fmt: skip
def test_a_wrong_answer_is_named(template, facts, answer, message, llava, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(HEAD + template.format(answer=answer, **facts))
    method = parse(f"{file}:mine:keep=0.5" if template is SCORE else f"{file}:mine")
    with pytest.raises(VisibenchError, match=message) as caught, prune(llava, method):
        llava(**make_batch([(3, 2, 1)])[0])
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_nan_scores_break_an_invariant(cli, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(HEAD + SCORE.format(point="projector", answer="view.projected.norm(dim=2) * float('nan')"))
    code, out, _ = cli("check-method", str(file))
    assert code == 1
    assert re.search(r"(\d+) of \1 scores are NaN", " ".join(out.split()))


def test_every_option_is_explained(cli):
    for told in describe_methods():
        assert [name for name, option in told["options"].items() if not option["meaning"]] == [], told["name"]
    code, out, _ = cli("methods", "sparsevlm")
    assert code == 0
    assert "the authors' nominal budget" in " ".join(out.split())
    assert "The paper instead deletes" in out  # where code and paper differ
    assert "https://arxiv.org/abs/2410.04417" in out


def test_options_of_ones_own_method_are_explained_by_the_string_below_them(cli, tmp_path):
    page = (Path(visibench.__file__).parent / "docs" / "your_method.md").read_text()
    file = tmp_path / "norm.py"
    file.write_text(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1])
    assert len(file.read_text().splitlines()) <= 20
    code, out, _ = cli("methods", f"{file}:norm")
    assert code == 0
    assert "Power of the norm." in out
    assert parse(f"{file}:norm:keep=0.5,power=2").power == 2.0


BLOCK = """
@register("mine", "Mine")
class Mine(Method):
    hook_points, vision_blocks, positions = ("tower",), (), "renumber"
    def block(self, view):
        units, patches, tokens = len(view.counts), max(view.counts), view.token_keys.shape[1]
        scores, group = view.tokens[:, -patches:, 0], torch.arange(tokens).expand(units, -1) // 2
        return {answer} if view.block == 0 else {later}
"""
ALIKE = "BlockCut(scores, (4,) * units)"
UNEVEN = "BlockCut(scores, tuple(range(4, 4 + units)))"
MERGED = "BlockMerge(group, tokens // 2 + 1)"


@pytest.mark.parametrize(
    ("answer", "later", "message"),
    [
        ("Keep(scores > 0)", "None", r"answer with BlockCut, BlockMerge or None, not a Keep$"),
        ("scores > 0", "None", r"answer with BlockCut, BlockMerge or None, not a Tensor$"),
        ("BlockCut(scores[:, 1:], (4,) * units)", "None", r"scores \(N, P\) = \(2, 16\), got float32 \(2, 15\)$"),
        ("BlockCut(scores, (17,) * units)", "None", r"a tuple of ints of 0 to \[16, 16\], got \(17, 17\)$"),
        ("BlockCut(scores, (-1,) * units)", "None", r"a tuple of ints of 0 to \[16, 16\], got \(-1, -1\)$"),
        ("BlockCut(scores, (4,) * (units + 1))", "None", r"a tuple of ints of 0 to \[16, 16\], got \(4, 4, 4\)$"),
        ("BlockCut(scores, (4.0,) * units)", "None", r"a tuple of ints of 0 to \[16, 16\], got \(4\.0, 4\.0\)$"),
        ("BlockCut(scores, torch.full((units,), 4))", "None", r"a tuple of ints .*, got tensor\(\[4, 4\]\)$"),
        ("BlockMerge(group[:, 1:], 9)", "None", r"group int64 \(N, u\) = \(2, 17\), got int64 \(2, 16\)$"),
        ("BlockMerge(group.float(), 9)", "None", r"group int64 \(N, u\) = \(2, 17\), got float32 \(2, 17\)$"),
        ("BlockMerge(group, 18)", "None", r"a count of 1 to 17, got 18$"),
        (UNEVEN, MERGED, r"of the units \[4, 5\] patches are left: where some merge, let cuts leave as many of each$"),
        (MERGED, UNEVEN, r"of the units \[4, 5\] patches are left: where some merge, let cuts leave as many of each$"),
        ("setattr(view, 'memory', scores[:, 1:])", "None", r"wants \(N, P\) = \(2, 16\), got float32 \(2, 15\)$"),
    ],
)  # fmt: skip
def test_a_wrong_answer_inside_the_tower_is_named(answer, later, message, llava, tmp_path):
    file = tmp_path / "mine.py"
    head = "import torch\nfrom visibench.engine.contract import BlockCut, BlockMerge\n"
    file.write_text(head + HEAD + BLOCK.format(answer=answer, later=later))
    with (
        pytest.raises(VisibenchError, match=f"^(mine.block: |memory of block 0).*{message}"),
        prune(llava, parse(f"{file}:mine")),
    ):
        llava(**make_batch([(3, 2, 2)])[0])


def test_nothing_leaves_behind_the_features_block(llava, tmp_path):
    """LLaVA's features are those of the last block but one."""
    file = tmp_path / "mine.py"
    last = Adapter(llava).geometry.vision.layers - 1
    head = "import torch\nfrom visibench.engine.contract import BlockCut, BlockMerge\n"
    file.write_text(head + HEAD + BLOCK.format(answer="None", later=f"{ALIKE} if view.block == {last} else None"))
    message = rf"^mine.block: the model uses what block {last - 1} puts out, and block {last} comes behind it"
    with pytest.raises(VisibenchError, match=message), prune(llava, parse(f"{file}:mine")):
        llava(**make_batch([(3, 2, 2)])[0])


def test_nan_in_the_tower_is_named():
    sample = {**row_samples("qwen2_5_vl")[0]}
    sample["pixel_values"] = sample["pixel_values"].index_fill(0, torch.tensor(0), torch.nan)
    told = pytest.raises(VisibenchError, match=r"^what the method reads of vision block 0 is NaN")
    model = decoder_model("qwen2_5_vl", "sdpa")
    with told, prune(model, parse("flowcut:keep=0.25,query=mean")):
        model(**sample)


def test_patches_that_are_cut_once_some_merged_are_none_of_the_image(llava, tmp_path):
    file = tmp_path / "mine.py"
    head = "import torch\nfrom visibench.engine.contract import BlockCut, BlockMerge\n"
    file.write_text(head + HEAD + BLOCK.format(answer=MERGED, later=ALIKE + " if view.block == 1 else None"))
    with prune(llava, parse(f"{file}:mine")) as session:
        llava(**make_batch([(3, 2, 2)])[0])
    assert not session.trace.kept(0).any()
    assert session.trace.visual_counts()[:, 0].tolist() == [8]
