"""Questions that are too long, and batches that would not fit into memory, before they are tried."""

import hubdata
import pytest
from storing import DENSE, pope_config
from visibench.errors import IncompleteError, InputError
from visibench.evals.answers import generate
from visibench.evals.answers.cell import run_cell
from visibench.evals.answers.cell_spec import CellSpec
from visibench.evals.tasks.tasks import load_tasks
from visibench.results.store.store import Store
from visibench.utils import memory


def ended(cell) -> list:
    return cell.samples()[["doc_id", "output", "batch_questions"]].to_numpy().tolist()


@pytest.fixture
def pope(disk_data):
    return load_tasks(["pope"], str(disk_data))[0]


def test_questions_longer_than_the_models_positions_fail_by_name_and_the_others_go_on(
    loaded, pope, tmp_path, monkeypatch
):
    rows = hubdata.tables()["POPE"][1]
    rows = rows.map(
        lambda row, i: row | {"question": "is the box red " * 900} if i in (2, 3, 6) else row, with_indices=True
    )
    hubdata.save_to_disk(tmp_path / "data", POPE=rows)
    (long,) = load_tasks(["pope"], str(tmp_path / "data"))
    monkeypatch.setattr(generate, "HOPELESS", 2)
    seen = []
    hook = loaded.model.register_forward_pre_hook(lambda model, _, given: seen.append(given), with_kwargs=True)
    store = Store(tmp_path / "run")
    with pytest.raises(IncompleteError) as failed:
        run_cell(loaded, CellSpec(pope_config(batch_size=2), DENSE), long, store)
    hook.remove()
    assert str(failed.value).startswith("3 of 8 questions failed, first question ")
    (most,) = {loaded.model.config.get_text_config().max_position_embeddings}
    for failure in store.failures(pope_config(batch_size=2)):
        assert f"tokens is longer than the {most} positions of {loaded.name}: shorten it" in failure.error
    assert {failure.doc_id for failure in store.failures(pope_config(batch_size=2))} == {2, 3, 6}
    assert max(given["input_ids"].shape[1] for given in seen) <= most, "they never came to the model"
    with pytest.raises(InputError, match="longer than the"):
        loaded.inputs(["red " * 9999], [[]])


@pytest.mark.slow
def test_a_batch_that_cannot_fit_is_halved_before_it_is_tried(loaded, pope, tmp_path, monkeypatch):
    whole = run_cell(loaded, CellSpec(pope_config(batch_size=4), DENSE), pope, Store(tmp_path / "whole"))
    halves = run_cell(loaded, CellSpec(pope_config(batch_size=2), DENSE), pope, Store(tmp_path / "halves"))
    asked = []
    monkeypatch.setattr(memory, "available", lambda: 2**40)
    check = generate.check_prefill
    monkeypatch.setattr(
        generate, "check_prefill", lambda model, rows, tokens: asked.append(tokens) or check(model, rows, tokens)
    )
    run_cell(loaded, CellSpec(pope_config(batch_size=4), DENSE), pope, Store(tmp_path / "room"))
    sizes, tokens = loaded.geometry, max(asked)
    ffn = tokens * (2 * sizes.hidden + 2 * sizes.intermediate) * 4
    cache = tokens * 2 * sizes.layers * sizes.kv_heads * sizes.head_size * 4
    monkeypatch.setattr(memory, "available", lambda: 2 * (ffn + cache + tokens * tokens))
    tight = run_cell(loaded, CellSpec(pope_config(batch_size=4), DENSE), pope, Store(tmp_path / "tight"))
    assert ended(tight) == ended(halves)
    assert ended(whole) != ended(halves)
    assert tight.metrics.remarks == ["8 of 8 answered in batches smaller than 4 (out of memory)"]
    monkeypatch.setattr(memory, "available", lambda: 100)
    with pytest.raises(
        IncompleteError, match=r"8 of 8 questions failed, .*NoRoomError: a batch of 1 × \d+ tokens takes"
    ):
        run_cell(loaded, CellSpec(pope_config(batch_size=3), DENSE), pope, Store(tmp_path / "none"))
