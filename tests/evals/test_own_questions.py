"""Questions of one's own: read, checked, asked and scored."""

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import visibench
from PIL import Image
from visibench.errors import VisibenchError
from visibench.evals.sweeps.cells import cell_specs
from visibench.evals.sweeps.config import load_config, parse_config, select
from visibench.evals.tasks.definitions import called, find
from visibench.evals.tasks.scorers import SCORERS, chosen
from visibench.evals.tasks.tasks import load_tasks
from visibench.reports.image_loader import ImageLoader
from visibench.results.store.store import Store


def png(colour) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(stream, "PNG")
    return stream.getvalue()


def jsonl(folder, rows, name="mine.jsonl"):
    for number, colour in enumerate(("red", "blue")):
        (folder / f"{number}.png").write_bytes(png(colour))
    (folder / name).write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in rows))
    return str(folder / name)


ROWS = [
    {"image": "0.png", "question": "What colour?", "answers": ["red", "crimson"], "id": "a", "category": "x"},
    {"image": "1.png", "question": "What colour?", "answers": "blue"},
]


def test_questions_become_a_task_of_lmms_evals_kind(tmp_path):
    (task,) = load_tasks([jsonl(tmp_path, ROWS)])
    assert (task.name, task.size(None)[0], task.info.metrics[0].title) == ("mine", 2, "exact match")
    prompt, (image,) = task.question(1)
    assert prompt == "What colour?\nAnswer the question using a single word or phrase."
    assert (image.size, image.getpixel((0, 0))) == ((40, 30), (0, 0, 255))
    assert task.docs[0]["answers"] == ["red", "crimson"]
    assert task.harness.process_results(task.docs[0], ["Crimson."]) == {"exact_match": 1.0}


@pytest.mark.parametrize("image", [{"bytes": png("red"), "path": None}, png("red"), "0.png", ["0.png", "1.png"]])
def test_parquet_of_pandas_is_read_with_its_images(image, tmp_path):
    jsonl(tmp_path, [])
    pd.DataFrame([{"image": image, "question": "q", "answers": ["yes"]}]).to_parquet(tmp_path / "mine.parquet")
    (task,) = load_tasks([str(tmp_path / "mine.parquet")])
    images = task.question(0)[1]
    assert images[0].getpixel((0, 0)) == (255, 0, 0)
    assert len(images) == (2 if isinstance(image, list) else 1)


def test_choices_are_listed_and_scored_by_letter_or_text(tmp_path):
    row = ROWS[0] | {"choices": ["blue", "red"], "answers": "red"}
    (task,) = load_tasks([jsonl(tmp_path, [row])])
    assert task.question(0)[0].split("\n")[1:3] == ["A. blue", "B. red"]
    scored = {
        said: task.harness.process_results(task.docs[0], [said]) for said in ("B", "(b)", "B. red", "Red", "A", "?")
    }
    assert [score["choice_accuracy"] for score in scored.values()] == [1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        *(
            (said, 0)
            for said in ("A", "a", "(a)", "A. cat", "a) cat", "A: cat", "A - cat", "A\ncat", "A cat", "the cat")
        ),
        *(
            (said, 1)
            for said in ("b", "B.", "B because it flies", "bird", "A bird.", "The answer is B.", "Answer: (b)")
        ),
        *((said, None) for said in ("a dog", "A dog", "A bird and a cat", "I do not know", "K", "", "?", "not b")),
    ],
)
def test_a_choice_is_named_by_its_letter_or_its_text_and_an_article_is_no_letter(text, place):
    assert chosen(text, ["a cat", "bird", *"cdefghij"]) == place


@pytest.mark.parametrize(
    ("scorer", "answer", "references", "score"),
    [
        ("exact", "A Red door.", ["a red door"], 1),
        ("exact", "red door", ["door"], 0),
        ("contains", "It is a red door.", ["red door"], 1),
        ("contains", "reddish", ["red"], 0),
        ("vqa", "2", ["two"], 1),
        ("vqa", "red", ["red"] * 2 + ["blue"] * 8, 0.6),
        ("vqa", "red", ["red"] * 4 + ["blue"] * 6, 1),
        ("anls", "hallo", ["hello"], 0.8),
        ("anls", "x", ["hello"], 0),
    ],
)
def test_scorers_give_what_their_definitions_say(scorer, answer, references, score):
    assert SCORERS[scorer].score(answer, references, []) == pytest.approx(score)


def test_vqa_accuracy_is_the_stock_scorers():
    from lmms_eval.tasks.textvqa.utils import textvqa_process_results

    doc = {"question_id": 0, "answers": ["red"] * 2 + ["the blue"] * 3 + ["Two"] * 5}
    for said in ("red", "Blue", "2", "two.", "green"):
        stock = textvqa_process_results(dict(doc), [said])["exact_match"]
        assert SCORERS["vqa"].score(said, doc["answers"], []) == pytest.approx(stock)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{", ROWS[1]], "mine.jsonl line 1: no JSON object"),
        ([{"image": "0.png", "answers": "x"}], "line 1: no question"),
        ([ROWS[0] | {"anwser": 1}], "unknown 'anwser'"),
        ([ROWS[0], ROWS[0]], "id 'a' is there twice"),
        ([ROWS[0] | {"image": "none.png"}], "line 1: no image none.png in"),
        ([ROWS[0] | {"image": "mine.jsonl"}], "image mine.jsonl cannot be decoded"),
        ([ROWS[0] | {"image": "/dev/stdin"}], "line 1: no image stdin in /dev"),
        ([ROWS[0] | {"answers": "\ud800"}], r"line 1: half a surrogate pair, '\ud800', in its text"),
        (["[" * 100_000], "line 1: no JSON object (RecursionError"),
        ([ROWS[0] | {"image": "http://x/y.png"}], "is a URL: download it"),
        ([ROWS[0] | {"choices": ["a", "b"]}], "answer 'red' is none of the choices"),
        ([ROWS[0] | {"answers": [None]}], "give a text, or a list of texts"),
        ([], "holds no questions"),
    ],
)
def test_what_is_wrong_with_questions_is_said_in_one_line_before_anything_runs(rows, message, tmp_path):
    with pytest.raises(VisibenchError) as caught:
        load_tasks([jsonl(tmp_path, rows)])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_images_of_16_bits_are_scaled_and_those_without_a_known_range_refused(tmp_path):
    file = jsonl(tmp_path, ROWS[:1])
    Image.fromarray(np.full((4, 5), 100 * 257, np.uint16)).save(tmp_path / "0.png")
    (task,) = load_tasks([file])
    assert task.images(0)[0].getpixel((0, 0)) == (100, 100, 100)
    Image.new("F", (5, 4), 0.5).save(tmp_path / "0.png", "TIFF")
    with pytest.raises(VisibenchError, match=r"line 1: image 0.png: an image of mode F with values from 0.5 to 0.5"):
        load_tasks([file])


@pytest.mark.parametrize(
    "error", [RuntimeError("a\nb"), NotImplementedError(), TypeError("x"), Image.DecompressionBombError("x")]
)
def test_whatever_pillow_raises_on_a_damaged_image_names_it(error, tmp_path, monkeypatch):
    def opened(*given):
        raise error

    file = jsonl(tmp_path, ROWS[:1])
    monkeypatch.setattr(Image, "open", opened)
    with pytest.raises(
        VisibenchError, match=rf"line 1: image 0.png cannot be decoded \({type(error).__name__}"
    ) as caught:
        load_tasks([file])
    assert "\n" not in str(caught.value)


def test_separators_of_lines_may_stand_in_texts(tmp_path):
    (task,) = load_tasks([jsonl(tmp_path, [json.dumps(ROWS[0] | {"question": "a\u2028b"}, ensure_ascii=False)])])
    assert task.docs[0]["question"] == "a\u2028b"


def test_many_mistakes_are_counted_and_files_that_are_not_there_named(tmp_path):
    with pytest.raises(VisibenchError, match="line 3: no question, and 2 more"):
        load_tasks([jsonl(tmp_path, [{"image": "0.png", "answers": "x"}] * 5)])
    pd.DataFrame([{"picture": 1}]).to_parquet(tmp_path / "other.parquet")
    for entry, message in {
        "none.jsonl": "no questions in 'none.jsonl'",
        str(tmp_path / "other.parquet"): "has no column 'image'",
        f"{tmp_path}/mine.jsonl:alns": "unknown scorer 'alns'; did you mean 'anls'",
        jsonl(tmp_path, ROWS, "pope.jsonl"): "as a task of lmms-eval is: rename it",
        "popee": "did you mean 'pope'",
    }.items():
        with pytest.raises(VisibenchError, match=message):
            load_tasks([entry])


def test_a_task_is_called_as_its_file_and_found_again_by_it(tmp_path):
    file = jsonl(tmp_path, ROWS)
    folder = tmp_path / "data"
    folder.mkdir()
    jsonl(folder, ROWS, "questions.jsonl")
    assert called(f"{file}:vqa") == find(f"{file}:vqa").name == "mine"
    assert find(str(folder)).name == "data"
    assert len(load_tasks([str(folder)])[0].docs) == 2
    content = {"model": "tiny", "tasks": [f"{file}:contains", "pope"], "methods": ["none"], "limit": {"mine": 1}}
    config = parse_config(content, "test")
    assert select(config, tasks=["mine"]).tasks == [f"{file}:contains"]
    cell = cell_specs(config)[0].config
    assert (cell.task, cell.origin, cell.sources["task"], cell.limit) == ("mine", file, f"{file}:contains", 1)
    before = cell.digest()
    for path, content in ((tmp_path / "0.png", png("green")), (tmp_path / "mine.jsonl", b'{"image": "0.png"}')):
        path.write_bytes(content)
        assert cell_specs(config)[0].config.digest() != before  # other images, and other questions
        before = cell_specs(config)[0].config.digest()


YAML = """
task: mine_too
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function helper.visual
doc_to_text: question
doc_to_target: answers
generation_kwargs: {{max_new_tokens: 4}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def test_tasks_of_lmms_evals_kind_are_included_by_folder_and_run(cli, tmp_path):
    file = jsonl(tmp_path, ROWS[1:])
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "mine_too.yaml").write_text(YAML.format(file=file))
    (tasks / "helper.py").write_text(
        f"from PIL import Image\ndef visual(doc):\n    return [Image.open('{tmp_path}/' + doc['image'])]\n"
    )
    out = tmp_path / "out"
    command = ["run", "--model", "tiny", "--method", "none", "--no-timing", "--out", str(out)]
    code, text, err = cli(*command, "--tasks", f"mine_too,{file}", "--include-path", str(tasks))
    assert code == 0, err
    assert "mine_too" in text
    cells = Store(out).cells()
    assert {cell.config.task: cell.metrics.scores[0].key for cell in cells} == dict.fromkeys(
        ("mine", "mine_too"), "exact_match"
    )
    assert not any(cell.other_code for cell in cells)
    for cell in cells:
        prompts = cell.samples().set_index("doc_id")["prompt"].to_dict()
        assert not isinstance(ImageLoader()(cell.config, prompts)[0], str)  # reports find the images again


def test_images_as_pandas_writes_them_are_decoded_in_data_laid_out_like_the_hub(tmp_path):
    folder = tmp_path / "POPE"
    folder.mkdir()
    row = dict.fromkeys(("id", "question_id", "image_source", "category"), "1")
    rows = [row | {"question": "Is there a dog?", "answer": "yes", "image": {"bytes": png("red"), "path": None}}]
    pd.DataFrame(rows).to_parquet(folder / "test.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: test, path: test.parquet}\n---\n"
    )
    (task,) = load_tasks(["pope"], str(tmp_path))
    assert task.question(0)[1][0].size == (40, 30)
    assert "image" not in task.docs.column_names


def test_the_example_can_be_run_as_it_is(monkeypatch):
    monkeypatch.chdir(Path(visibench.__file__).parent / "examples" / "own_data")
    config, _ = load_config("sweep.yaml", [])
    (task,) = load_tasks(config.tasks)
    assert (task.name, len(task.docs)) == ("shapes", 4)
    assert [str(cell.method) for cell in cell_specs(config)][-1].startswith("largest_norm")
