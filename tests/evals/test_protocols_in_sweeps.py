"""Protocols in sweeps: recorded in cells, shown by tables, never mixed."""

import pytest
from visibench.evals.sweeps.cells import cell_specs
from visibench.evals.sweeps.config import parse_config
from visibench.evals.tasks.scorers import reference_in
from visibench.evals.tasks.tasks import load_tasks
from visibench.models.protocols import find
from visibench.reports.image_loader import ImageLoader
from visibench.results.store.store import Store
from visibench.results.tables.tables import build


@pytest.mark.parametrize(
    ("answer", "references", "taken"),
    [
        ("It is a red door.", ["door", "red door"], "door"),
        ("It is a red door.", ["red door", "red door", "door"], "red door"),
        ("No, there is not.", ["yes"], "no"),
        ("There is nothing.", ["no"], "There is nothing."),
        ("reddish", ["red"], "reddish"),
    ],
)
def test_an_answer_is_taken_for_the_reference_in_it(answer, references, taken):
    assert reference_in(answer, references) == taken


def test_free_form_asks_for_no_short_answer_and_scores_leniently():
    (plain,) = load_tasks(["gqa"])
    (free,) = load_tasks(["gqa"], protocol=find("free-form"))
    short = "\nAnswer the question using a single word or phrase."
    assert plain.question(0)[0] == free.question(0)[0] + short
    assert free.harness.config.generation_kwargs["max_new_tokens"] == 64
    assert free.info.metrics[0].title == "exact match, lenient"
    target = free.docs[0]["answer"]
    assert free.taken(0, f"It is {target}, I think.") == target
    assert plain.taken(0, f"It is {target}.") == f"It is {target}."


def test_protocols_are_part_of_a_cell_and_never_share_a_table(cli, tmp_path):
    content = {"model": "tiny", "tasks": ["pope"], "methods": ["none"]}
    plain, padded = (
        cell_specs(parse_config(content | more, "t"))[0].config for more in ({}, {"protocol": "llava-1.5"})
    )
    assert plain.digest() != padded.digest()
    assert "protocol" not in plain.model_dump()
    command = ["run", "--model", "tiny", "--method", "none", "--tasks", "pope", "--limit", "3", "--no-timing"]
    for more in ([], ["--protocol", "llava-1.5"]):
        code, out, err = cli(*command, "--out", str(tmp_path), *more)
        assert code == 0, err
    assert "Protocol llava-1.5 (" in out
    assert "image_aspect: 'pad'" in out
    cells = Store(tmp_path).cells()
    tables = build(cells)
    assert sorted(table.facts["protocol"].partition(" ")[0] for table in tables) == ["hf", "llava-1.5"]
    code, out, _ = cli("table", str(tmp_path))
    assert "not to be compared with the others: protocol = hf" in out
    for cell in cells:
        prompts = cell.samples().set_index("doc_id")["prompt"].to_dict()
        assert not isinstance(ImageLoader()(cell.config, prompts)[0], str)
