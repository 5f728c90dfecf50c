"""No stale numbers: what a cell is includes the content of its data, wherever these lie."""

import json
import shutil

import hubdata
import pandas as pd
import pytest
from PIL import Image
from rich.console import Console
from visibench.evals.sweeps.cells import cell_specs
from visibench.evals.sweeps.config import parse_config
from visibench.evals.sweeps.sweep import sweep
from visibench.results.store import code
from visibench.results.store.store import Store
from visibench.results.tables.render import render
from visibench.results.tables.tables import build

SETS = {"pope": "POPE", "mme": "MME", "textvqa_val": "textvqa", "gqa": "GQA_"}


def ids(tasks, **settings) -> dict[str, str]:
    """The identity of the dense cell of each task."""
    content = {"model": "tiny", "tasks": list(tasks), "methods": ["none"]} | settings
    return {cell.config.task: cell.config.digest() for cell in cell_specs(parse_config(content, "test"))}


@pytest.mark.parametrize("layout", ["disk_data", "hub_data"])
def test_a_folder_of_data_counts_by_its_content_and_each_set_for_its_task_alone(layout, tmp_path, request):
    data = shutil.copytree(request.getfixturevalue(layout), tmp_path / "data")
    before = ids(SETS, data=str(data))
    assert ids(SETS, data=str(data)) == before
    for task, name in SETS.items():
        for file in sorted(one for one in data.rglob("*") if one.is_file() and one.suffix in (".arrow", ".parquet")):
            if not str(file.relative_to(data)).startswith(name.rstrip("_")):
                continue
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1  # of the same size, and in the middle
            file.write_bytes(bytes(content))
            after = ids(SETS, data=str(data))
            assert {key for key in before if before[key] != after[key]} == {task}, file
            before = after
    (data / "POPE" / "cache-1234.arrow").write_text("what datasets keeps among its data")
    assert ids(SETS, data=str(data)) == before


def test_data_are_read_once_for_all_methods(disk_data, monkeypatch):
    read = []
    monkeypatch.setattr(code.sources, "of_data", lambda place: read.append(place) or "hash")
    content = {
        "model": "tiny",
        "tasks": ["pope"],
        "methods": ["none", "fastv:keep=0.5", "random:keep=0.5"],
        "data": str(disk_data),
    }
    assert len(cell_specs(parse_config(content, "test"))) == 3
    assert len(read) == 1


TASK = "task: mine\ndataset_path: {path}\ndataset_kwargs: {kwargs}\ntest_split: test\n"


@pytest.mark.parametrize(
    ("path", "kwargs", "named"),
    [
        ("{0}/here", "{{}}", "here/a.parquet"),
        ("json", "{{data_files: {{test: {0}/a.json}}}}", "a.json"),
        ("json", "{{data_files: ['{0}/b*.json', '{0}/a.json']}}", "b7.json"),
        ("json", "{{data_files: '{0}/**/*.json'}}", "deep/down/c.json"),
        ("imagefolder", "{{data_dir: '{0}/pictures'}}", "pictures/x/0.png"),
    ],
)
@pytest.mark.parametrize("included", [False, True])
def test_what_a_tasks_yaml_names_counts_by_its_content(path, kwargs, named, included, tmp_path):
    file, task = tmp_path / named, tmp_path / "task.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("before")
    text = TASK.format(path=path.format(tmp_path), kwargs=kwargs.format(tmp_path))
    if included:
        (tmp_path / "base").write_text(text.replace("task: mine\n", ""))
        text = "task: mine\ninclude: base\n"
    task.write_text(text)
    before = ids([str(task)])
    file.write_text("behind")
    assert ids([str(task)]) != before


@pytest.mark.parametrize("form", ["text", "list", "mapping", "line", "line of a mapping"])
def test_images_that_questions_name_by_path_count_in_any_form(form, tmp_path):
    image = {"text": "0.png", "list": ["0.png"], "mapping": {"bytes": None, "path": "0.png"}, "line": ["0.png"]}
    row = {"image": image.get(form, {"path": "0.png"}), "question": "What?", "answers": "yes"}
    file = tmp_path / ("mine.jsonl" if form.startswith("line") else "mine.parquet")
    if file.suffix == ".jsonl":
        file.write_text(json.dumps(row))
    else:
        pd.DataFrame([row]).to_parquet(file)
    Image.new("RGB", (9, 9), "red").save(tmp_path / "0.png")
    before = ids([str(file)])
    Image.new("RGB", (9, 9), "blue").save(tmp_path / "0.png")
    assert ids([str(file)]) != before


def test_a_place_may_hold_any_character(tmp_path):
    folder = tmp_path / "a+b:c [1]*"
    folder.mkdir()
    (folder / "mine.jsonl").write_text('{"image": "0.png", "question": "What?", "answers": "yes"}\n')
    Image.new("RGB", (9, 9)).save(folder / "0.png")
    (folder / "task.yaml").write_text("task: theirs\ndataset_path: json\n")
    assert code.of_task(str(folder / "task.yaml"))
    assert code.of_task(str(folder / "mine.jsonl"))
    data = hubdata.save_to_disk(folder / "data")
    before = ids(["pope"], data=str(data))
    (data / "POPE" / "more").write_text("more")
    assert ids(["pope"], data=str(data)) != before


def test_changed_data_run_anew_and_what_is_there_is_shown_as_of_other_data(checkpoint, tmp_path, capsys):
    data = hubdata.save_to_disk(tmp_path / "data")
    settings = {"model": str(checkpoint), "data": str(data), "tasks": ["pope"], "methods": ["none"], "timing": None}
    content = parse_config(settings, "test")

    def run():
        return sweep(content, tmp_path / "out", Console(width=1000))[0]

    first = run()
    assert run().path == first.path
    rows = hubdata.tables()["POPE"][1].map(lambda row: row | {"answer": "no"})
    shutil.rmtree(data / "POPE")
    hubdata.save_to_disk(data, POPE=rows)
    capsys.readouterr()
    second = run()
    assert "the data of pope has changed since 1 of these cells ran: they run anew" in capsys.readouterr().out
    assert second.path != first.path
    assert set(second.samples()["target"]) == {"no"} != set(first.samples()["target"])
    cells = Store(tmp_path / "out").cells()
    assert {cell.path: cell.other_code for cell in cells} == {first.path: ["data"], second.path: []}
    assert "pope (the data has changed since)" in render(build(cells), "text")
    shutil.rmtree(data)
    assert not any(cell.other_code for cell in Store(tmp_path / "out").cells()), "what is not here is not told"
