"""Run the settings of a paper, and set our numbers beside what it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..errors import OptionError
from .shared import AsJson, Limit, print_list

if TYPE_CHECKING:
    from ..results.published.reproduction import Reproduced
    from ..results.store.store import Cell

HEADER = ["method", "setting", "benchmark", "ours", "printed", "gap [95 %]", "n", "verdict"]
RULE = (
    "Gap: ours - printed, with the interval of our score by image and the rounding in print. Reproduced: it holds 0 "
    "and is at most 2 % of the best score wide on either side. It knows nothing of differences in prompts, precision "
    "and software."
)


def reproduce(
    paper: Annotated[str, typer.Argument(help="visipruner, fastv, pyramiddrop, sparsevlm, dart, visionzip, divprune.")],
    model: Annotated[str | None, typer.Option(help="A local copy of the checkpoint. (default: the paper's)")] = None,
    data: Annotated[str | None, typer.Option(help="A folder laid out like the hub. (default: hub)")] = None,
    limit: Limit = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1 … (default: auto)")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="As for `visibench sweep`.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder. (default: runs/paper-NAME)")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what it costs, and stop.")] = False,
    rate: Annotated[float | None, typer.Option(metavar="N", help="As for `visibench sweep`.")] = None,
    as_json: AsJson = False,
) -> None:
    """Run a paper's settings; print ours, printed, the gap with its interval, and a verdict for each figure."""
    from ..evals.sweeps.papers import load_paper
    from ..evals.sweeps.sweep import sweep
    from ..results.published.reproduction import paper_of, reproduced
    from .dry_run import show

    given = {"model": model, "data": data, "limit": limit, "device": device}
    config = load_paper(paper, [*(settings or []), *(f"{k}={v}" for k, v in given.items() if v is not None)])
    folder = out or Path("runs") / f"paper-{paper}"
    if dry_run:
        show(config, folder, rate, as_json=as_json)
        return
    if rate is not None:
        raise OptionError("--rate belongs to --dry-run: add it, or leave the rate out")
    printed = paper_of(config.paper)
    cells = sweep(config, folder, Console(stderr=True))
    compared = reproduced(cells, printed)
    if as_json:
        told = {"figures": [_json(one) for one in compared], "claims": _claims(printed.name, cells)}
        print(json.dumps(told, indent=1))
        return
    also = ["", RULE, *(["SUBSET: these are no full-set scores."] if limit else [])]
    also += ["", *_claims(printed.name, cells)]
    print_list([], HEADER, [_row(one) for one in compared], "\n".join(also), as_json=False)


def _row(one: Reproduced) -> list[str]:
    interval = "" if one.low is None or one.high is None else f" [{one.low:+.2f}, {one.high:+.2f}]"
    return [
        one.ours.method,
        one.figure.row.budget or "all tokens",
        f"{one.figure.quantity.title} ({one.figure.table.where})",
        f"{one.value:.2f}",
        one.figure.printed,
        f"{one.gap:+.2f}{interval}",
        str(one.ours.questions),
        f"{one.verdict}: {one.why}",
    ]


def _json(one: Reproduced) -> dict[str, Any]:
    from ..results.published.show import record

    facts = {"ours": one.value, "gap": one.gap, "gap_low": one.low, "gap_high": one.high}
    told = {"verdict": one.verdict, "why": one.why, "questions": one.ours.questions, "label": one.ours.label}
    return facts | told | {"published": record(one.figure)}


def _claims(paper: str, cells: list[Cell]) -> list[str]:
    """What a paper claims of compute: by its own count, as executed by its plan, and as these runs executed."""
    from .flops import MARKS, reproductions

    lines = []
    for one in reproductions():
        claim = one.claim
        if claim.paper == paper:
            plan = "" if one.executed is None else f", executed by that plan {one.executed:.2f}"
            by = f"by its formula {one.recomputed:.2f} {MARKS[one.agreement]}{plan}"
            lines.append(f"{claim.where}, {claim.setting}: printed {claim.printed} {claim.unit}, {by}.")
    dense = {cell.config.task: cell.metrics.compute for cell in cells if cell.config.method == "none"}
    for cell in cells:
        base, ours = dense.get(cell.config.task), cell.metrics.compute
        if base is None or cell.config.method == "none":
            continue
        saved = 1 - ours.macs / base.macs
        attention = 1 - _attention(ours.components) / _attention(base.components)
        lines.append(
            f"Executed here, {cell.config.label} on {cell.config.task}: {100 * saved:.1f} % fewer multiply-adds than "
            f"dense, all included; {100 * attention:.1f} % less attention, scoring included."
        )
    return lines


def _attention(components: dict[str, float]) -> float:
    return components["attention"] + components.get("scoring", 0.0)
