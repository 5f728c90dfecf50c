"""What a worker does, wherever it is: a process of this machine (:mod:`.pool`), or an actor of Ray (:mod:`.ray`).

It needs nothing of the sweep's process but what it is handed: it works in a folder of its own, and returns the files
that it wrote there. So workers need not see the run folder; they need visibench in the same versions, and the model and
data under the same names. A worker keeps its model, and what the vision tower computes, for all that it runs.
"""

from __future__ import annotations

import platform
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ...engine.vision.features import FeatureStore
from ...errors import DataError, IncompleteError, StorageError, VisibenchError
from ...methods.files import file_of
from ...models.load import fingerprint
from ...results.store import code
from ...results.store.records import CellConfig
from ...results.store.store import Store
from ..answers.cell import run_cell
from ..answers.cell_spec import CellSpec
from ..answers.generate import answer, failure
from ..settings import method_spec
from ..sweeps.config import SweepConfig
from ..sweeps.events import Reporter
from ..sweeps.executor import Prepared
from ..sweeps.feature_sharing import feature_store

Shard = tuple[int, int]


@dataclass(frozen=True)
class WorkDone:
    """What a task returns: new files of the cell's folder by name, how many questions it answered, and what to say.

    ``stopped``: it was told to stop before it was through.
    """

    files: dict[str, bytes]
    answered: int
    notes: tuple[str, ...] = ()
    stopped: bool = False


class Worker:
    """Works for one model.

    ``config``: of the sweep, as JSON. ``flag``: a file that tells a worker of this machine, once it is there, to stop
    behind the batch that runs.
    """

    def __init__(self, config: str, flag: str = "") -> None:
        self.prepared = Prepared(SweepConfig.model_validate_json(config), Reporter())
        self.flag = flag
        self._notes: list[str] = []

    def up(self) -> None:
        """Load the model."""
        self.prepared.loaded  # noqa: B018

    @cached_property
    def features(self) -> FeatureStore:
        """What its cells and shards share."""
        return feature_store(self.prepared.loaded, self.prepared.config, self._notes.append)

    def close(self) -> tuple[str, ...]:
        """Free what is shared; returns what to say of that."""
        if "features" in vars(self):
            self.features.close()
        return self._told()

    def _told(self) -> tuple[str, ...]:
        told = tuple(self._notes)
        self._notes.clear()
        return told

    def run(
        self,
        config: CellConfig,
        dense: CellConfig | None,
        shard: Shard | None,
        answers: dict[str, bytes],
        reference: dict[str, bytes],
    ) -> WorkDone:
        """Answer a shard of a cell, or with all ``answers`` so far what is left, and score and time it.

        ``reference``: files of its ``dense`` cell, if that is done.
        """
        prepared, spec = self.prepared, _spec(config, dense)
        task, loaded, features = prepared.tasks([config.task])[config.task], prepared.loaded, self.features
        answered: list[int] = []

        def on_batch(questions: int) -> None:
            answered.append(questions)
            if self.flag and Path(self.flag).exists():
                raise KeyboardInterrupt

        stopped = False
        with tempfile.TemporaryDirectory() as scratch:
            store = Store(scratch)
            if dense is not None:
                store.take(dense, reference)
            folder = store.begin(config)
            store.take(config, answers)
            try:
                if shard is None:
                    run_cell(loaded, spec, task, store, on_batch, features)
                else:
                    answer(loaded, spec, task, folder, shard=shard, on_batch=on_batch, features=features)
            except KeyboardInterrupt:
                stopped = True
            except StorageError:
                raise
            except IncompleteError:
                pass  # the file of failures says the same
            except VisibenchError as error:  # a shard's; its cell meets it again at the end
                store.fail(config, [failure(error)])
            written = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
        new = {name: content for name, content in written.items() if answers.get(name) != content}
        return WorkDone(new, sum(answered), self._told(), stopped)


def _spec(config: CellConfig, dense: CellConfig | None) -> CellSpec:
    """The cell, its method built here; :class:`DataError` where model or code are not those that the sweep means."""
    method = method_spec.build(config.reference, config.options)
    file = file_of(type(method))
    if fingerprint(config.model) != config.checkpoint:
        raise DataError(f"model {config.model!r} is another one on {platform.node()}: copy the folder there")
    if (file.digest if file else "") != config.method_hash:
        raise DataError(f"{config.method_file} is another one on {platform.node()}: copy the file there")
    here = {"engine": code.engine(), "method": code.of_method(config.sources.get("method", ""))}
    if other := [part for part, found in here.items() if found and config.code.get(part, found) != found]:
        raise DataError(f"visibench's {' and '.join(other)} is other code on {platform.node()}: install the same there")
    return CellSpec(config, method, dense)
