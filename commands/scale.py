"""Options of ``visibench sweep`` that say who runs the cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import OptionError, suggest

if TYPE_CHECKING:
    from ..evals.sweeps.processes import Executor

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
        "Ray, at most so many. (default: 1; with Ray, one for each GPU or CPU of the cluster)",
    ),
]
Address = Annotated[
    str | None,
    typer.Option(help="Ray cluster: auto, or ray://HOST:10001. (default: one of its own on this machine)"),
]
Shard = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Ray: cells of more questions are cut. (default: 1000)"),
]


def choose(
    executor: str, workers: int | None, address: str | None, shard: int | None, device: str = "auto"
) -> Executor | None:
    """What runs the cells, on ``device`` as the configuration names it; None: this process."""
    from ..evals.sweeps.torchrun import together

    if executor not in KNOWN:
        raise OptionError(f"unknown executor {executor!r}; {suggest(executor, KNOWN)}")
    if together() and (executor == "ray" or (workers or 1) > 1):
        raise OptionError("torchrun shares out the questions of each cell already: leave out --workers and --executor")
    given: dict[str, Any] = {"address": address, "shard": shard}
    given = {name: value for name, value in given.items() if value is not None}
    if executor == "ray":
        from ..evals.sweeps.ray import Ray

        return Ray(workers=workers, **given)
    if given:
        raise OptionError(f"--{next(iter(given))} is for --executor ray: add that, or leave it out")
    from ..evals.sweeps.processes import Processes

    if workers is None or workers == 1:
        return None
    processes = Processes(workers)
    processes.environments(device)
    return processes
