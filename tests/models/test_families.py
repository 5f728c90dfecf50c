"""What `visibench models --matrix` says of each family, and that it says what pruning does."""

import inspect
import json
import re
from pathlib import Path

import pytest
import visibench
from decoders import CONFIGS, decoder_model
from visibench.errors import VisibenchError
from visibench.evals.invariants.families import FamilyVerdict, alike, families, markdown, matrix, overview, verdicts
from visibench.models.adapters import FAMILIES, Adapter

DECODER = ["none", "random", "fastv", "pyramiddrop", "sparsevlm", "dart", "vtw", "staged", "visipruner"]


def test_every_family_of_images_has_its_line_of_test():
    assert set(families()) == {kind.partition("+")[0] for kind in CONFIGS}
    assert all(FAMILIES[kind].images is not None for kind in families())


@pytest.mark.parametrize(
    "kind", ["qwen3_vl", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("llava", "gemma3"))]
)
def test_holes_are_what_pruning_refuses(kind):
    found = {name: verdict.reason for name, verdict in verdicts(kind).items()}
    assert set(found) == set(visibench.list_methods())
    assert {found[name] for name in DECODER} == {""}
    for name, reason in found.items():
        if reason:
            with pytest.raises(VisibenchError, match=re.escape(reason)):
                visibench.prune(decoder_model(kind), visibench.load_method(name, tokens=2))


@pytest.mark.slow
@pytest.mark.parametrize("kind", families())
def test_methods_of_the_decoder_run_on_every_family(kind):
    found = verdicts(kind)
    assert {name: found[name] for name in DECODER} == dict.fromkeys(DECODER, FamilyVerdict())


@pytest.mark.slow
def test_the_command_prints_the_matrix(cli):
    code, out, _ = cli("models", "--matrix", "--json")
    assert code == 0
    assert set(json.loads(out)) == {*families()}
    assert json.loads(out)["qwen2_5_vl"]["fastervlm"] == {"reason": "", "given": "attention=received"}
    assert "llama4" in cli("models", "--matrix")[1]


@pytest.mark.slow
def test_what_is_alike_stands_together_and_nothing_is_lost():
    found = {kind: verdicts(kind) for kind in ("llava", "vipllava", "qwen2_5_vl")}
    groups, rows, reasons = alike(found)
    assert groups == {"A": ["llava", "vipllava"], "B": ["qwen2_5_vl"]}
    marks = {name: dict(zip(groups, marks, strict=True)) for names, marks in rows for name in names}
    said = {(name, letter): reason for names, letters, reason in reasons for name in names for letter in letters}
    for letter, kinds in groups.items():
        for kind in kinds:
            for name, verdict in found[kind].items():
                assert marks[name][letter] == ("-" if verdict.reason else "o" if verdict.given else "+")
                why = verdict.reason.replace("'qwen2_5_vl'", "this family")
                assert said.get((name, letter), "") == (why or f"with {verdict.given}" if why or verdict.given else "")


@pytest.mark.slow
def test_the_list_of_models_shows_the_matrix_in_80_columns(cli):
    _, out, _ = cli("models")
    shown = out.partition("Which methods run")[2].splitlines()
    table = [line for line in shown if line.endswith(("+", "-", " o"))]
    assert len(table) == len(alike().rows)
    assert max(map(len, table)) <= 80


@pytest.mark.slow
def test_the_page_and_the_readme_hold_what_the_refusing_code_says():
    root, found = Path(visibench.__file__).parent, matrix()
    assert markdown(found) in (root / "docs" / "families.md").read_text()
    assert overview(found) in (root / "README.md").read_text()


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if "+" not in kind])
def test_a_family_says_whether_features_are_added_behind_early_layers(kind):
    adds = "deepstack_visual_embeds" in inspect.signature(Adapter(decoder_model(kind)).decoder.forward).parameters
    assert FAMILIES[kind].deepstack == adds


def test_an_option_that_a_method_runs_with_is_named():
    found = verdicts("qwen2_5_vl")["vispruner"]
    model = decoder_model("qwen2_5_vl")
    with pytest.raises(VisibenchError, match="attention='received'"):
        visibench.prune(model, visibench.load_method("vispruner", keep=0.5))
    assert found == FamilyVerdict(given="attention=received")
