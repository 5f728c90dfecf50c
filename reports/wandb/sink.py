"""Weights & Biases as a sink: runs made from a run folder, at any time, and again without doubles.

A run for each cell (configuration, scores with their intervals, tokens, compute, times, some answers, the cell's files)
and one for the sweep (its tables and figures, with the numbers behind them), all in one group. What was sent is noted
in ``<root>/wandb/sent.json``, so that only what is new goes out; ids follow from what a cell is, so that a run is
updated and never doubled.

Nothing but results leaves: no source code, git state, requirements, console output, host name, user name or system
measurements. Everything that wandb writes lies in ``<root>/wandb``; temporary files apart.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from ... import errors
from ...errors import DataError, OptionError, VisibenchError
from ...results.store import disk
from ...results.store.records import digest
from ...results.store.store import Cell, Store
from ...results.tables.render import render
from ...results.tables.tables import build
from .content import config_of, dense_of, names, samples, summary, sweep_content

if TYPE_CHECKING:
    import wandb
    from PIL.Image import Image

MODES = ("online", "offline")
PROJECT = "visibench"
ANSWER = 20
"""Seconds in which a server must answer."""
KEYLESS = "no W&B API key: set WANDB_API_KEY, run `wandb login`, or choose offline"
OverlaySource = Callable[[Cell, Sequence[int]], Mapping[int, Mapping[str, "Image"]]]
"""Images of a cell's questions: doc_id → column → image."""


@dataclass(frozen=True)
class Destination:
    """Where results go. Without ``entity`` the account's default; ``rows``: how many answers of each cell are sent."""

    group: str
    mode: str = "online"
    project: str = PROJECT
    entity: str | None = None
    tags: tuple[str, ...] = ()
    rows: int = 32

    def check(self) -> None:
        """Raise :class:`OptionError` where a key is needed and none that could be one is there."""
        if self.mode == "online" and not credentials():
            raise OptionError(KEYLESS)

    def reach(self) -> None:
        """Ask the server, before anything is prepared, whether it takes the key and the entity; nothing when offline.

        Raises :class:`OptionError` if it does not, and :class:`DataError` where it does not answer.
        """
        if self.mode != "online":
            return
        import wandb

        try:
            viewer = wandb.Api(timeout=ANSWER).viewer
            known = {viewer.username, viewer.entity, *viewer.teams}
        except (ValueError, wandb.errors.AuthenticationError, wandb.errors.UsageError) as error:
            raise OptionError(f"W&B does not take the API key ({reason(error)}): correct WANDB_API_KEY") from error
        except Exception as error:
            told = f"W&B at {_server('online')} does not answer ({reason(error)})"
            raise DataError(f"{told}: nothing was sent") from error
        if self.entity is not None and self.entity not in known:
            names = ", ".join(sorted(filter(None, known)))
            raise OptionError(f"the W&B account cannot write to entity {self.entity!r}: it has {names}")

    def options(self) -> list[str]:
        """This destination as options of ``visibench wandb sync``."""
        given = {"mode": self.mode, "project": self.project, "entity": self.entity, "group": self.group}
        named = given | {"tags": ",".join(self.tags) or None, "samples": self.rows}
        return [part for key, value in named.items() if value is not None for part in (f"--{key}", str(value))]

    def run_id(self, *facts: Any) -> str:
        """The same for the same facts in the same group."""
        return digest([self.group, *facts])


@dataclass(frozen=True)
class WandbRun:
    """A run to be: ``content`` makes what is logged, ``files`` go into an artifact named ``artifact``."""

    id: str
    name: str
    kind: str
    config: dict[str, Any]
    content: Callable[[], dict[str, Any]]
    artifact: str
    files: Sequence[Path]


# ---- sending --------------------------------------------------------------------------------------------------------


class Sink:
    """Sends cells of a run folder, and then its tables. Raises :class:`VisibenchError` where W&B does not take them."""

    def __init__(self, folder: Path, destination: Destination, overlays: OverlaySource | None = None) -> None:
        self.store, self.destination, self.overlays = Store(folder), destination, overlays
        prepare(folder)
        destination.check()
        self.sent = Sent(folder)

    def send(self, cell: Cell, cells: Iterable[Cell]) -> bool:
        """Send one cell; ``cells``: where to look for its dense counterpart. False if it is there already."""
        dense, config = dense_of(cell, cells), config_of(cell)
        environment = cell.metrics.environment.model_dump(mode="json", exclude={"host", "code"})
        with tempfile.TemporaryDirectory() as scratch:
            run = WandbRun(
                id=self.destination.run_id(cell.metrics.config_hash, environment),
                name=f"{cell.config.label} · {cell.config.task} · seed {cell.config.seed}",
                kind="cell",
                config=config,
                content=lambda: summary(cell, dense) | {"samples": self._samples(cell, Path(scratch))},
                artifact=cell.config.folder,
                files=[cell.path],
            )
            return self._once(run, digest([config, cell.metrics.model_dump_json(), len(dense), self._options()]))

    def finish(self, cells: list[Cell]) -> bool:
        """Send tables and figures of all ``cells`` as a run of the whole sweep."""
        tables, group = build(cells), self.destination.group
        with tempfile.TemporaryDirectory() as scratch:
            files = [Path(scratch) / f"table.{form}" for form in ("md", "csv", "json")]
            for file in files:
                file.write_text(render(tables, file.suffix[1:]) + "\n", encoding="utf-8")
            run = WandbRun(
                id=self.destination.run_id("sweep"),
                name=group,
                kind="sweep",
                config={"cells": len(cells)} | names(cells),
                content=lambda: sweep_content(tables, Path(scratch)),
                artifact=f"{group}-tables",
                files=[*files, *self.store.root.glob("sweep.yaml")],
            )
            marks = sorted(cell.config.label + cell.metrics.model_dump_json() for cell in cells)
            return self._once(run, digest([marks, self._options()]))

    def _once(self, run: WandbRun, mark: str) -> bool:
        """Make or update a run, unless it was sent with the same ``mark``."""
        destination = self.destination
        place = "/".join([_server(destination.mode), destination.entity or "", destination.project, run.id])
        if self.sent.get(place) == mark:
            return False
        import wandb

        settings = wandb.Settings(**_PRIVATE, mode="online" if destination.mode == "online" else "offline")
        try:
            with wandb.init(
                project=destination.project,
                entity=destination.entity,
                group=destination.group,
                tags=destination.tags,
                dir=str(self.store.root),
                id=run.id,
                name=run.name,
                job_type=run.kind,
                config=run.config,
                resume="allow" if destination.mode == "online" else None,
                settings=settings,
            ) as opened:
                opened.log(run.content())
                opened.log_artifact(_artifact(run))
        except VisibenchError:
            raise
        except Exception as error:  # an outage, a refusal, or a fault of wandb itself: results are on disk
            raise DataError(f"W&B did not take {run.name!r}: {reason(error)}") from error
        self.sent.put(place, mark)
        return True

    def _samples(self, cell: Cell, scratch: Path) -> wandb.Table:
        import wandb

        frame = samples(cell, self.destination.rows)
        overlays = self.overlays(cell, frame["doc_id"].tolist()) if self.overlays else {}
        for column in dict.fromkeys(name for by in overlays.values() for name in by):
            images = [overlays.get(doc, {}).get(column) for doc in frame["doc_id"]]
            shown = [wandb.Image(_file(image, scratch)) if image is not None else None for image in images]
            frame[column] = pd.Series(shown, dtype=object)
        return wandb.Table(dataframe=frame)

    def _options(self) -> list[Any]:
        return [self.destination.tags, self.destination.rows, self.overlays is not None]


class Sent:
    """What was sent, by place, with a hash of what it was: ``<root>/wandb/sent.json``."""

    def __init__(self, folder: Path) -> None:
        self.store, self.marks = Store(folder / "wandb"), {}
        # Without it everything is sent again, to the same runs.
        with suppress(OSError, ValueError, TypeError, RecursionError):
            self.marks = dict(json.loads(disk.read(folder / "wandb" / "sent.json")))

    def get(self, place: str) -> str | None:
        """The hash of what went to ``place``."""
        return self.marks.get(place)

    def put(self, place: str, mark: str) -> None:
        """Note what went there."""
        self.marks[place] = mark
        self.store.save("sent.json", json.dumps(self.marks, indent=1) + "\n")


def prepare(folder: Path) -> None:
    """Set wandb's environment: its files below ``folder``, no reports of its crashes, no lines of its own, an
    end to tries that fail.

    Limits that are set already stay. Must come before wandb is used in this process.
    """
    inner = Path(os.path.realpath(folder / "wandb"))  # links that lead in a circle are no folder
    inner.mkdir(parents=True, exist_ok=True)
    os.environ |= {
        "WANDB_DIR": str(inner.parent),
        "WANDB_CACHE_DIR": str(inner / "cache"),
        "WANDB_DATA_DIR": str(inner / "staging"),
        "WANDB_ARTIFACT_DIR": str(inner / "artifacts"),
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_SILENT": "true",
    }
    for name, value in _LIMITS.items():
        os.environ.setdefault(name, value)


def credentials() -> bool:
    """Whether wandb finds a key or an identity token. Raises :class:`OptionError` for a key that cannot be one."""
    from wandb.sdk.internal.internal_api import Api
    from wandb.sdk.lib.wbauth.validation import check_api_key

    key = Api().api_key
    problem = check_api_key(key) if key else None
    if problem:
        raise OptionError(f"the W&B API key cannot be used: {problem} Correct WANDB_API_KEY or run `wandb login`")
    return bool(key or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"))


_LIMITS = {
    "WANDB_INIT_TIMEOUT": "60",
    "WANDB__GRAPHQL_RETRY_MAX": "4",
    "WANDB__GRAPHQL_RETRY_WAIT_MIN_SECONDS": "1",
    "WANDB__GRAPHQL_RETRY_WAIT_MAX_SECONDS": "8",
    "WANDB__GRAPHQL_TIMEOUT_SECONDS": "20",
    "WANDB__FILE_STREAM_RETRY_MAX": "4",
    "WANDB__FILE_STREAM_RETRY_WAIT_MAX_SECONDS": "8",
    "WANDB__FILE_TRANSFER_RETRY_MAX": "4",
    "WANDB__FILE_TRANSFER_RETRY_WAIT_MAX_SECONDS": "8",
}
_PRIVATE: dict[str, Any] = {
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "disable_job_creation": True,
    "save_code": False,
    "silent": True,
    "host": "",
    "program": "visibench",
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
}


def _file(image: Image, scratch: Path) -> str:
    """An image on disk, written once and fast: by itself wandb packs each as tightly as it can."""
    file = scratch / f"{hashlib.sha256(f'{image.size}'.encode() + image.tobytes()).hexdigest()}.png"
    if not file.exists():
        image.save(file, compress_level=1)
    return str(file)


def _server(mode: str) -> str:
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai") if mode == "online" else mode


def _artifact(run: WandbRun) -> wandb.Artifact:
    import wandb

    artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", run.artifact), type=run.kind)
    for path in run.files:
        inner = [file for file in sorted(path.rglob("*")) if file.is_file()] if path.is_dir() else [path]
        for file in inner:
            artifact.add_file(str(file), name=str(file.relative_to(path if path.is_dir() else path.parent)))
    return artifact


def reason(error: BaseException) -> str:
    """One line, without the key."""
    line, key = errors.reason(error), os.environ.get("WANDB_API_KEY")
    return line.replace(key, "…") if key else line
