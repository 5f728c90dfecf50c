"""Hyperparameters, registry, and the pieces that methods share."""

import pytest
import torch
import visibench
from visibench.errors import OptionError, UnknownNameError, VisibenchError
from visibench.methods import Forward, Method, register, top
from visibench.methods.random import draw


def test_registry_lists_methods_with_their_facts():
    methods = visibench.list_methods()
    assert {"none", "random", "fastv", "visipruner"} <= set(methods)
    for name, cls in methods.items():
        assert cls.name == name
        assert cls.title
        assert cls.__doc__
    assert methods["visipruner"].adaptive
    assert methods["fastv"].paper == "2403.06764"


def test_unknown_method_suggests_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean 'fastv'"):
        visibench.load_method("fast_v")


def test_duplicate_names_raise():
    with pytest.raises(VisibenchError, match="registered twice"):

        @register
        class Copy(Method):
            name = "fastv"
            title = "not FastV"

            def begin(self, layout, geometry):
                return Forward()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fastv", {}, "exactly one of keep"),
        ("fastv", {"keep": 0.5, "tokens": 3}, "exactly one of keep"),
        ("fastv", {"ratio": 0.5}, "unknown option 'ratio'"),
        ("fastv", {"kep": 0.5}, "did you mean 'keep'"),
        ("fastv", {"keep": 1.5}, r"\[0, 1\]"),
        ("fastv", {"tokens": -1}, ">= 0"),
        ("fastv", {"keep": 0.5, "layer": 0}, "random:layer=0"),
        ("fastv", {"keep": 0.5, "positions": "shuffle"}, "'keep' or 'renumber'"),
        ("random", {"keep": 0.5, "layer": -1}, "layer must be"),
        ("none", {"keep": 0.5}, "unknown option"),
        ("visipruner", {"stages": ["shallow", "deep"]}, "does nothing without 'middle'"),
        ("visipruner", {"stages": ["shalow"]}, "unknown stages"),
        ("visipruner", {"stages": ["middle"], "skip": True}, "no effect without stage 'shallow'"),
        ("visipruner", {"stages": ["shallow"], "token_threshold": 0.1}, "no effect without stage 'middle'"),
        ("visipruner", {"stages": ["middle"], "exit_layers": 3}, "no effect without stage 'deep'"),
        ("visipruner", {"layer0": "70b"}, "'7b' or '13b'"),
        ("visipruner", {"layer0": "13b", "sink": 3}, "moves no mass"),
        ("visipruner", {"layer_threshold": 2.0}, "cosine"),
        ("visipruner", {"shallow_layers": 0}, ">= 1"),
    ],
)
def test_bad_options_raise_one_line_that_names_the_method(name, options, message):
    with pytest.raises(OptionError, match=message) as caught:
        visibench.load_method(name, **options)
    assert str(caught.value).startswith(f"{name}: ")
    assert "\n" not in str(caught.value)


def test_methods_print_as_they_are_written():
    assert str(visibench.load_method("fastv", keep=0.5)) == "fastv:keep=0.5"
    assert str(visibench.load_method("visipruner")) == "visipruner"
    assert visibench.load_method("visipruner", stages=["middle"]).hyperparameters()["stages"] == ["middle"]


def test_top_keeps_order_breaks_ties_by_position_and_respects_padding():
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0], [5.0, 5.0, 9.0, 9.0]])
    present = torch.tensor([[True] * 4, [True, True, False, False]])
    kept = top(scores, torch.tensor([2, 1]), present)
    assert kept.tolist() == [[False, True, True, False], [True, False, False, False]]
    assert top(scores, torch.tensor([9, 9]), present).tolist() == present.tolist()
    assert not top(scores, torch.tensor([0, 0]), present).any()


@pytest.mark.parametrize(
    ("keep", "count", "kept"), [(0.5, 576, 288), (0.1, 576, 57), (0.29, 100, 29), (1 / 3, 144, 48), (0, 7, 0)]
)
def test_fractions_of_the_budget_are_floored(keep, count, kept):
    assert visibench.load_method("fastv", keep=keep).budget(torch.tensor([count])).tolist() == [kept]


def test_random_numbers_are_splitmix64():
    """First outputs of the reference generator (Steele, Lea and Flood 2014) from state 1234567."""

    def reference(state):
        mask = 2**64 - 1
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return z ^ (z >> 31)

    assert reference((1234567 + 0x9E3779B97F4A7C15) % 2**64) == 6457827717110365317
    expected = [(reference((reference(7) + k * 0x9E3779B97F4A7C15) % 2**64) >> 11) / 2**53 for k in range(1, 6)]
    assert draw(torch.tensor([7]), 5)[0].tolist() == expected


def test_random_numbers_are_uniform():
    numbers = draw(torch.arange(200), 500)
    histogram = torch.histc(numbers.flatten(), bins=20, min=0, max=1)
    chi_squared = ((histogram - 5000) ** 2 / 5000).sum()
    assert chi_squared < 43.8  # 99.9 % quantile with 19 degrees of freedom
    assert torch.corrcoef(numbers)[0, 1:].abs().mean() < 0.06
