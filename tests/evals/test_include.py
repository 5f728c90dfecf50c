"""Configurations that include others, values set on the command line, and parts of sweeps."""

from pathlib import Path

import pytest
import yaml
from visibench.errors import DataError, OptionError
from visibench.evals.settings.config import variants
from visibench.evals.sweeps.cells import cell_specs
from visibench.evals.sweeps.config import load_config, parse_config, select

COMMANDS = Path(__file__).parents[2] / "commands"


def write(folder: Path, **files: dict) -> None:
    for name, content in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))


def labels(config) -> list[str]:
    return [variant.label for variant in variants(config)]


# ---- include ------------------------------------------------------------------------------------------------------


def test_later_keys_win_whole_and_add_appends(tmp_path):
    base = {"model": "tiny", "tasks": ["gqa", "mme"], "methods": ["vtw"], "limit": {"gqa": 5, "mme": 6}}
    (tmp_path / "inner").mkdir()
    write(tmp_path / "inner", base=base, more={"batch_size": 3, "limit": {"mme": 2}})
    write(
        tmp_path,
        outer={
            "include": ["inner/base.yaml", "inner/more.yaml"],
            "batch_size": 4,
            "add": {"methods": ["fastv:keep=0.5"]},
        },
    )
    config, name = load_config(str(tmp_path / "outer.yaml"))
    assert name == "outer"
    assert (config.tasks, config.limit, config.batch_size) == (["gqa", "mme"], {"mme": 2}, 4)
    assert labels(config) == ["none", "vtw", "fastv:keep=0.5"]


def test_an_include_is_found_beside_the_file_before_the_package(tmp_path):
    write(tmp_path, quick={"model": "mine", "tasks": ["gqa"], "methods": ["none"]}, a={"include": "quick.yaml"})
    assert load_config(str(tmp_path / "a.yaml"))[0].model == "mine"
    write(tmp_path, b={"include": "quick", "tasks": ["gqa"]})
    config, _ = load_config(str(tmp_path / "b.yaml"))
    assert (config.model, config.tasks) == ("tiny", ["gqa"])
    assert config.methods == load_config("quick")[0].methods


def test_model_and_models_replace_each_other(tmp_path):
    write(tmp_path, one={"model": "tiny", "tasks": ["gqa"], "methods": ["none"]})
    write(tmp_path, two={"include": "one.yaml", "models": ["tiny", "a/b"]})
    assert load_config(str(tmp_path / "two.yaml"))[0].models == ["tiny", "a/b"]
    config, _ = load_config(str(tmp_path / "two.yaml"), ["model=c/d"])
    assert (config.model, config.models) == ("c/d", [])


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        (
            {"a": {"include": "b.yaml"}, "b": {"include": ["a.yaml"]}},
            OptionError,
            "itself.*a.yaml.*b.yaml",
        ),
        ({"a": {"include": "a.yaml"}}, OptionError, "cannot include itself"),
        ({"a": {"include": "gone.yaml"}}, DataError, "a.yaml: include: no configuration 'gone.yaml'"),
        ({"a": {"include": "quik"}}, DataError, "did you mean 'quick'"),
        ({"a": {"include": {"quick": 1}}}, OptionError, "by path or name"),
        ({"a": {"include": "quick", "add": {"methods": "vtw"}}}, OptionError, "add.methods: only lists"),
        ({"a": {"include": "quick", "add": {"limit": [3]}}}, OptionError, "add.limit: only lists"),
        ({"a": {"include": "quick", "add": ["vtw"]}}, OptionError, "expected lists to append"),
        ({"a": {"include": "quick", "add": {"method": ["vtw"]}}}, OptionError, "did you mean 'methods'"),
    ],
)
def test_unusable_includes(tmp_path, files, error, message):
    write(tmp_path, **files)
    with pytest.raises(error, match=message) as caught:
        load_config(str(tmp_path / "a.yaml"))
    assert "\n" not in str(caught.value)


# ---- --set --------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path) -> str:
    methods = [
        "vtw:layers=scaled",
        {"name": "fastv", "layer": 2, "grid": {"keep": [0.5, 0.25]}},
        {"name": "fastv", "label": "F 1.5", "keep": 0.1},
        {"name": "random", "keep": 0.5},
    ]
    write(tmp_path, my={"model": "tiny", "tasks": ["gqa", "pope"], "methods": methods, "limit": 7})
    return str(tmp_path / "my.yaml")


def test_values_are_yaml_and_win_over_the_file(file):
    config, _ = load_config(file, ["timing.repeats=5", "seeds=[1, 2]", "limit=30", "dtype=float32"])
    assert (config.limit, config.timing.repeats, config.timing.warmup) == (30, 5, 3)
    assert (config.seeds, config.dtype) == ([1, 2], "float32")
    assert load_config(file, ["timing=null"])[0].timing is None
    assert load_config(file, ["limit=null"])[0].limit is None
    (visipruner,) = variants(load_config(file, ["methods=[{name: visipruner, forced: true}]"])[0])[1:]
    assert visipruner.method.forced is True
    assert load_config(file, ["timing={repeats: 5}", "timing.warmup=1"])[0].timing.warmup == 1
    assert load_config(file, ["limit={gqa: 3}"])[0].limit == {"gqa": 3}


def test_options_are_set_by_name_or_label_and_take_the_place_of_grids(file):
    assert labels(load_config(file, ["methods.F 1.5.keep=0.75"])[0]) == [
        "none", "vtw:layers=scaled", "fastv:keep=0.5", "fastv:keep=0.25", "F 1.5", "random:keep=0.5",
    ]  # fmt: skip
    methods = {v.label: v.method for v in variants(load_config(file, ["methods.F 1.5.keep=0.75"])[0])}
    assert (methods["F 1.5"].keep, methods["fastv:keep=0.5"].keep) == (0.75, 0.5)
    config, _ = load_config(file, ["methods.fastv.keep=0.3", "methods.fastv.layer=4"])
    found = [v.method for v in variants(config) if v.method.name == "fastv"]
    assert [(method.keep, method.layer) for method in found] == [(0.3, 4)] * 2
    config, _ = load_config(file, ["methods.random.grid.keep=[0.1, 0.2]", "methods.vtw:layers=scaled.layer=9"])
    assert labels(config)[1:2] + labels(config)[-2:] == [
        "vtw:layers=scaled,layer=9",
        "random:keep=0.1",
        "random:keep=0.2",
    ]


def test_what_is_set_need_not_touch_the_file(file):
    before = Path(file).read_text()
    config, _ = load_config(file, ["methods=[none]", "tasks=[gqa]"])
    assert (labels(config), config.tasks, Path(file).read_text()) == (["none"], ["gqa"], before)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("limt=20", "did you mean 'limit'"),
        ("limit", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("timing.repeat=3", "did you mean 'repeats'"),
        ("limit.gqa=3", "limit is 7, which has no keys"),
        ("limit=[1", "not valid YAML"),
        ("limit=-1", "limit: "),
        ("limit=", "no value; write null"),
        ("limit={}", "limit: "),
        ("limit={gqa: 3, gqa: 4}", "gqa stands twice"),
        ("limit={nope: 5}", "limit names task 'nope'"),
        ("methods.fastv.keep= ", "no value; write null"),
        ("methods.fastv.keep=true", "keep=True: expected float . None, not true or false"),
        ("methods.fastv.grid.keep=[0.5, true]", "keep=True: expected "),
        ("methods.fastv.grid.keep=[]", "grid.keep: "),
        ("methods.random.seeds=[]", "seeds: "),
        ("feature_cache_gb=true", "feature_cache_gb: expected a number"),
        ("timing.repeats=true", "timing: expected a number"),
        ("seeds=[true]", "seeds.0: expected a number"),
        ("budget={tokens: true}", "tokens: expected a number"),
        ("methods.fastvv.keep=0.5", "did you mean 'fastv'"),
        ("methods.fastv=0.5", "expected methods.NAME.OPTION=VALUE"),
        ("methods.fastv.kep=0.5", "did you mean 'keep'"),
        ("include=ci", "unknown key 'include'"),
    ],
)
def test_unusable_settings(file, setting, message):
    with pytest.raises(OptionError, match=message) as caught:
        cell_specs(load_config(file, [setting])[0])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        ["limit=-3", "limit=10"],
        ["limit=10", " limit =10"],
        ["timing.repeats=5", "timing=null"],
        ["model=tiny", "models=[a/b]"],
        ["timing.repeats=5", "timing.repeats=6"],
        ["methods.fastv.keep=0.5", "methods.fastv.keep=0.6"],
    ],
)
def test_a_key_is_set_once(file, settings):
    with pytest.raises(OptionError, match=r"is given twice, as .+ and .+: leave one") as caught:
        load_config(file, settings)
    assert all(setting in str(caught.value) for setting in settings)


def test_options_of_a_label_with_an_equals_sign_are_told_apart(tmp_path):
    methods = [{"name": "fastv", "label": "a=b", "keep": 0.5}]
    write(tmp_path, my={"model": "tiny", "tasks": ["gqa"], "methods": methods})
    config, _ = load_config(str(tmp_path / "my.yaml"), ["methods.a=b.keep=0.3", "methods.a=b.layer=4"])
    assert (variants(config)[1].method.keep, variants(config)[1].method.layer) == (0.3, 4)


@pytest.mark.parametrize("text", ["tasks: [gqa]\ntasks: [pope]", "tasks: [gqa]\nlimit:\n  gqa: 3\n  'gqa': 4"])
def test_a_file_says_each_thing_once(tmp_path, text):
    (tmp_path / "a.yaml").write_text(f"model: tiny\nmethods: [none]\n{text}\n")
    with pytest.raises(DataError, match=r"a.yaml is not valid YAML: (tasks|gqa) stands twice .* line \d"):
        load_config(str(tmp_path / "a.yaml"))


def test_merged_keys_of_an_anchor_may_be_replaced(tmp_path):
    anchors = "methods: [&a {name: fastv, keep: 0.5}, {<<: *a, keep: 0.25}]"
    (tmp_path / "a.yaml").write_text(f"model: tiny\ntasks: [gqa]\n{anchors}\n")
    assert labels(load_config(str(tmp_path / "a.yaml"))[0]) == ["none", "fastv:keep=0.5", "fastv:keep=0.25"]


# ---- --only -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        (["fastv,vtw"], ["none", "vtw:layers=scaled", "fastv:keep=0.5", "fastv:keep=0.25", "F 1.5"]),
        (["F 1.5", "random"], ["none", "F 1.5", "random:keep=0.5"]),
        (["fastv:keep=0.25"], ["none", "fastv:keep=0.25"]),
        (["none"], ["none"]),
    ],
)
def test_methods_by_name_label_or_point_of_a_grid(file, only, expected):
    config, _ = load_config(file)
    assert labels(select(config, only)) == expected
    cells = {cell.config.digest() for cell in cell_specs(config)}
    assert all(cell.config.digest() in cells for cell in cell_specs(select(config, only)))


def test_a_method_is_chosen_as_the_configuration_or_as_the_table_spells_it():
    methods = ["fastv:layer=3,keep=0.5", "vtw"]
    config = parse_config({"model": "tiny", "tasks": ["gqa"], "methods": methods}, "test")
    for only in ("fastv:layer=3,keep=0.5", "fastv:keep=0.5,layer=3"):
        assert labels(select(config, [only])) == ["none", "fastv:keep=0.5,layer=3"]


def test_a_point_keeps_its_seeds_and_its_budget():
    methods = [{"name": "random", "seeds": [3, 4], "grid": {"keep": [0.5, 0.25]}}]
    config = parse_config({"model": "tiny", "tasks": ["gqa"], "methods": methods}, "test")
    chosen = variants(select(config, ["random:keep=0.25"]))[1:]
    assert [(v.label, v.seed, v.method.keep) for v in chosen] == [("random:keep=0.25", seed, 0.25) for seed in (3, 4)]
    budgets = [{"tokens": 48}, {"tokens": 32}]
    config = parse_config({"model": "tiny", "tasks": ["gqa"], "methods": ["fastv"], "budget": budgets}, "test")
    asked = []
    solve = lambda name, options, target: asked.append((name, target.value)) or variants(first)[1].method  # noqa: E731
    first = parse_config({"model": "tiny", "tasks": ["gqa"], "methods": ["fastv:keep=0.5"]}, "test")
    assert [v.label for v in variants(select(config, ["fastv T=32"]), solve=solve)] == ["none", "fastv T=32"]
    assert asked == [("fastv", 32)]


def test_tasks_take_their_limits_along(file):
    config, _ = load_config(file, ["limit={gqa: 3, pope: 4}"])
    assert [cell.config.task for cell in cell_specs(select(config, tasks=["pope"]))] == ["pope"] * 6
    assert select(config, tasks=["pope"]).limit == {"pope": 4}


@pytest.mark.parametrize(
    ("only", "tasks", "message"),
    [
        (["fastvv"], [], "did you mean 'fastv'"),
        ([], ["popo"], "did you mean 'pope'"),
        ([""], [], "--only names no method"),
        ([","], [], "--only names no method"),
        ([], [" , "], "--only-tasks names no task"),
    ],
)
def test_parts_that_are_not_there(file, only, tasks, message):
    with pytest.raises(OptionError, match=message):
        select(load_config(file)[0], only, tasks)


# ---- several models -----------------------------------------------------------------------------------------------


def test_models_times_methods_times_tasks_by_model(checkpoint):
    content = {"models": ["tiny", str(checkpoint)], "tasks": ["gqa", "pope"], "methods": ["fastv:keep=0.5"]}
    cells = [cell.config for cell in cell_specs(parse_config(content, "test"))]
    assert [(cell.model, cell.method, cell.task) for cell in cells] == [
        (model, method, task)
        for model in ("tiny", str(checkpoint))
        for method in ("none", "fastv")
        for task in ("gqa", "pope")
    ]
    assert len({cell.checkpoint for cell in cells}) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "give model, or models"),
        ({"model": "tiny", "models": ["tiny"]}, "give model, or models"),
        ({"models": ["tiny", "tiny"]}, "twice"),
        ({"models": [""]}, "models.0: "),
    ],
)
def test_unusable_models(content, message):
    with pytest.raises(OptionError, match=message) as caught:
        parse_config({"tasks": ["gqa"], "methods": ["none"]} | content, "test")
    assert "Value error" not in str(caught.value)


# ---- help ---------------------------------------------------------------------------------------------------------


def test_help_texts_state_defaults_in_brackets_that_show():
    """Rich takes square brackets for markup and prints nothing."""
    for file in COMMANDS.glob("*.py"):
        assert "[default" not in file.read_text(), f"{file.name}: write (default: …)"
