"""What goes wrong in a method of one's own is named: the hook, what it wants, and what it got."""

import re
from pathlib import Path

import pytest
import visibench
from support import make_batch
from visibench.engine import prune
from visibench.errors import VisibenchError
from visibench.evals.settings.method_spec import describe_methods, parse

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
