"""Named settings of methods: those of the package, and files."""

import pytest
import visibench
import yaml
from visibench.errors import DataError, OptionError, UnknownNameError
from visibench.evals.settings import presets
from visibench.evals.settings.config import variants
from visibench.evals.settings.method_spec import MethodSpec, describe_methods, name_of, parse
from visibench.evals.sweeps.config import parse_config
from visibench.models import load_model
from visibench.models.load import fingerprint

PACKAGED = [f"{method}@{name}" for method in visibench.list_methods() for name in presets.names(method)]
T = {
    "vscan@published-64": 64,
    "vscan@published-128": 128,
    "vscan@published-192": 192,
    "v2drop@published": 202.8,
    "transprune@published": 236.25,
}
"""Visual tokens in the mean over the layers of LLaVA-1.5, as published."""


@pytest.fixture(scope="module")
def published():
    return load_model("llava-1.5-7b", weights="meta").geometry


def write(folder, name="mine.yaml", **content):
    file = folder / name
    facts = {"method": "fastv", "options": {"layer": 2, "keep": 0.5}, "source": "here"}
    file.write_text(yaml.safe_dump(facts | content))
    return file


@pytest.mark.parametrize("text", PACKAGED)
def test_presets_of_the_package_build_and_say_where_they_are_from(text):
    assert str(parse(text)) == str(parse(str(parse(text))))
    folder = {file.parent.name for file in presets.FOLDER.rglob("*.yaml")}
    assert folder <= set(visibench.list_methods())
    assert text in next(one["presets"] for one in describe_methods() if one["name"] == name_of(text))


@pytest.mark.parametrize("text", T)
def test_published_presets_keep_the_published_number_of_tokens(published, text):
    method = parse(text)
    method.check(published)
    layout = visibench.TokenLayout.from_spans(640, visual=[(35, 611)])
    counts = method.visual_counts(layout, published)
    assert counts.double().mean().item() == pytest.approx(T[text], abs=0.02)


def test_written_options_replace_those_of_the_preset():
    assert parse("vscan@published-64:window=4") == parse("vscan:tokens=96,cuts=16,counts=32,window=4")
    assert parse("vscan@published-64:cuts=12").cuts == (12,)


def test_files_and_entries_of_configurations(tmp_path):
    file = write(tmp_path)
    entries = [f"fastv@{file}", {"name": f"fastv@{file}", "label": "mine", "grid": {"keep": [0.25, 0.75]}}]
    config = parse_config({"model": "tiny", "tasks": ["gqa"], "methods": entries}, "test.yaml")
    labels = [variant.label for variant in variants(config)]
    assert labels == ["none", "fastv:keep=0.5", "mine keep=0.25", "mine keep=0.75"]
    assert name_of(f"fastv@{file}:keep=0.25") == "fastv"


def test_methods_in_files_have_presets_too(tmp_path):
    code = tmp_path / "a@b.py"
    code.write_text(
        "from visibench.methods import Scored, register\n"
        "@register('early', 'Early')\n"
        "class Early(Scored):\n"
        "    hook_points = ('projector',)\n"
        "    def score(self, view): return view.present.float()\n"
    )
    file = write(tmp_path, method="early", options={"tokens": 3})
    for reference in (f"{code}:early@{file}", f"{code}@{file}"):
        assert MethodSpec.parse(f"{reference}:tokens=4").build().tokens == 4
        assert parse(reference).tokens == 3


@pytest.mark.parametrize(
    ("reference", "error", "message"),
    [
        ("vscan@published-65", UnknownNameError, "did you mean 'published-64'"),
        ("dart@nothing", UnknownNameError, "the package has none of dart"),
        ("fastvv@nothing", UnknownNameError, "did you mean 'fastv'"),
        ("dart@nothing.yaml", DataError, "no file nothing.yaml"),
        ("vtw@{mine}", OptionError, "is a preset of fastv: write fastv@"),
        ("fastv@{typo}", OptionError, "is no preset: sources: extra inputs"),
        ("fastv@{list}", OptionError, "expected a mapping with method, options and source"),
        ("fastv@{twice}", DataError, "stands twice"),
        ("fastv@{option}", OptionError, "unknown option 'lair'; did you mean 'layer'"),
    ],
)
def test_unusable_presets(tmp_path, reference, error, message):
    write(tmp_path)
    write(tmp_path, "typo.yaml", sources="here")
    write(tmp_path, "option.yaml", options={"lair": 2})
    (tmp_path / "list.yaml").write_text("- fastv\n")
    (tmp_path / "twice.yaml").write_text("method: fastv\nmethod: vtw\n")
    files = {name: tmp_path / f"{name}.yaml" for name in ("mine", "typo", "list", "twice", "option")}
    with pytest.raises(error, match=message) as caught:
        parse(reference.format(**files))
    assert "\n" not in str(caught.value)


def test_a_preset_of_another_model_says_so_once(tmp_path, capsys):
    tiny = fingerprint("tiny")
    preset = presets.Preset(
        method="fastv",
        options={"keep": 0.5},
        source="measured",
        model=presets.PresetModel(name="tiny", checkpoint=tiny),
        evidence={"questions": 10},
    )
    preset.write(tmp_path / "own.yaml")
    assert presets.load("fastv", str(tmp_path / "own.yaml")) == preset
    other = preset.model_copy(update={"model": presets.PresetModel(name="tiny", checkpoint="0123456789abcdef")})
    other.write(tmp_path / "other.yaml")
    parse(f"fastv@{tmp_path}/own.yaml", "tiny")
    assert capsys.readouterr().err == ""
    for name, model in (("own", "owner/name"), ("other", "tiny")):
        for _ in range(2):
            parse(f"fastv@{tmp_path}/{name}.yaml", model)
        told = capsys.readouterr().err
        assert told == f"fastv@{tmp_path}/{name}.yaml was found on tiny, not on {model}: see its evidence\n"
