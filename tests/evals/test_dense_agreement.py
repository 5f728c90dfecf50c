"""Whether a question was answered as the dense model answers it, and that its dense cell comes before a cell."""

import math
import string
import subprocess
import sys

import pandas as pd
import pytest
import visibench
from rich.console import Console
from storing import DENSE, pope_config, untimed
from storing import config as made_up
from visibench.errors import IncompleteError
from visibench.evals.answers import cell
from visibench.evals.answers.cell_spec import CellSpec
from visibench.evals.sweeps.cells import cell_specs
from visibench.evals.sweeps.claims import claimed
from visibench.evals.sweeps.config import parse_config
from visibench.evals.sweeps.events import Reporter
from visibench.evals.sweeps.sweep import sweep
from visibench.evals.workers.ray import Ray
from visibench.results.statistics.answers import answers
from visibench.results.statistics.metrics import loyalty
from visibench.results.store.store import Store
from visibench.results.tables.tables import build

QUIET = Console(quiet=True)
HOLD = "import sys; from filelock import SoftFileLease; lock = SoftFileLease(sys.argv[1], lease_duration=60); "
HOLD += "lock.acquire(); print('held', flush=True); sys.stdin.read()"


@pytest.fixture
def hold():
    """Claims a cell for another process, which is returned."""
    holders = []

    def claim(store, config):
        path = store.path(config)
        path.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-c", HOLD, str(path / "lock")]
        holders.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        assert holders[-1].stdout.readline() == b"held\n"
        return holders[-1]

    yield claim
    for holder in holders:
        holder.kill()
        holder.wait()


# ---- agreement with dense -----------------------------------------------------------------------------------------


def plain(answer: str) -> str:
    """An answer without case, punctuation and extra spaces, by other means than the package's."""
    return " ".join(answer.lower().translate(str.maketrans("", "", string.punctuation.replace("_", ""))).split())


def test_agreement_is_that_of_both_cells(settings, tmp_path):
    cells = {
        (one.config.label, one.config.seed, one.config.task): one
        for one in sweep(parse_config(settings | {"tasks": ["pope"]}, "test"), tmp_path, QUIET)
    }
    seen = set()
    for (label, _, task), one in cells.items():
        own, dense = one.samples(), cells["none", 0, task].samples()
        assert own["dense_agreement"].dtype == "boolean"
        both = own.merge(dense, on="doc_id", suffixes=("", "_dense"), validate="one_to_one")
        assert len(both) == len(own) == len(dense)
        same = both["answer"].map(plain) == both["answer_dense"].map(plain)
        assert both["dense_agreement"].tolist() == same.tolist()
        assert label != "none" or same.all()
        seen |= set(same) if label != "none" else set()
        measured = loyalty(answers(cells["none", 0, task]), [answers(one)])
        assert measured.value == pytest.approx(own["dense_agreement"].mean())
    assert seen == {True, False}
    (table,) = build(cells.values())
    for row in table.rows[1:]:
        means = pd.concat([own.samples().assign(task=own.config.task) for own in row.cells])
        means = means.groupby("task")["dense_agreement"].mean()
        assert {task: share.value for task, share in row.evidence.loyalty.items()} == pytest.approx(means.to_dict())


def test_without_a_dense_cell_agreement_is_null(loaded, pope, tmp_path):
    method, store = visibench.load_method("fastv", layer=1, keep=0.1), Store(tmp_path)
    config, dense = pope_config(method, limit=3), pope_config(limit=3)

    def agreement(reference) -> pd.Series:
        return cell.run_cell(loaded, CellSpec(config, method, reference), pope, store).samples()["dense_agreement"]

    assert agreement(None).isna().all()
    assert agreement(dense).isna().all(), "it has yet to run"
    reference = cell.run_cell(loaded, CellSpec(dense, DENSE, dense), pope, store)
    assert reference.samples()["dense_agreement"].tolist() == [True] * 3
    assert agreement(dense).notna().all()
    store.finish(dense, reference.samples(), reference.metrics.model_copy(update={"data_hash": "other"}))
    assert agreement(dense).isna().all(), "it was asked other questions"


def test_where_dense_fails_agreement_is_null_until_it_succeeds(settings, tmp_path):
    changes = {"methods": ["fastv:layer=1,keep=0.1"], "tasks": ["pope"]}
    config, store = parse_config(settings | changes, "test"), Store(tmp_path)
    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(type(DENSE), "begin", lambda *arguments: 1 / 0)
        with pytest.raises(IncompleteError, match="1 of 2 cells are incomplete"):
            sweep(config, tmp_path, QUIET)
    (alone,) = store.cells()
    before = alone.samples()
    assert alone.config.method == "fastv"
    assert before["dense_agreement"].isna().all()

    dense, cell = sweep(config, tmp_path, QUIET)
    after = cell.samples()
    same = after["answer"].map(plain) == dense.samples()["answer"].map(plain)
    assert after["dense_agreement"].tolist() == same.tolist()
    pd.testing.assert_frame_equal(after.drop(columns="dense_agreement"), before.drop(columns="dense_agreement"))
    hashes = {"samples_hash", "checksum"}
    assert cell.metrics.model_dump(exclude=hashes) == alone.metrics.model_dump(exclude=hashes)
    assert [one.config for one in store.cells()] == [cell.config, dense.config]


def test_every_cell_knows_its_dense_cell(settings):
    plans = cell_specs(parse_config(settings, "test"))
    dense = {one.config.task: one.config for one in plans if one.config.method == "none"}
    assert [one.config.method for one in plans[:2]] == ["none", "none"]
    assert all(one.dense == dense[one.config.task] for one in plans)
    alone = cell_specs(parse_config(settings, "test"), dense=False)
    assert {one.config.method for one in alone} == {"fastv", "random"}
    assert [one.dense for one in alone] == [one.dense for one in plans[2:]], "as it would be, should it lie there"


# ---- order --------------------------------------------------------------------------------------------------------


def test_while_dense_is_with_another_process_cells_without_it_come_first(tmp_path, hold):
    store, came, said = Store(tmp_path), [], []
    dense = {task: made_up("none", task) for task in ("gqa", "mme")}
    plans = [CellSpec(made_up(method, task), DENSE, dense[task]) for method in ("none", "fastv") for task in dense]
    holder = hold(store, dense["gqa"])

    def say(text):
        said.append(text)
        came.append("waits")
        holder.kill()
        holder.wait()

    for one in claimed(plans, store, say, lambda: None):
        came.append((one.config.method, one.config.task))
    assert came == [("none", "mme"), ("fastv", "mme"), "waits", ("none", "gqa"), ("fastv", "gqa")]
    assert len(said) == 1


class Lets(Reporter):
    """Lets another process go when something is waiting for it; keeps the order of the cells begun."""

    def __init__(self, holder) -> None:
        self.holder, self.began = holder, []

    def __call__(self, event) -> None:
        if event.event == "cell_started":
            self.began.append((event.cell.label, event.cell.task))
        if event.event == "note" and "Waiting for" in event.text:
            self.began.append("waits")
            self.holder.kill()
            self.holder.wait()


def held_up(settings, tmp_path, hold, executor=None) -> tuple[list, list]:
    """Order and outcome of a sweep while the first dense cell is with another process."""
    config = parse_config(settings | {"methods": ["fastv:layer=1,keep=0.1"]}, "test")
    lets = Lets(hold(Store(tmp_path / "held"), cell_specs(config)[0].config))
    cells = sweep(config, tmp_path / "held", QUIET, report=lets, executor=executor)
    return lets.began, cells


@pytest.mark.parametrize("ray", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_sweep_waits_for_dense_cells_of_others_at_its_end(ray, settings, tmp_path, hold, monkeypatch):
    if ray:
        pytest.importorskip("ray")
        monkeypatch.setenv("RAY_worker_niceness", "0")
    label = "fastv:keep=0.1,layer=1"
    order, cells = held_up(settings, tmp_path, hold, Ray(workers=1) if ray else None)
    assert order == [("none", "pope"), (label, "pope"), "waits", ("none", "gqa"), (label, "gqa")]
    assert all(one.samples()["dense_agreement"].notna().all() for one in cells)
    assert not any(math.isnan(latency) for one in cells for latency in one.samples()["latency_ms"])
    if not ray:  # who runs them one after the other changes nothing but their order
        return
    config = parse_config(settings | {"methods": [label]}, "test")
    straight = sweep(config, tmp_path / "straight", QUIET)
    assert [untimed(one) for one in cells] == [untimed(one) for one in straight]
