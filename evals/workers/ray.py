"""Workers as actors of a Ray cluster: one that is there, or one of its own on this machine alone.

A worker has a GPU, or a CPU where there are none, and comes where the cluster has room.
"""

from __future__ import annotations

import logging
import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import partial
from subprocess import DEVNULL, PIPE, Popen
from typing import Any
from unittest.mock import patch

from rich.text import Text

from ...errors import OptionError, VisibenchError
from ...utils import interrupt
from ..sweeps.events import Reporter
from ..sweeps.executor import Job, Prepared
from . import watchdog
from .devices import share_of_threads
from .driver import SHARD, LostError, TaskError, drive
from .worker import Worker

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Ray:
    """A Ray cluster at ``address``; None: one of its own on this machine.

    ``workers``: how many at most, by default one for each GPU, or for each CPU. ``shard``: questions of a task at most;
    cells with more are cut.
    """

    address: str | None = None
    workers: int | None = None
    shard: int = SHARD

    def run(self, job: Job, prepared: Prepared, report: Reporter) -> None:
        """Run a job; see :func:`~visibench.evals.workers.driver.drive`."""
        job.check()
        with _cluster(self.address, self.workers) as ray:
            needs, most = _needs(job.config.device, ray.cluster_resources())
            start = partial(_Actor, ray, ray.remote(**needs)(Worker), job.config.model_dump_json())
            workers = min(self.workers or most, most)
            drive(job, prepared, report, start, workers=workers, shard=self.shard, here=self.address is None)


class _Actor:
    def __init__(self, ray: Any, kind: Any, *arguments: str) -> None:
        self.ray, self.actor = ray, kind.remote(*arguments)

    def call(self, name: str, *arguments: Any) -> Future:
        answer: Future = Future()
        getattr(self.actor, name).remote(*arguments).future().add_done_callback(partial(self._pass_on, answer))
        return answer

    def kill(self) -> None:
        self.ray.kill(self.actor)

    def _pass_on(self, answer: Future, returned: Future) -> None:
        """The outcome of a call, its errors as a driver knows them."""
        error = returned.exception()
        if error is None:
            answer.set_result(returned.result())
            return
        if isinstance(error, self.ray.exceptions.RayTaskError):
            answer.set_exception(TaskError.of(error.cause, Text.from_ansi(str(error)).plain))  # Ray colours it
            return
        lost = LostError("was lost")
        lost.__cause__ = error
        answer.set_exception(lost)


@contextmanager
def _cluster(address: str | None, workers: int | None) -> Iterator[Any]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise OptionError("--executor ray needs Ray: pip install visibench[ray]") from error
    options: dict[str, Any] = {"address": address or "local", "log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        options |= {"num_cpus": workers, "include_dashboard": False}
    try:
        with _alone(workers) if address is None else nullcontext(), interrupt.as_before():
            ray.init(**options)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        where = f"no Ray cluster at {address}" if address else "no Ray cluster can be started here"
        raise OptionError(f"{where} ({reason}): `ray start --head` starts one, and --address auto finds it") from error
    try:
        if address is None and ray.util.get_node_ip_address() != LOOPBACK:
            raise VisibenchError(f"this version of Ray cannot be kept to {LOOPBACK}: give --address of a cluster")
        # Ray tells of lost workers on standard output, which may carry JSON.
        with redirect_stdout(sys.stderr):
            yield ray
    finally:
        with interrupt.as_before():
            ray.shutdown()


@contextmanager
def _alone(workers: int | None) -> Iterator[None]:
    """Within, a cluster that starts listens to this machine alone, and to those who know its token.

    Its processes end when this one has, also when it is killed.
    """
    from ray._private import ray_constants

    # What Ray does by itself on desktop systems; on Linux it would listen on all addresses, whatever it is told.
    variables = {ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"} | (share_of_threads(workers) if workers else {})
    # Kept, since Ray reads it once a process. Without it Ray would leave a token in the home directory.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    with (
        patch.dict(os.environ, variables | {watchdog.NAME: _watched()}),
        patch.object(ray_constants, "ENABLE_RAY_CLUSTER", False),
    ):
        yield


def _watched() -> str:
    """A mark for the environment of processes that are to end with this one."""
    mark = secrets.token_hex(16)
    command = [sys.executable, "-P", watchdog.__file__, mark]  # without this folder among those of modules
    # Ctrl-C in a terminal is for this process; the pipe closes when it ends, since no other process has its end.
    Popen(command, stdin=PIPE, stdout=DEVNULL, stderr=DEVNULL, start_new_session=True, close_fds=True)
    return mark


def _needs(device: str, resources: Mapping[str, float]) -> tuple[dict[str, int], int]:
    """What a worker needs of the cluster, and how many have that at once."""
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    name, _, index = device.partition(":")
    if index:
        raise OptionError(f"Ray gives each worker a device of its own: give device {name}, not {device}")
    if name == "cuda" and not gpus:
        raise OptionError("the Ray cluster has no GPU: give device cpu, or start its nodes with --num-gpus")
    return ({"num_gpus": 1}, gpus) if name != "cpu" and gpus else ({"num_cpus": 1}, max(cpus, 1))
