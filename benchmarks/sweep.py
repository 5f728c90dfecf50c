"""What a sweep saves: 8 methods × 4 tasks in one process, against a process for each method.

    python benchmarks/sweep.py [--limit 100] [--repeats 3] [--timed]

Both sides run the same cells with the same settings, in turn, into temporary folders, and must give the same answers.
A side's CPU time (user and system, of all its processes) says more than its wall time where other work is running.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

METHODS = [
    "none",
    "random:keep=0.5",
    "fastv:keep=0.5",
    "visipruner:shallow_layers=4",
    "pyramiddrop:layers=scaled",
    "fastervlm:keep=0.5",
    "visionzip:tokens=54",
    "divprune:keep=0.5",
]
TASKS = ["gqa", "mme", "textvqa_val", "pope"]


def run(content: str, out: str) -> None:
    """What `visibench run` does, also without timing of prefill."""
    from rich.console import Console
    from visibench.evals.config import parse_config
    from visibench.evals.sweep import save_tables, sweep

    cells = sweep(parse_config(json.loads(content), "benchmark"), Path(out), Console(quiet=True), dense=False)
    save_tables(cells, Path(out))


def measure(parts: list[list[str]], options: dict, folder: Path) -> tuple[float, float]:
    """Wall and CPU seconds of one process for each of ``parts``, lists of methods."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    for methods in parts:
        content = json.dumps({"model": "tiny", "tasks": TASKS, "methods": methods} | options)
        subprocess.run([sys.executable, __file__, "--run", content, str(folder)], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - started, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def answers(folder: Path) -> dict[str, list]:
    """What was answered, and at what compute, in each cell."""
    from visibench.results.store import Store

    columns = ["doc_id", "output", "visual_tokens", "executed_macs"]
    return {cell.config.folder: cell.samples()[columns].to_numpy().tolist() for cell in Store(folder).cells()}


def compare(options: dict, repeats: int) -> None:
    """Measure both sides in turn, and print them."""
    sides = {"separate runs": [[method] for method in METHODS], "sweep": [METHODS]}
    found: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for _ in range(repeats):
        given = {}
        for side, parts in sides.items():
            with tempfile.TemporaryDirectory() as folder:
                found[side].append(measure(parts, options, Path(folder)))
                given[side] = repr(sorted(answers(Path(folder)).items()))
            print(f"{side}: wall {found[side][-1][0]:.1f} s, CPU {found[side][-1][1]:.1f} s", flush=True)
        if given["sweep"] != given["separate runs"]:
            raise SystemExit("the two sides answered differently")
    timing = options.get("timing", "as by default")
    print(f"{len(METHODS)} methods × {len(TASKS)} tasks, {options['limit']} questions a task, timing: {timing}")
    versions = (f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "lmms-eval"))
    print(f"{platform.machine()}, {os.environ['OMP_NUM_THREADS']} threads, {', '.join(versions)}")
    for place, kind in enumerate(("wall", "CPU")):
        values = {side: [times[place] for times in all_] for side, all_ in found.items()}
        ratios = [b / a for a, b in zip(values["separate runs"], values["sweep"], strict=True)]
        for side, seconds in values.items():
            print(f"{kind} s, {side}: median {statistics.median(seconds):.1f} ({min(seconds):.1f}–{max(seconds):.1f})")
        print(
            f"{kind} ratio, sweep / separate runs: median {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f}–{max(ratios):.3f}, n = {repeats})"
        )


def main() -> None:
    """Measure, or be one of the processes that are measured."""
    if sys.argv[1:2] == ["--run"]:
        run(*sys.argv[2:4])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=100, help="questions a task")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--timed", action="store_true", help="time prefill too, 20 times a cell, as sweeps do")
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    compare({"limit": given.limit} | ({} if given.timed else {"timing": None}), given.repeats)


if __name__ == "__main__":
    main()
