"""Options of ``visibench sweep`` that say who runs the cells."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import OptionError, suggest

if TYPE_CHECKING:
    from ..evals.sweeps.executor import Executor

KNOWN = ("local", "ray")

Named = Annotated[
    str,
    typer.Option(
        "--executor", metavar="local|ray", show_default=False, help="This machine, or a Ray cluster. (default: local)"
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Processes that share the cells, each with a CUDA device of its own, or a share of the CPU threads; with "
        "--executor ray, at most so many. (default: 1; with Ray, one for each GPU or CPU of the cluster)",
    ),
]
Address = Annotated[
    str | None,
    typer.Option(help="Ray cluster: auto, or ray://HOST:10001. (default: one of its own on this machine)"),
]
Shard = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Workers: cells of more questions are cut. (default: 1000)"),
]


def choose(
    executor: str, workers: int | None, address: str | None, shard: int | None, device: str = "auto"
) -> Executor | None:
    """What runs the cells, on ``device`` as the configuration names it; None: this process.

    Several workers on this machine are those of a Ray cluster of its own where Ray is installed, else of a pool.
    """
    if executor not in KNOWN:
        raise OptionError(f"unknown executor {executor!r}; {suggest(executor, KNOWN)}")
    if address is not None and executor != "ray":
        raise OptionError("--address is for --executor ray: add that, or leave it out")
    if shard is not None and executor != "ray" and workers in (None, 1):
        raise OptionError("--shard is for --workers of 2 and more, or --executor ray: add one of them, or leave it out")
    cut: dict[str, Any] = {} if shard is None else {"shard": shard}
    if executor == "ray":
        from ..evals.workers.ray import Ray

        return Ray(address, workers, **cut)
    if workers is None or workers == 1:
        return None
    from ..evals.workers.devices import environments

    environments(workers, device)
    if find_spec("ray"):
        from ..evals.workers.ray import Ray

        return Ray(workers=workers, **cut)
    from ..evals.workers.pool import Pool

    return Pool(workers, **cut)
