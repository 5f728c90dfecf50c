"""What a sweep saves: 8 methods × 4 tasks in one `visibench sweep`, against a `visibench run` for each method.

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
from argparse import Namespace
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


def commands(options: Namespace, folder: Path) -> dict[str, list[list[str]]]:
    """The commands of each side, and where they store what they find."""
    run = ["run", "--model", "tiny", "--tasks", ",".join(TASKS), "--limit", str(options.limit)]
    config = {"model": "tiny", "tasks": TASKS, "methods": METHODS, "limit": options.limit}
    if not options.timed:
        run.append("--no-timing")
        config["timing"] = None
    file = folder / "sweep.yaml"
    file.write_text(json.dumps(config))
    return {
        "separate runs": [[*run, "--method", method, "--out", str(folder / "separate runs")] for method in METHODS],
        "sweep": [["sweep", str(file), "--quiet", "--out", str(folder / "sweep")]],
    }


def measure(calls: list[list[str]]) -> tuple[float, float]:
    """Wall and CPU seconds of calls of ``visibench``, one behind the other."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    for call in calls:
        subprocess.run([sys.executable, "-m", "visibench", *call], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - started, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def answers(folder: Path) -> dict[str, list]:
    """What was answered, and at what compute, in each cell."""
    from visibench.results.store.store import Store

    columns = ["doc_id", "output", "visual_tokens", "executed_macs"]
    return {cell.config.folder: cell.samples()[columns].to_numpy().tolist() for cell in Store(folder).cells()}


def compare(options: Namespace) -> None:
    """Measure both sides in turn, and print them."""
    measured: dict[str, list[tuple[float, float]]] = {"separate runs": [], "sweep": []}
    for _ in range(options.repeats):
        given = {}
        with tempfile.TemporaryDirectory() as folder:
            for side, calls in commands(options, Path(folder)).items():
                measured[side].append(measure(calls))
                given[side] = repr(sorted(answers(Path(folder, side)).items()))
                print(f"{side}: wall {measured[side][-1][0]:.1f} s, CPU {measured[side][-1][1]:.1f} s", flush=True)
        if given["sweep"] != given["separate runs"]:
            raise SystemExit("the two sides answered differently")
    timed = "prefill timed" if options.timed else "prefill not timed"
    print(f"{len(METHODS)} methods × {len(TASKS)} tasks, {options.limit} questions a task, {timed}")
    versions = (f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "lmms-eval"))
    print(f"{platform.machine()}, {os.environ['OMP_NUM_THREADS']} threads, {', '.join(versions)}")
    for place, kind in enumerate(("wall", "CPU")):
        values = {side: [times[place] for times in all_] for side, all_ in measured.items()}
        ratios = [b / a for a, b in zip(values["separate runs"], values["sweep"], strict=True)]
        for side, seconds in values.items():
            print(f"{kind} s, {side}: median {statistics.median(seconds):.1f} ({min(seconds):.1f}–{max(seconds):.1f})")
        print(
            f"{kind} ratio, sweep / separate runs: median {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f}–{max(ratios):.3f}, n = {len(ratios)})"
        )


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=100, help="questions a task")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--timed", action="store_true", help="time prefill too, 20 times a cell, as sweeps do")
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    compare(given)


if __name__ == "__main__":
    main()
