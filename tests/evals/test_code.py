"""No stale numbers: what a cell is includes the code of its method, its task and the engine."""

import json
import os
from pathlib import Path

import pytest
from storing import config as made_up
from storing import put
from visibench.evals.settings.method_spec import parse
from visibench.evals.sweeps import sweep
from visibench.evals.sweeps.cells import cell_specs
from visibench.evals.sweeps.config import parse_config
from visibench.results.store import code
from visibench.results.store.store import Store
from visibench.results.tables.render import render
from visibench.results.tables.tables import build
from visibench.utils import sources

METHOD = '''from visibench.methods import Scored, register
from helper import norm


@register("mine", "Mine")
class Mine(Scored):
    """Largest norms."""

    hook_points = ("projector",)

    def score(self, view):
        return norm(view.projected)  # of each token
'''
HELPER = "def norm(tokens):\n    return tokens.norm(dim=2)\n"


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A method in a file, with a module beside it."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "helper.py").write_text(HELPER)
    (tmp_path / "mine.py").write_text(METHOD)
    return tmp_path / "mine.py"


def spec(file, task="pope"):
    content = {"model": "tiny", "tasks": [task], "methods": [f"{file}:mine:keep=0.5"], "limit": 4, "timing": None}
    return cell_specs(parse_config(content, "test"), dense=False)[0]


def test_what_a_source_says_does_not_count_and_what_it_does_counts():
    text = 'import os\n# why\n\n\ndef f(x):\n    """Says."""\n    y = """a\n# b\n"""\n    return x\n'
    assert sources.bare(text) == 'import os\ndef f(x):\n\n    y = """a\n# b\n"""\n    return x'.replace("\n\n", "\n")
    assert sources.bare(text.replace("# why\n", "# who\n")) == sources.bare(text)
    assert sources.bare(text.replace("# b", "# c")) != sources.bare(text)
    assert sources.bare(text.replace("return x", "return -x")) != sources.bare(text)


@pytest.mark.parametrize(
    ("name", "old", "new", "counts"),
    [
        ("mine.py", "return norm", "return -norm", True),
        ("helper.py", "dim=2", "dim=2, p=1", True),
        ("helper.py", "def norm", "# a remark\ndef norm", False),
    ],
)
def test_a_method_is_its_file_and_what_it_imports_from_beside_it(mine, name, old, new, counts):
    before = code.of_method(str(mine))
    file = mine.parent / name
    file.write_text(file.read_text().replace(old, new))
    assert (code.of_method(str(mine)) != before) is counts
    assert (spec(mine).config.code["method"] != before) is counts


def test_a_module_counts_with_what_it_imports_of_its_package(tmp_path, monkeypatch):
    package = tmp_path / "pack"
    package.mkdir()
    files = {"__init__.py": "", "a.py": "from .b import x\nimport json\n", "b.py": "x = 1\n", "c.py": "y = 1\n"}
    for name, text in files.items():
        (package / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    of_module = sources.of_module.__wrapped__
    before = of_module("pack.a", inside="pack")
    (package / "c.py").write_text("y = 2\n")
    assert of_module("pack.a", inside="pack") == before
    (package / "b.py").write_text("x = 22\n")
    assert of_module("pack.a", inside="pack") != before
    assert of_module("pack.none", inside="pack") == ""


def test_a_builtin_method_is_its_module_and_the_pieces_that_it_uses():
    every = {name: code.of_method(f"visibench.methods.{name}") for name in ("fastv", "random", "vtw")}
    assert len(set(every.values())) == 3
    assert all(value.startswith("visibench ") for value in every.values())
    content = {"model": "tiny", "tasks": ["gqa"], "methods": ["fastv:keep=0.5"]}
    config = cell_specs(parse_config(content, "test"))[1].config
    assert config.code == {"method": every["fastv"], "task": code.of_task("gqa/gqa.yaml+"), "engine": code.engine()}
    assert code.of_task("gqa/gqa.yaml") not in ("", config.code["task"])  # the embedded data count where they are asked


def test_a_task_is_its_yaml_what_that_includes_and_its_functions(tmp_path):
    (tmp_path / "base").write_text("doc_to_text: !function utils.text\n")
    (tmp_path / "utils.py").write_text("from more import x\n")
    (tmp_path / "more.py").write_text("x = 1\n")
    task = tmp_path / "task.yaml"
    task.write_text("include: base\ntask: mine\n")
    hashes = {code.of_task(str(task))}
    for name, text in (("more.py", "x = 21\n"), ("base", "doc_to_text: question\n"), ("task.yaml", "task: mine\n")):
        (tmp_path / name).write_text(text)
        hashes.add(code.of_task(str(task)))
    assert len(hashes) == 4
    assert code.of_task(str(tmp_path / "none.yaml")) == ""


def test_what_a_yaml_defines_is_read_as_yaml(tmp_path):
    """Names of tasks, groups and tags, however they are written; not those that stand deeper, or are listed."""
    for number, (text, names) in enumerate(
        {
            "task: mine  # the name\n": ["task mine"],
            "\"task\" : 'mine'\ntag: [a, b]\n": ["task mine", "tag a", "tag b"],
            "{group: both, task: [one, two]}": ["group both"],
            "group: both\ntask:\n- one\n- {task: two}\n": ["group both"],
            "note: >\n  task: no\nmetadata: {task: no}\ntask: !own mine\n": ["task mine"],
            "task: two words\n": [],
            "task:\n": [],
            "- task: no\n": [],
            "task: mine\n: [": [],
            "[" * 10_000: [],
        }.items()
    ):
        (file := tmp_path / f"{number}.yaml").write_text(text)
        assert [" ".join(entry) for entry in sources.defined_in(file)] == names, text


def test_changed_code_says_so_and_runs_anew_and_old_cells_are_shown_as_of_other_code(mine, tmp_path, capsys):
    from rich.console import Console

    content = {"model": "tiny", "tasks": ["pope"], "methods": [f"{mine}:mine:keep=0.1"], "limit": 6, "timing": None}

    def run():
        return sweep.sweep(parse_config(content, "test"), tmp_path / "out", Console(width=1000), dense=False)[0]

    first = run()
    mine.write_text(METHOD.replace("return norm", "return -norm"))
    second = run()
    assert first.path != second.path
    assert "mine.py has changed since 1 of these cells ran: they run anew" in capsys.readouterr().out
    assert first.samples()["kept"].tolist() != second.samples()["kept"].tolist()
    store = Store(tmp_path / "out")
    assert {cell.path: cell.other_code for cell in store.cells()} == {first.path: ["method"], second.path: []}
    text = render(build(store.cells()), "text")
    assert "Table 1 of 2" in text
    assert text.count("OF OTHER CODE than is here now: mine:keep=0.1 · pope (the method has changed since)") == 1
    mine.write_text(METHOD)  # as it was: what is there is of this code again
    assert run().path == first.path
    (chosen,) = code.present(store.cells(), lambda cell: cell.config.asked(), lambda cell: bool(cell.other_code))
    assert chosen.path == first.path
    (second.path / "metrics.json").unlink()
    assert store.unfinished() == []  # nobody will go on with it


def test_cells_of_early_versions_stay_as_they_are(tmp_path):
    cell = put(Store(tmp_path), made_up("fastv"))
    assert not {"code", "sources"} & set(json.loads((cell.path / "config.json").read_text()))
    assert cell.other_code == []
    assert Path(cell.path).name.endswith(cell.config.digest()[:8])


def test_methods_of_files_stand_beside_the_others(mine, tmp_path):
    method = parse(f"{mine}:mine:keep=0.5")
    store = Store(tmp_path / "out")
    put(store, made_up("none"))
    changes = {"options": method.hyperparameters(), "method_file": str(mine), "method_hash": "0" * 16}
    put(store, made_up("mine", **changes))
    (table,) = build(store.cells())
    assert [row.method for row in table.rows] == ["none", "mine"]


def test_cells_of_an_older_version_of_the_package_stay_in_one_table(tmp_path, monkeypatch):
    """All its methods have changed, each in its own way; they were run by the same code."""
    store = Store(tmp_path)
    for method in ("none", "fastv", "vtw"):
        hashes = {"method": f"old {method}", "engine": code.engine()}
        put(store, made_up(method, code=hashes, sources={"method": f"visibench.methods.{method}"}))
    (table,) = build(store.cells())
    assert len(table.rows) == 3
    assert "OF OTHER CODE" in render([table], "text")


def test_of_images_only_files_are_read(tmp_path):
    (file := tmp_path / "mine.jsonl").write_text(json.dumps({"image": "a.png"}) + "\n")
    named = [sources.of_questions(file)]
    os.mkfifo(tmp_path / "pipe")
    for image in ("\0", "a" * 300, "pipe", ".", "\ud800"):
        file.write_text(json.dumps({"image": image}) + "\n")
        named.append(sources.of_questions(file))
    assert len({*named}) == len(named)
