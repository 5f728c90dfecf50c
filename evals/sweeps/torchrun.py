"""Ranks of ``torchrun``: the first runs a command, the others answer their share of the questions of each cell.

Answers go through the run folder, where the first rank finds them all, as if one process had stopped before it scored.
Only messages pass between the ranks, through the key-value store that ``torchrun`` keeps. There is no process group:
lmms-eval would take it for its own, and share out the questions once more.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from ...errors import OptionError, VisibenchError
from ...results.store.records import CellConfig, Record
from ...utils import machine
from ..answers.cell_spec import CellSpec

if TYPE_CHECKING:
    from ...engine.features import FeatureStore
    from ...models import LoadedModel
    from ..answers.checkpoint import Answers
    from ..tasks.tasks import Task

POLL = 0.05
"""Seconds between two looks for a message: a wait inside the store itself would not hear Ctrl-C."""
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE")


class Share(Record):
    """A cell of whose questions each rank answers a share.

    ``limit``, ``keep``: of the store in which each rank keeps vision features for itself (:class:`FeatureStore`).
    """

    config: CellConfig
    folder: Path
    limit: int
    keep: bool


_MESSAGE: TypeAdapter[Share | None] = TypeAdapter(Share | None)


@dataclass
class Ranks:
    """This process as number ``rank`` of ``count``, ``local_rank`` on its machine; ``store`` carries messages."""

    store: Any
    rank: int
    local_rank: int
    count: int
    shares: int = 0

    def send(self, share: Share | None) -> None:
        """From the first rank to all others: a share, or None at the end."""
        self.shares += 1
        self.store.set(f"share/{self.shares}", _MESSAGE.dump_json(share))

    def receive(self) -> Share | None:
        """On the other ranks: the next share."""
        self.shares += 1
        return _MESSAGE.validate_json(self._get(f"share/{self.shares}"))

    def done(self) -> None:
        """On the other ranks: the latest share is answered."""
        self.store.set(f"done/{self.shares}/{self.rank}", b"1")

    def wait(self) -> None:
        """On the first rank: until all others have answered the latest share."""
        for rank in range(1, self.count):
            self._get(f"done/{self.shares}/{rank}")

    def _get(self, key: str) -> bytes:
        try:
            while not self.store.check([key]):
                time.sleep(POLL)
            return self.store.get(key)
        except RuntimeError as error:
            raise VisibenchError("the connection to the other ranks is lost: their errors say why") from error


_first: Ranks | None = None


def join() -> Ranks:
    """This process as one of those that ``torchrun`` has started.

    Its variables are taken out of the environment, where lmms-eval would find them. Raises :class:`OptionError` where
    there are none.
    """
    global _first
    from torch.distributed import rendezvous

    try:
        local_rank = int(os.environ.get("LOCAL_RANK", "no LOCAL_RANK"))
        store, rank, count = next(rendezvous("env://"))
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise OptionError(
            f"WORLD_SIZE={machine.ranks()}, but the other ranks cannot be met ({reason}): start them with torchrun, or "
            "unset WORLD_SIZE for one process"
        ) from error
    for name in _VARIABLES:
        os.environ.pop(name, None)
    ranks = Ranks(store, rank, local_rank, count)
    _first = ranks if rank == 0 else None
    return ranks


def together() -> bool:
    """Whether this is the first of several ranks."""
    return _first is not None


def answer(
    loaded: LoadedModel,
    spec: CellSpec,
    task: Task,
    folder: Path,
    *,
    on_batch: Callable[[int], Any] | None = None,
    features: FeatureStore | None = None,
) -> Answers:
    """As :func:`visibench.evals.answers.generate.answer`, the questions shared out over the ranks, if there are
    several.

    The batches are those of one process, and so are the answers. ``features`` is this rank's; each other one has such a
    store of its own.
    """
    from ..answers import generate

    report = on_batch or (lambda answered: None)
    if _first is None:
        return generate.answer(loaded, spec, task, folder, on_batch=report, features=features)
    count, said, size = _first.count, 0, task.size(spec.config.limit)[0]

    def estimate(answered: int) -> None:
        """A batch here stands for one on every rank."""
        nonlocal said
        new = min(answered * count, size - said)
        said += new
        report(new)

    limit, keep = (features.limit, features.keep) if features is not None else (0, False)
    _first.send(Share(config=spec.config, folder=folder, limit=limit, keep=keep))
    ask = partial(generate.answer, loaded, spec, task, folder, features=features)
    ask(shard=(0, count), on_batch=estimate)
    _first.wait()
    found = ask(on_batch=lambda answered: report(0))
    report(size - said)
    return found


def serve(ranks: Ranks) -> None:
    """On all ranks but the first: answer shares until there are no more.

    What the vision tower computes is shared by cells that follow each other on the same model.
    """
    from ..answers import generate
    from ..settings import method_spec
    from ..tasks.tasks import load_tasks

    served: tuple[Any, ...] = ()
    loaded: Any = None
    tasks: dict[tuple[str, str], Task] = {}
    with ExitStack() as held:
        while (share := ranks.receive()) is not None:
            config = share.config
            wanted = (config.model, config.device, config.dtype, config.attention, share.limit, share.keep)
            if wanted != served:
                held.close()
                loaded = None  # before the next one is loaded
                loaded, served = _load(config, ranks), wanted
                features = held.enter_context(_features(loaded, share, ranks))
            key = config.task, config.origin
            if key not in tasks:
                tasks[key] = load_tasks([config.task], config.origin)[0]
            spec = CellSpec(config, method_spec.build(config.method, config.options))
            shard = ranks.rank, ranks.count
            generate.answer(loaded, spec, tasks[key], share.folder, shard=shard, features=features)
            ranks.done()


def _load(config: CellConfig, ranks: Ranks) -> LoadedModel:
    """A cell's model on this rank's device; nobody holds another one any more."""
    from ...models import load_model
    from ...models.load import of_rank, release

    release()
    device = of_rank(config.device, ranks.local_rank)
    return load_model(config.model, device=device, dtype=config.dtype, attn_implementation=config.attention)


def _features(loaded: LoadedModel, share: Share, ranks: Ranks) -> FeatureStore:
    from .feature_sharing import store_of

    def say(line: str) -> None:
        print(f"rank {ranks.rank}: {line}", file=sys.stderr)

    return store_of(loaded, share.config.model, share.limit, share.keep, say)
